"""`<run.dir>/lease.json`: which command trains in a run's folder, so that no second one does.

The file is created exclusively. It names a host, a process and a token that no other command has, and holds a counter that its
owner raises every `PERIOD` seconds. Nobody compares clocks: another process only watches whether the counter changes. On the
machine of the owner, the kernel says whether the owner lives. Elsewhere an owner counts as dead whose counter stays the same for
`MISSES` periods.

Ranks watch the lease as well. They end if it is not renewed, or has another token. Before each manifest of a checkpoint the token
is read again. So a run that lost its lease while its machine was asleep cannot commit anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tiphys.dataio.errors import Explained

PERIOD, MISSES = 2.5, 3  # seconds, renewals
_FILE = "lease.json"
_MOST_BYTES = 1 << 16


class FolderInUse(Explained):
    """Another command trains in the run's folder."""


class LeaseLost(FolderInUse):
    """Another command has taken the run's folder over while this one could not renew its lease."""


@dataclass(frozen=True)
class Record:
    """The content of the file.

    machine   boot and process namespace of the owner: where the number of its process means something
    started   kernel's start time of the owner's process, since process numbers are used again
    since     when the command was started, for people
    counter   raised by each renewal
    launch    number of the launch that may save; ranks of earlier ones end
    stop      a signal that the owner wants the ranks of this launch to act on, or 0
    """

    token: str
    host: str
    process: int
    machine: str
    started: int
    since: str
    counter: int = 0
    launch: int = 0
    stop: int = 0

    def owner(self) -> str:
        return f"host {self.host}, process {self.process}, since {self.since}"

    def alive(self) -> bool | None:
        """Whether the owner's process exists; None if it is on another machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _started(self.process) == self.started


class Lease:
    """A lease that this process owns.

    Raises
    ------
    FolderInUse
        If another living command owns it.
    """

    def __init__(self, run_dir: str | Path, wait: Callable[[float], object] = time.sleep) -> None:
        self.path = Path(run_dir) / _FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.record = Record(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )
        self._renewed = time.monotonic()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        found = read(self.path)
        if found is not None and found.alive() is None:
            _wait_for_renewal(self.path, found, wait)
        with _locked(self.path):
            now = read(self.path)
            if now is not None and not _abandoned(now, found):
                raise _in_use(self.path, now)
            self.path.unlink(missing_ok=True)
            try:
                _create(self.path, self.record)
            except FileExistsError:  # on a file system without locks another command was faster
                raise _in_use(self.path, read(self.path)) from None

    @property
    def token(self) -> str:
        return self.record.token

    def renew(self, *, at_once: bool = False) -> None:
        """Raise the counter, if it is time. A file system that fails is tried again at the next call. Raises LeaseLost."""
        if not at_once and time.monotonic() - self._renewed < PERIOD:
            return
        with contextlib.suppress(OSError), _locked(self.path):
            _owned(self.path.parent, self.token)
            self.record = replace(self.record, counter=self.record.counter + 1)
            _replace(self.path, self.record)
        self._renewed = time.monotonic()

    def begin(self, launch: int) -> None:
        """A launch begins: ranks of earlier ones that are still there, on whatever host, end."""
        self.record = replace(self.record, launch=launch, stop=0)
        self.renew(at_once=True)

    def stop(self, number: int) -> None:
        """Ask all ranks, on all hosts, to act as if they had got a signal."""
        self.record = replace(self.record, stop=number)
        self.renew(at_once=True)

    def keep(self) -> None:
        """Renew in a thread, until `release`."""

        def renew() -> None:
            while not self._ended.wait(PERIOD / 5):
                try:
                    self.renew()
                except LeaseLost:
                    return  # `Watch` of this process ends it

        self._thread = threading.Thread(target=renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError), _locked(self.path):
            found = read(self.path)
            if found is not None and found.token == self.token:
                self.path.unlink(missing_ok=True)


class Watch:
    """A rank's view of the lease of its run.

    lost   called once, from a thread, with a sentence, if the lease is no longer renewed or has another owner
    stop   called once for each signal that the owner asks for, from a thread
    also   called once in each period
    """

    def __init__(
        self,
        run_dir: str | Path,
        token: str,
        launch: int,
        lost: Callable[[str], None],
        stop: Callable[[int], None],
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.token, self.launch = Path(run_dir) / _FILE, token, launch
        self._lost, self._stop, self._also, self._ended = lost, stop, also, threading.Event()
        self._counter, self._missed, self._stopped = -1, 0, 0
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            self._also()
            if why := self.look():
                self._lost(why)
                return

    def look(self) -> str:
        """Read the file once. Returns why the run is over, or an empty string.

        A file that cannot be read is no missed renewal: the folder's file system may be the one that is slow.
        """
        try:
            found = read(self.path)
        except OSError:
            return ""
        if found is not None and found.token != self.token:
            return f"the run was taken over by {found.owner()}"
        if found is not None and found.launch != self.launch:
            return f"launch {self.launch} was replaced by launch {found.launch}"
        if found is not None and found.stop and found.stop != self._stopped:
            self._stopped = found.stop
            self._stop(found.stop)
        if found is not None and (found.counter != self._counter or found.alive()):
            self._counter, self._missed = found.counter, 0
            return ""
        self._missed += 1
        return "the command that started this run has ended" if self._missed >= MISSES else ""


def check(run_dir: str | Path, token: str, launch: int) -> None:
    """Raises LeaseLost if the lease of a run has another token or is for another launch. OSError if it cannot be read."""
    found = _owned(run_dir, token)
    if found.launch != launch:
        raise LeaseLost(f"{run_dir}: launch {launch} was replaced by launch {found.launch}, so it saves nothing more")


def _owned(run_dir: str | Path, token: str) -> Record:
    found = read(Path(run_dir) / _FILE)
    if found is None or found.token != token:
        who = "another command" if found is None else found.owner()
        raise LeaseLost(f"{run_dir}: the run was taken over by {who}, so this process saves nothing more")
    return found


def read(path: Path) -> Record | None:
    """The lease in a file; None if there is no file, or nothing that is a lease."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES))
        return Record(**{name: kind(values[name]) for name, kind in _KINDS.items()})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


_KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("token", "host", "machine", "since"), str),
    **dict.fromkeys(("process", "started", "counter", "launch", "stop"), int),
}


def _abandoned(now: Record, before: Record | None) -> bool:
    """Whether the owner of a lease is dead. `before`: the lease some periods ago."""
    alive = now.alive()
    if alive is not None:
        return not alive
    return before is not None and (now.token, now.counter) == (before.token, before.counter)


def _wait_for_renewal(path: Path, found: Record, wait: Callable[[float], object]) -> None:
    """Raises FolderInUse as soon as an owner on another machine renews. Returns if it misses its renewals."""
    for _ in range(2 * (MISSES + 1)):
        wait(PERIOD / 2)
        now = read(path)
        if now is None:
            return
        if not _abandoned(now, found):
            raise _in_use(path, now)


def _in_use(path: Path, record: Record | None) -> FolderInUse:
    who = record.owner() if record is not None else "another command"
    return FolderInUse(f"{path.parent} is trained by {who}; stop it, or use another run.dir")


def _create(path: Path, record: Record) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)))
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, record: Record) -> None:
    """Not synced: after a power failure there is no owner."""
    temporary = path.with_name(f".{_FILE}.{record.token}.tmp")
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks. Without them the exclusive creation still decides."""
    with open(path.with_name(f".{_FILE}.lock"), "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _machine() -> str:
    """Two processes with the same value can see each other's process numbers. Empty where the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> int:
    """The kernel's start time of a process; -1 if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return -1
    except OSError:
        return 0
    return -1 if fields[0] == "Z" else int(fields[19])
