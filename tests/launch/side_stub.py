"""A side process whose tasks are tiny programs: each `run_dir/<task>.py`, with the step as its argument."""

import sys

from tiphys.launch.side_process import Job, SideProcess, serve


class Stub(SideProcess):
    first_pause = 0.2

    def _command(self, name: str, job: Job) -> list[str]:
        return [sys.executable, str(self.run_dir / f"{name}.py"), str(job.step), str(job.evaluated)]


if __name__ == "__main__":
    serve(Stub(sys.argv[1], sys.stdin.fileno(), sys.stdout.fileno()))
