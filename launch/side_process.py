"""The side process of a run: exports checkpoints as policies, evaluates them and publishes them, at low priority.

`launch/aside.py` starts it and talks to it in JSON lines, over its stdin and stdout:

    {"job": 2000, "do": ["evaluate", "publish"], "evaluated": false}    a checkpoint, protected until it is exported
    {"withdraw": 2000}                              forget this job, unless it has begun
    {"step": 2000, "event": "begun" | "exported" | "evaluated" | "published" | "failed" | "finished", …}    the answers
    {"event": "beat"}                               a sign of life, every few seconds

Each task runs in a process of its own with a limit of time, so the side process stays small, and a task that hangs or crashes
takes nothing else along. If its stdin ends, it ends itself and all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiphys.dataio.errors import Explained
from tiphys.dataio.python_path import child_environment, python
from tiphys.launch.finish import EVALUATION, evaluation_command, evaluation_options
from tiphys.launch.refusals import show, status_of
from tiphys.pretrain.checkpoint_files import folder_of
from tiphys.recipes.load import load_recipe
from tiphys.recipes.schema import Recipe

# In the run's folder
POLICY = "aside/policy.json"  # config and processor of its policies
POLICIES = "aside/policies"
BEAT = 2.0  # seconds between two signs of life
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 120.0  # seconds between two attempts to publish
_LAST_WORDS = 4000  # bytes of a task's stderr that are looked at


@dataclass
class Job:
    """A checkpoint, and what is still to be done with it: the names of tasks, in order."""

    step: int
    todo: list[str]
    ready: float = 0.0  # not before this time
    pause: float = 0.0  # seconds before the next attempt
    since: float = 0.0  # when the current task was first tried
    begun: bool = False
    evaluated: bool = False


@dataclass
class Task:
    """A running task of a job."""

    name: str
    job: Job
    process: subprocess.Popen[bytes]
    folder: Path  # for its output
    began: float = field(default_factory=time.monotonic)


class SideProcess:
    """The loop.

    Parameters
    ----------
    run_dir : str or Path
    commands, answers : int
        File descriptors of the pipes from and to the trainer.
    """

    first_pause = FIRST_PAUSE

    def __init__(self, run_dir: str | Path, commands: int, answers: int) -> None:
        self.run_dir, self._commands, self._answers = Path(run_dir), commands, answers
        self.recipe = load_recipe(self.run_dir / "recipe.yaml")
        self.limit = 60 * self.recipe.evaluate.minutes
        self.jobs: dict[int, Job] = {}
        self._task: Task | None = None
        self._rest = b""
        self._published = -1  # newest step that was published
        self._beaten = float("-inf")

    def run(self) -> None:
        """Work until the trainer's end of the pipe closes."""
        shutil.rmtree(self.run_dir / POLICIES, ignore_errors=True)  # those that an earlier side process left
        while self._read():
            if self._task is not None:
                self._look_after(self._task)
            if self._task is None:
                self._begin()
            if time.monotonic() - self._beaten >= BEAT:
                self._beaten = time.monotonic()
                self._say({"event": "beat"})

    def _read(self) -> bool:
        """Take new commands; wait for them for a moment. False: the trainer is gone."""
        if not select.select([self._commands], [], [], 0.1)[0]:
            return True
        data = os.read(self._commands, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "job" in command:
                wanted = ["export", *command["do"]]
                self.jobs[command["job"]] = Job(command["job"], wanted, evaluated=command["evaluated"])
            elif (job := self.jobs.get(command["withdraw"])) is not None and not job.begun:
                del self.jobs[job.step]
        return bool(data)

    def _begin(self) -> None:
        """Start the next task: of the job that has begun, else of the newest."""
        now = time.monotonic()
        ready = [job for job in self.jobs.values() if job.ready <= now]
        if not ready:
            return
        job = max(ready, key=lambda job: (job.begun, job.step))
        if not job.begun:
            job.begun = True
            self._answer(job, "begun")
        name = job.todo[0]
        if name == "publish" and job.step < self._published:
            self._next(job)  # a newer policy is there already
            return
        job.since = job.since or now
        logs = self.run_dir / "aside"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / "stdout", "wb") as out, open(logs / "stderr", "wb") as errors:
                process = subprocess.Popen(
                    self._command(name, job),
                    env=_environment(self.recipe.evaluate.devices if name == "evaluate" else ""),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                )
        except OSError as error:
            self._failed(job, name, f"it could not be started: {error}")
            return
        self._task = Task(name, job, process, logs)

    def _command(self, name: str, job: Job) -> list[str]:
        if name == "evaluate":
            folder, out = policy_folder(self.run_dir, job.step), evaluation_file(self.run_dir, job.step)
            options = evaluation_options(self.recipe) | {"videos": 0}
            return evaluation_command(folder, self.recipe.evaluate.tasks, out=out, **options)
        known = ["evaluated"] if job.evaluated else []
        return python("-m", "tiphys.launch.side_process", str(self.run_dir), name, str(job.step), *known)

    def _look_after(self, task: Task) -> None:
        """Collect a task that has ended, and end one that has taken too long."""
        status = task.process.poll()
        took = time.monotonic() - task.began
        if status is None and took < self.limit:
            return
        self._task = None
        if status is None:
            _end(task.process)
            self._failed(task.job, task.name, f"it was ended after {took / 60:.0f} minutes (evaluate.minutes)")
        elif status:
            self._failed(task.job, task.name, _last_words(task.folder / "stderr") or f"exit status {status}")
        else:
            try:
                self._succeeded(task, took)
            except (OSError, ValueError) as error:
                self._failed(task.job, task.name, f"its result cannot be read: {error}")

    def _succeeded(self, task: Task, took: float) -> None:
        job = task.job
        if task.name == "export":
            self._answer(job, "exported", seconds=took)
        elif task.name == "evaluate":
            found = json.loads(evaluation_file(self.run_dir, job.step).read_text(encoding="utf-8"))
            job.evaluated = True
            self._answer(job, "evaluated", seconds=took, result=found)
        else:
            said = (task.folder / "stdout").read_text(encoding="utf-8").strip()
            self._published = job.step
            self._answer(job, "published", said=said)
        self._next(job)

    def _failed(self, job: Job, name: str, why: str) -> None:
        now = time.monotonic()
        if name == "publish" and now - job.since + job.pause < self.limit:  # a store may come back
            job.pause = min(2 * job.pause or self.first_pause, LONGEST_PAUSE)
            job.ready = now + job.pause
            return
        self._answer(job, "failed", task=name, why=why)
        if name == "export" or (name == "evaluate" and self.recipe.publish.keep == "best"):
            job.todo = job.todo[:1]  # the rest needs it
        self._next(job)

    def _next(self, job: Job) -> None:
        job.todo, job.since, job.pause = job.todo[1:], 0.0, 0.0
        if not job.todo:
            del self.jobs[job.step]
            shutil.rmtree(policy_folder(self.run_dir, job.step), ignore_errors=True)
            self._answer(job, "finished")

    def _answer(self, job: Job, event: str, **more: Any) -> None:
        self._say({"step": job.step, "event": event, **more})

    def _say(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        while line:  # the trainer reads between its steps
            line = line[os.write(self._answers, line) :]


def policy_folder(run_dir: str | Path, step: int) -> Path:
    """Where the policy of a checkpoint is while it is worked on."""
    return Path(run_dir) / POLICIES / f"step-{step:08d}"


def evaluation_file(run_dir: str | Path, step: int) -> Path:
    """The evaluation of a checkpoint's policy. It stays."""
    return Path(run_dir) / "evaluations" / f"step-{step:08d}" / EVALUATION


def export(run_dir: Path, recipe: Recipe, step: int) -> None:
    """Write a checkpoint as a policy."""
    from tiphys.launch.finish import export_policy
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.model.config import DecisionConfig

    about = json.loads((run_dir / POLICY).read_text(encoding="utf-8"))
    config = DecisionConfig(**{key: value for key, value in about["config"].items() if key != "auto_map"})
    source = Checkpoint.open(folder_of(run_dir, step))
    export_policy(recipe, config, about["processor"], source, policy_folder(run_dir, step))


def publish(run_dir: Path, recipe: Recipe, step: int, *, evaluated: bool) -> None:
    """Publish an exported policy, with its evaluation if it has one."""
    from tiphys.launch.finish import publish_policy
    from tiphys.pretrain.publish import add_evaluation

    folder, found = policy_folder(run_dir, step), None
    if evaluated:
        found = json.loads(evaluation_file(run_dir, step).read_text(encoding="utf-8"))
        add_evaluation(folder, found)
    elif recipe.publish.keep == "best":
        raise Explained("it was not evaluated, and publish.keep is best")
    publish_policy(recipe, folder, found, final=False)


def _environment(devices: str) -> dict[str, str]:
    """That of this process, with these GPUs (`CUDA_VISIBLE_DEVICES`)."""
    return child_environment() | {"CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a task and everything that it started."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def _last_words(file: Path) -> str:
    """The last line that a task wrote to stderr, which is its error."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        opened.seek(max(0, os.path.getsize(file) - _LAST_WORDS))
        lines = opened.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("tiphys: ").strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _low_priority() -> None:
    """Training goes before: on the cores, on the disk, and when memory is short."""
    import psutil

    os.nice(19)
    with contextlib.suppress(psutil.Error, AttributeError, OSError):  # not every system has priorities of the disk
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


def serve(side: SideProcess) -> None:
    """Run the loop at low priority. At its end this process and all its tasks are killed: it leads their group."""
    _low_priority()
    try:
        side.run()
    except BrokenPipeError:
        pass  # the trainer is gone
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


def main(words: Sequence[str]) -> int:
    run_dir = Path(words[0])
    if len(words) == 1:
        serve(SideProcess(run_dir, sys.stdin.fileno(), sys.stdout.fileno()))
    task, step, recipe = words[1], int(words[2]), load_recipe(run_dir / "recipe.yaml")
    try:
        if task == "export":
            export(run_dir, recipe, step)
        else:
            publish(run_dir, recipe, step, evaluated="evaluated" in words[3:])
    except Exception as error:
        status = status_of(error)
        show(error, status)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
