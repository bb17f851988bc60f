"""`TrajectoryLoader`: finished batches of the sampling plan, made ahead of time in a process of its own.

The trainer's side. The loader process (`loader_process.py`) is started fresh, never forked, and imports no torch. It ends with
the trainer however that ends; if it dies itself it is started again at the step that was to come, which is exact because the
plan is a pure function.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import Needs, Window
from tiphys.dataio.loading import shared_memory
from tiphys.dataio.peers import PeerSettings

if TYPE_CHECKING:
    from tiphys.dataio.placement import Home
    from tiphys.dataio.sampling import SamplingPlan

log = logging.getLogger(__name__)

MakeBatch = Callable[[int, np.ndarray, list[list[Window]]], dict[str, np.ndarray]]
_RESTARTS = 3  # of a loader process that dies without handing over a batch in between
# Arrays of some hundred KiB come and go all the time: from the heap they cost a third less than as fresh pages (mallopt(3))
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# obstore's threads: handing requests from one to another costs a third of a small request's time, so few where cores are few
_THREADS = {"TOKIO_WORKER_THREADS": str(max(1, (os.cpu_count() or 1) // 8))}
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tiphys.dataio.loading.process import main; main()"
)


@dataclass(frozen=True)
class CacheBudget:
    """What one loader may hold of its data: bytes in memory, bytes on disk, and the folder for the latter.

    inherited  folders that earlier loaders of this node left, which no loader goes on with: read for peers, never written
    """

    memory: int = 1 << 30
    disk: int = 0
    dir: str = ""
    inherited: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoaderSettings:
    """All that a loader process is told when it starts."""

    plan: SamplingPlan
    home: Home
    make_batch: MakeBatch
    needs: tuple[Needs, ...]
    tasks: tuple[np.ndarray, ...] | None
    cache: CacheBudget
    requests: int
    timeout: float
    attempts: int
    prefetch: int
    run: int
    peers: PeerSettings | None
    step: int
    stop: int | None


@dataclass
class LoadedBatch:
    """One step's rows of this process.

    arrays       what make_batch returned, in shared memory: valid until `release()`
    counters     what it cost: bytes delivered, and served from memory, disk, peers and store; requests, retries; seconds of each
                 stage and of the trainer's `wait`; hit rate beside its bound; look-ahead; resident bytes; how random it was
    quarantined  episodes that could not be read, with the windows drawn in their place: the trainer puts them into the plan's
                 log from a later step on
    """

    step: int
    arrays: dict[str, np.ndarray]
    counters: dict[str, float]
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    _release: Callable[[], None] | None = None

    def release(self) -> None:
        """Give the memory back. What still views `arrays` sees later batches from now on."""
        if self._release is not None:
            self.arrays = {}
            self._release()
            self._release = None


class TrajectoryLoader:
    """Iterator of LoadedBatch for steps [start, stop) of a plan: this home's rows, in order, each exactly once.

    make_batch  picklable; called in the loader process with (step, rows int64 [n], each row's windows in slot order)
    needs       what each line of the mixture asks of an episode
    tasks       one an entry: task of its dataset -> the task's number in the run's list (None: as in the dataset)
    cache       bytes that this loader may hold of the data
    requests    range requests in flight
    timeout     seconds without a byte after which a request is made again
    attempts    most tries of one request
    prefetch    bytes of finished batches that may wait
    peers       lets other processes read this loader's cache (`peer_address`, `connect_peers`)
    run         rows that are fetched and cached as one; 0: chosen from what bytes and requests cost
    on_memory   called with each newly mapped piece of shared memory (uint8 array), to pin it for a GPU

    `__next__` raises what went wrong in the loader process, with its traceback as a note. Context manager; also closed by
    garbage collection and at exit.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        home: Home,
        make_batch: MakeBatch,
        needs: Sequence[Needs],
        *,
        tasks: Sequence[np.ndarray] | None = None,
        cache: CacheBudget | None = None,
        requests: int = 64,
        timeout: float = 10.0,
        attempts: int = 8,
        prefetch: int = 256 << 20,
        run: int = 0,
        peers: PeerSettings | None = None,
        start: int = 0,
        stop: int | None = None,
        on_memory: Callable[[np.ndarray], None] | None = None,
    ):
        self.plan, self.home, self.make_batch, self.needs = plan, home, make_batch, tuple(needs)
        self.tasks = None if tasks is None else tuple(np.asarray(t) for t in tasks)
        self.cache, self.prefetch, self.run = cache or CacheBudget(), prefetch, run
        self.requests, self.timeout, self.attempts = requests, timeout, attempts
        self.step, self.stop, self.on_memory = start, stop, on_memory
        self.peers, self._peer_address = peers, ""
        # A process that has peers waits for this before its first request: for their addresses, or for being asked for a batch
        self._connected: dict[str, Any] | None = None
        self._process: _Process | None = None
        self._failures = 0
        self._changes: list[int] = []  # the first step that each change of the plan touched, since the process started
        self._horizon = start

    def _settings(self) -> LoaderSettings:
        return LoaderSettings(
            self.plan, self.home, self.make_batch, self.needs, self.tasks, self.cache, self.requests, self.timeout,
            self.attempts, self.prefetch, self.run, self.peers, self.step, self.stop,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What will be cached of what, in which pieces, and the best possible hit rate; starts nothing."""
        from tiphys.dataio.loading.sizing import sized
        from tiphys.dataio.placement import Placement

        settings = self._settings()
        return sized(self.plan, Placement(self.plan, self.home), settings).describe(settings)

    def start(self) -> None:
        """Start the loader process, if it does not run; `__next__` does so too."""
        if self._process is None:
            self._process = _Process(self._settings())
            self._changes = []
            if self._connected is not None:
                self._process.send(self._connected)

    def __iter__(self) -> TrajectoryLoader:
        return self

    def __next__(self) -> LoadedBatch:
        if self.stop is not None and self.step >= self.stop:
            raise StopIteration
        began = time.monotonic()
        if self.peers is not None and self._connected is None:
            self.connect_peers([])
        while "slot" not in (message := self._receive()):
            pass
        slot, memory = message["slot"], None
        process = self._process
        assert process is not None
        memory, new = process.reader.memory(slot, message["bytes"])
        if new and self.on_memory is not None:
            self.on_memory(memory)
        arrays = process.reader.arrays(memory, message["places"])
        counters = {**message["counters"], "wait": time.monotonic() - began}
        self.step, self._failures = message["step"] + 1, 0
        return LoadedBatch(
            message["step"], arrays, counters, message["quarantined"], lambda: process.send({"release": slot})
        )

    def _receive(self) -> dict[str, Any]:
        """The next batch's message. A process that died is started again; an error it sent is raised."""
        while True:
            self.start()
            assert self._process is not None
            try:
                message = self._process.connection.recv()
            except (EOFError, OSError):
                self._died()
                continue
            if "peer" in message:
                self._peer_address = message["peer"]
                return message
            if "error" in message:
                self.close()
                raise message["error"]
            if all(message["step"] < first for first in self._changes[message["generation"] :]):
                self._horizon = message["horizon"]
                return message
            self._process.send({"release": message["slot"]})  # made before the plan changed

    def _died(self) -> None:
        assert self._process is not None
        code = self._process.close()
        self._process = None
        self._failures += 1
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        if self._failures > _RESTARTS:
            raise RuntimeError(
                f"the loader process ended {how} {self._failures} times in a row at step {self.step}; "
                "signal 9 usually means that memory ran out: lower data.cache.memory or data.prefetch"
            )
        log.warning("the loader process ended %s; starting it again at step %d", how, self.step)

    @property
    def peer_address(self) -> str:
        """`host:port` under which other loaders may read this one's cache; starts the process."""
        if self.peers is None:
            raise ValueError("this loader was made without PeerSettings")
        if not self._peer_address:
            self._receive()
        return self._peer_address

    def connect_peers(self, addresses: Sequence[str], homes: Sequence[Home] | None = None) -> None:
        """After a change of the world's size: ask these before the store, as long as they answer.

        addresses  `peer_address` of whoever serves what a process of the world that was has kept; empty where nobody does
        homes      of those processes; None: processes 0, 1, … of as many as there are addresses
        """
        if homes is not None and len(homes) != len(addresses):
            raise ValueError(f"{len(addresses)} addresses of peers, but {len(homes)} homes")
        self._connected = {"peers": list(addresses), "homes": None if homes is None else list(homes)}
        if self._process is not None:
            self._process.send(self._connected)

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Put events into the plan's log, here and in the loader process. Batches made too early are made again.

        ValueError for an event in force from a step that was already handed over, or one that brings a new data set: what
        is needed of its episodes is not known here.
        """
        self._check(events)
        for event in events:
            if event["step"] < self.step:
                raise ValueError(f"the plan cannot change at step {event['step']}: step {self.step} comes next")
            self.plan.log.append(event)
        self._announce(list(events))

    def refresh(self) -> list[dict[str, Any]]:
        """Adopt events that the log's file gained, and return them. ValueError where a new data set is among them."""
        events = self.plan.log.refresh()
        try:
            self._check(events)
        except ValueError:
            self.close()  # it would go on without them
            raise
        self._announce(events)
        return events

    @staticmethod
    def _check(events: Sequence[Mapping[str, Any]]) -> None:
        if any(event["kind"] == "dataset" for event in events):
            raise ValueError("a data set joins the mixture: make a new loader, with what is needed of its episodes")

    @property
    def horizon(self) -> int:
        """The first step that is not being made yet: a change in force from there costs no work."""
        return max(self._horizon, self.step)

    def _announce(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self._process is not None and events:
            self._changes.append(min(e["step"] for e in events))
            self._process.send({"events": [dict(e) for e in events], "generation": len(self._changes)})

    def state_dict(self) -> dict[str, Any]:
        """The step that comes next, and the plan's log: all that an exact resume needs, on any number of homes."""
        return {**self.plan.state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        self.plan.load_state_dict(state)
        self.step = int(state["step"])

    def close(self) -> None:
        """End the loader process. Batches that were handed over stay readable."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> TrajectoryLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """A running loader process, the connection to it, and the memory shared with it."""

    def __init__(self, settings: LoaderSettings):
        _fill_standard_streams()
        ours, theirs = socket.socketpair()
        memory = shared_memory.create()
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                env={**_MALLOC, **_THREADS, **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.connection = Connection(ours.detach())
        self.reader = shared_memory.SlotReader(memory)
        self._close = weakref.finalize(self, _end, self.popen, self.connection, memory)
        with contextlib.suppress(OSError):  # a process that died at once is found out by the next receive
            self.connection.send_bytes(pickle.dumps(settings, protocol=5))

    def send(self, message: dict[str, Any]) -> None:
        """Nothing where the process is gone: the next receive finds out."""
        if not self.connection.closed:
            with contextlib.suppress(OSError):
                self.connection.send(message)

    def close(self) -> int:
        self._close()
        return self.popen.returncode


def _fill_standard_streams() -> None:
    """Where a daemon closed its standard streams, let their numbers lead nowhere, here and in children: else a socket would get
    one of them, and what is printed or logged would go through it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _end(popen: subprocess.Popen[bytes], connection: Connection, memory: int) -> None:
    connection.close()  # the process ends when its side of the connection does
    os.close(memory)
    try:
        popen.wait(0.2)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
