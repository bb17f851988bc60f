"""What an environment declares, found in a process of its own, so that one that hangs or crashes does no harm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tiphys.dataio.episode import DataError, TaskSpec

LIMIT = 120.0  # seconds in which an environment must have been made


def declared(name: str, modules: Sequence[str] = (), limit: float = LIMIT) -> TaskSpec:
    """The TaskSpec of an environment, which is made once, in a child process.

    name     of the environment, as for `tiphys.dataio.environments.make`
    modules  those that the user allowed (`tiphys.dataio.environments.allow`)
    limit    seconds after which the child is ended

    Raises DataError if the environment does not exist, raises, crashes, or takes longer.
    """
    with tempfile.TemporaryDirectory(prefix="tiphys-probe-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, "-m", __name__, json.dumps([name, list(modules), str(answer)])]
        with log.open("wb") as output:  # a file, because a pipe stays open as long as any grandchild lives
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                raise DataError(f"environment {name!r} was not made within {limit:g} seconds") from None
            finally:
                _end(child)
        if not answer.is_file():
            said = log.read_text(errors="replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise DataError(
                f"environment {name!r}: making it ended the process ({how}){': ' + said[-1] if said else ''}"
            )
        found = json.loads(answer.read_text())
    if "error" in found:
        raise DataError(found["error"])
    return TaskSpec(**found)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it started, which form a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _answer(name: str, modules: Sequence[str], file: str) -> None:
    from tiphys.dataio import environments

    environments.allow(modules)
    try:
        found = environments.spec(name).to_dict()
    except DataError as error:
        found = {"error": str(error)}
    except Exception as error:
        found = {"error": f"environment {name!r} cannot be made: {type(error).__name__}: {error}"}
    part = Path(f"{file}.part")
    part.write_text(json.dumps(found))
    part.rename(file)


if __name__ == "__main__":
    _answer(*json.loads(sys.argv[1]))
