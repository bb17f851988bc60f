"""What environments declare, found in a process of its own, so that one that hangs or crashes does no harm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.python_path import child_environment, python

LIMIT = 120.0  # seconds in which an environment must have been made
_POLL = 0.1  # seconds


def declared(
    names: Sequence[str],
    modules: Sequence[str] = (),
    limit: float = LIMIT,
    *,
    stop: threading.Event | None = None,
) -> list[TaskSpec | DataError]:
    """The TaskSpec of each environment, or why it cannot be made: it does not exist, raises, crashes, or takes too long.

    The environments are made in one child process. If one ends it, the others are made in another.

    names    of the environments, as for `tiphys.dataio.environments.make`
    modules  those that the user allowed (`tiphys.dataio.environments.allow`)
    limit    seconds for each environment
    stop     once it is set, the child is killed; environments that it has not made count as too late
    """
    found: list[TaskSpec | DataError] = []
    stop = stop or threading.Event()
    while len(found) < len(names):
        found += _first(names[len(found) :], modules, limit, stop)
    return found


def _first(
    names: Sequence[str], modules: Sequence[str], limit: float, stop: threading.Event
) -> list[TaskSpec | DataError]:
    """The answers of one child: to all names, or up to the first that ended it."""
    with tempfile.TemporaryDirectory(prefix="tiphys-probe-") as folder:
        log = Path(folder) / "log"
        command = python("-m", __name__, json.dumps([list(names), list(modules), folder]))
        with log.open("wb") as output:  # a file, because a pipe stays open as long as any grandchild lives
            child = subprocess.Popen(
                command,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                late = not _wait(child, folder, limit, stop)
            finally:
                _end(child)
        texts = [_file(folder, i).read_text() for i in range(_answered(folder))]
        found = [_answer(json.loads(text)) for text in texts]
        if len(found) < len(names):
            name, status = names[len(found)], child.returncode
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            said = log.read_text(errors="replace").strip().splitlines()[-1:]
            ended = f"making it ended the process ({how}){''.join(f': {line}' for line in said)}"
            reason = f"it was not made within {limit:g} seconds" if late else ended
            found.append(DataError(f"environment {name!r}: {reason}"))
        return found


def _wait(child: subprocess.Popen[bytes], folder: str, limit: float, stop: threading.Event) -> bool:
    """Whether the child ended without letting an answer take longer than the limit."""
    answered, begun = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL)
            return True
        if _answered(folder) > answered:
            answered, begun = _answered(folder), time.monotonic()
        elif time.monotonic() - begun > limit or stop.is_set():
            return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it started, which form a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number}.json"


def _answered(folder: str) -> int:
    """Number of answers, which are written in order."""
    return sum(1 for _ in Path(folder).glob("*.json"))


def _answer(found: dict[str, str]) -> TaskSpec | DataError:
    return DataError(found["error"]) if "error" in found else TaskSpec(**found)  # type: ignore[arg-type]


def _make_all(names: Sequence[str], modules: Sequence[str], folder: str) -> None:
    """What the child does."""
    from tiphys.dataio import environments

    environments.allow(modules)
    for number, name in enumerate(names):
        try:
            found = environments.spec(name).to_dict()
        except DataError as error:
            found = {"error": str(error)}
        except Exception as error:
            found = {"error": f"environment {name!r} cannot be made: {type(error).__name__}: {error}"}
        part = _file(folder, number).with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(_file(folder, number))


if __name__ == "__main__":
    _make_all(*json.loads(sys.argv[1]))
