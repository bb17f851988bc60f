"""Ranks for tests: one script in n processes, started directly (fast) or by the real `deepspeed` launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiphys.pretrain.parallel import ParallelDims

REPOSITORY = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONSAFEPATH": "1",  # so that the folder of a script is not on the path
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def alone() -> ParallelDims:
    """This process as the only rank, without a launcher. DeepSpeed cannot be started a second time in it."""
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.recipes.sections.training import Parallel

    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        return ParallelDims(Parallel())
    finally:  # for processes that later tests start; DeepSpeed reads LOCAL_RANK for every engine
        os.environ.clear()
        os.environ.update(before | {"LOCAL_RANK": "0"})


class Ranks:
    """n processes of one script, with the environment variables of torch.distributed."""

    def __init__(self, script: str | Path, arguments: Sequence[object], ranks: int) -> None:
        port = free_port()
        self.outputs, self.processes = [], []
        for rank in range(ranks):
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the test)
            env = environment() | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, str(script), *map(str, arguments)]
            self.outputs.append(output)
            self.processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))

    def wait(self, timeout: float = 300.0) -> list[int]:
        """Wait for the exit statuses. If a process fails, the others are killed, because they might wait for it."""
        try:
            pending = list(self.processes)
            while pending:
                for process in list(pending):
                    try:
                        status = process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        timeout -= 0.05
                        if timeout < 0:
                            raise AssertionError(f"still running:\n{self.text()}") from None
                        continue
                    pending.remove(process)
                    if status:
                        self.kill()
        finally:
            self.kill()
        return [int(p.returncode) for p in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self) -> str:
        parts = []
        for rank, output in enumerate(self.outputs):
            output.seek(0)
            parts.append(f"--- rank {rank}\n{output.read()[-6000:]}")
        return "\n".join(parts)


def run(script: str | Path, arguments: Sequence[object], ranks: int, timeout: float = 300.0) -> str:
    """Run a script to its end on n ranks and return their output. Raises AssertionError, with the output, if a rank fails."""
    started = Ranks(script, arguments, ranks)
    statuses = started.wait(timeout)
    text = started.text()
    assert not any(statuses), f"exit statuses {statuses}\n{text}"
    return text


def launch(script: str | Path, arguments: Sequence[object], ranks: int, timeout: float = 300.0) -> str:
    """Like `run`, with the `deepspeed` launcher."""
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), "--no_local_rank"]
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env=environment(),
        timeout=timeout,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
