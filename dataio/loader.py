"""`TrajectoryLoader`: finished batches of the sampling plan, made ahead of time in a process of its own.

This file is the trainer's side. The other side is the loader process (`loading/process.py`). It is spawned, never forked, and
imports no torch. It ends when the trainer ends, in whatever way that happens. If the loader process itself dies, it is started
again at the next step. This gives the same batches, because the plan is a pure function.
"""

from __future__ import annotations

import contextlib
import json
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
from tiphys.dataio.errors import Explained
from tiphys.dataio.loading import shared_memory
from tiphys.dataio.loading.decode_note import CRASHES, DecodeNote
from tiphys.dataio.messages import logger
from tiphys.dataio.peers import PeerSettings
from tiphys.dataio.python_path import child_environment, python

if TYPE_CHECKING:
    from tiphys.dataio.placement import Home
    from tiphys.dataio.plan.entries import PlanEntry
    from tiphys.dataio.sampling import SamplingPlan

log = logger(__name__)

Join = Callable[[Sequence["PlanEntry"]], "Joined"]
MakeBatch = Callable[[int, np.ndarray, list[list[Window]]], dict[str, np.ndarray]]
_RESTARTS = 3  # of a loader process that dies before it hands over a batch
_MOST_DEADLY = 8  # episodes whose decoding ended the process; after so many, something else is wrong
# Arrays of some hundred KiB come and go all the time. From the heap they cost a third less than as fresh pages (mallopt(3)).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# Passing a request from one obstore thread to another costs a third of a small request's time: use few threads on few cores.
_THREADS = {"TOKIO_WORKER_THREADS": str(max(1, (os.cpu_count() or 1) // 8))}
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tiphys.dataio.loading.process import main; main()"
)


class LoaderLost(Explained, RuntimeError):
    """The loader process ended by itself, several times."""


@dataclass(frozen=True)
class CacheBudget:
    """How much of the data one loader may cache, and where.

    Attributes
    ----------
    memory : int
        Bytes in memory.
    disk : int
        Bytes on disk, in `dir`; 0: memory only.
    dir : str
        Folder of the disk cache. Only one loader at a time may use it.
    inherited : tuple of str
        Cache folders that earlier loaders of this node left and that no loader uses now. They are read for peers and never
        changed.
    """

    memory: int = 1 << 30
    disk: int = 0
    dir: str = ""
    inherited: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader does its work. No setting changes what is in the batches.

    Attributes
    ----------
    cache : CacheBudget
        How much of the data the loader may cache.
    requests : int
        Most range requests in flight to each dataset's store.
    timeout : float
        Seconds without a byte after which a request is made again.
    attempts : int
        Most tries of one request.
    prefetch : int
        Bytes of shared memory for finished batches, both those that wait for the trainer and those that it holds. There is
        always room for two batches.
    unit_rows : int
        Rows (steps of an episode) that are fetched and cached as one unit; 0: chosen from what bytes and requests cost
        (`loading/unit_rows.py`). A disk cache is discarded if this changes.
    """

    cache: CacheBudget = CacheBudget()
    requests: int = 64
    timeout: float = 10.0
    attempts: int = 8
    prefetch: int = 256 << 20
    unit_rows: int = 0


@dataclass(frozen=True)
class Joined:
    """What a loader must know of entries that join the mixture while it runs.

    Attributes
    ----------
    needs : sequence of Needs
        One for each of these entries.
    tasks : sequence of ndarray
        One for each: task of its dataset -> the task's number in the run's list.
    make_batch : callable
        As `make_batch` of the loader; it knows the windows of all entries, old and new.
    """

    needs: Sequence[Needs]
    tasks: Sequence[np.ndarray]
    make_batch: MakeBatch


@dataclass(frozen=True)
class ProcessSpec:
    """All that a loader process is told when it starts: TrajectoryLoader's arguments, and the step at which to begin."""

    plan: SamplingPlan
    home: Home
    make_batch: MakeBatch
    needs: tuple[Needs, ...]
    tasks: tuple[np.ndarray, ...] | None
    settings: LoaderSettings
    peers: PeerSettings | None
    step: int
    stop: int | None
    deadly: Mapping[tuple[str, int], str] = field(default_factory=dict)  # as in `loading.assemble.Assembler`


@dataclass
class LoadedBatch:
    """The rows of one training step that this process computes.

    Attributes
    ----------
    step : int
        The training step.
    arrays : dict of str to ndarray
        What `make_batch` returned. The arrays lie in shared memory and are valid until `release()`.
    counters : dict of str to float
        What the step cost. Sums of one step, except names that end in `_rate` or `_bound`. `bytes_delivered`: bytes that the
        windows need; `bytes_memory`, `bytes_disk`, `bytes_missed`: found in the cache's memory, on its disk, or not there;
        `bytes_peer`, `bytes_store`: received from peers and from the store; `requests`, `retries`, `throttled`: requests to
        the store; `*_seconds`: time of each stage; `wait`: seconds that the trainer waited; `cache_hit_rate` with the best
        possible `cache_hit_bound`; `look_ahead_steps`, `queue_steps`: steps that are planned and begun ahead; `cache_bytes`,
        `resident_bytes`: memory in use; `distinct_rate`: distinct episodes a window, over the last 256 windows.
    quarantined : list of dict
        One event for each episode that could not be read; another window was drawn for each of its windows. The trainer puts
        the events into the plan's log, in force from a later step on.
    """

    step: int
    arrays: dict[str, np.ndarray]
    counters: dict[str, float]
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    _release: Callable[[], None] | None = None

    def release(self) -> None:
        """Give the shared memory back. From now on, views of `arrays` that are still held show later batches."""
        if self._release is not None:
            self.arrays = {}
            self._release()
            self._release = None


class TrajectoryLoader:
    """Iterator of the batches of steps [start, stop) of a plan: the rows of one home, in order, each exactly once.

    A loader is a context manager. It is also closed by garbage collection and when the program exits.

    Parameters
    ----------
    plan : SamplingPlan
        Which windows each row of each step holds.
    home : Home
        Which rows of the global batch this process computes.
    make_batch : callable
        `(step, rows, windows) -> dict of name to ndarray`; `rows` int64 [n]: numbers of rows of the global batch; `windows`:
        a list of `Window` for each row, in slot order. It must be picklable, and it runs in the loader process. Arrays must
        be plain memory (no objects, no strings).
    needs : sequence of Needs
        One for each mixture entry: which fields of an episode it needs, and how many rows after a window.
    tasks : sequence of ndarray, optional
        One for each mixture entry: int array from a task of its dataset to the task's number in the run's list. Default: the
        dataset's own numbers.
    settings : LoaderSettings, optional
        Cache, requests, prefetching.
    join : callable, optional
        `(entries) -> Joined`: what the loader must know of the entries that `dataset` events of the plan's log add, all of
        them, in the plan's order.
    peers : PeerSettings, optional
        Lets other loaders read this loader's cache (see `peer_address`, `connect_peers`).
    start, stop : int
        First step, and the step before which the iteration ends (None: it never ends).
    on_memory : callable, optional
        Called with each newly mapped piece of shared memory (uint8 array), for example to pin it for a GPU.

    Raises
    ------
    Exception
        `next()` raises what went wrong in the loader process, with its traceback as a note: for example `DataError` if too
        many windows cannot be read, `StoreError` if the store cannot be reached, and every error of `make_batch`.
    LoaderLost
        `next()` raises it if the loader process dies several times in a row without a batch in between.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        home: Home,
        make_batch: MakeBatch,
        needs: Sequence[Needs],
        *,
        tasks: Sequence[np.ndarray] | None = None,
        settings: LoaderSettings | None = None,
        join: Join | None = None,
        peers: PeerSettings | None = None,
        start: int = 0,
        stop: int | None = None,
        on_memory: Callable[[np.ndarray], None] | None = None,
    ):
        self.plan, self.home, self.make_batch, self.needs = plan, home, make_batch, tuple(needs)
        self.tasks = None if tasks is None else tuple(np.asarray(t) for t in tasks)
        self.settings, self.peers, self.on_memory = settings or LoaderSettings(), peers, on_memory
        self.join = join
        self.step, self.stop = start, stop
        self._peer_address = ""
        # A process with peers waits for this before its first request: for their addresses, or for the first call of next()
        self._connected: dict[str, Any] | None = None
        self._process: _Process | None = None
        self._failures = 0
        self._deadly: dict[tuple[str, int], str] = {}
        self._changes: list[int] = []  # the first step that each change of the plan touched, since the process started
        self._horizon = start

    def _spec(self) -> ProcessSpec:
        make_batch, needs, tasks = self.make_batch, self.needs, self.tasks
        added = self.plan.entries[len(needs) :]
        if added:
            if self.join is None:
                raise ValueError("the plan's log adds datasets to the mixture, and this loader was made without `join`")
            joined = self.join(added)
            make_batch, needs = joined.make_batch, (*needs, *joined.needs)
            tasks = None if tasks is None else (*tasks, *joined.tasks)
        return ProcessSpec(
            plan=self.plan,
            home=self.home,
            make_batch=make_batch,
            needs=needs,
            tasks=tasks,
            settings=self.settings,
            peers=self.peers,
            step=self.step,
            stop=self.stop,
            deadly=dict(self._deadly),
        )

    def cache_plan(self) -> dict[str, Any]:
        """How the data will be cut into units and cached, and the best possible hit rate. Starts no process.

        Returns
        -------
        dict
            `data_bytes`, `home_bytes`: bytes of all data and of this home's part; `cache_bytes`: bytes by tier; `units`:
            their number; `unit_rows`: rows of a unit by dataset and field; `policy`, `whole_shards`: how the cache is
            filled; `hit_bound`: best possible share of bytes found in the cache.
        """
        from tiphys.dataio.loading.sizing import sized
        from tiphys.dataio.placement import Placement

        spec = self._spec()
        return sized(Placement(self.plan, self.home), spec).cache_plan(spec)

    def start(self) -> None:
        """Start the loader process if it is not running. `next()` does this too."""
        if self._process is None:
            self._process = _Process(self._spec())
            self._changes = []
            if self._connected is not None:
                self._process.send(self._connected)

    @property
    def pid(self) -> int | None:
        """Number of the loader process; None if it is not running."""
        return None if self._process is None else self._process.popen.pid

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
            step=message["step"],
            arrays=arrays,
            counters=counters,
            quarantined=message["quarantined"],
            _release=lambda: process.send({"release": slot}),
        )

    def _receive(self) -> dict[str, Any]:
        """The next message. Starts the process again if it died; raises an error that it sent."""
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
            self._process.send({"release": message["slot"]})  # it was made before the plan changed

    def _died(self) -> None:
        assert self._process is not None
        decoding = self._process.note.read()
        code = self._process.close()
        self._process = None
        if decoding is not None and -code in CRASHES and len(self._deadly) < _MOST_DEADLY:
            reason = f"{decoding.place}: its decoder ended the loader process by signal {-code}"
            if self._deadly.setdefault((decoding.dataset, decoding.episode), reason) is reason:
                log.warning(
                    "%s; the episode is left out, and the process is started again at step %d", reason, self.step
                )
                return
        self._failures += 1
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        if self._failures > _RESTARTS:
            raise LoaderLost(
                f"the loader process ended {how} {self._failures} times in a row at step {self.step}. "
                "Signal 9 usually means that memory ran out: lower data.cache.memory or data.prefetch"
            )
        log.warning("the loader process ended %s; starting it again at step %d", how, self.step)

    @property
    def peer_address(self) -> str:
        """`host:port` at which other loaders can read this loader's cache. Starts the process.

        Raises
        ------
        ValueError
            If the loader was made without `peers`.
        """
        if self.peers is None:
            raise ValueError("this loader serves no peers: give PeerSettings as `peers` when it is made")
        if not self._peer_address:
            self._receive()
        return self._peer_address

    def connect_peers(self, addresses: Sequence[str], homes: Sequence[Home] | None = None) -> None:
        """Ask these loaders for missing data before the store is asked. For use after the number of processes has changed.

        Parameters
        ----------
        addresses : sequence of str
            For each process of the earlier launch, the `peer_address` of the loader that serves its cache now; empty: none.
        homes : sequence of Home, optional
            The homes of those processes. Default: processes 0, 1, … of `len(addresses)`.

        Raises
        ------
        ValueError
            If there are not as many homes as addresses.
        """
        if homes is not None and len(homes) != len(addresses):
            raise ValueError(
                f"connect_peers: {len(addresses)} addresses, but {len(homes)} homes; give one home for each address"
            )
        self._connected = {"peers": list(addresses), "homes": None if homes is None else list(homes)}
        if self._process is not None:
            self._process.send(self._connected)

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Put events into the plan's log, here and in the loader process. Batches that were made too early are made again.

        Raises
        ------
        ValueError
            If an event is in force from a step that was already handed over, or if it adds a dataset and the loader has no
            `join`.
        DataError
            If an event does not fit the mixture.
        """
        if self.join is None and any(event["kind"] == "dataset" for event in events):
            raise ValueError("an event adds a dataset to the mixture, and this loader was made without `join`")
        for event in events:
            if event["step"] < self.step:
                raise ValueError(
                    f"the plan cannot change at step {event['step']}: the next step is {self.step}; give a later step"
                )
            self.plan.log.append(event)
        if any(event["kind"] == "dataset" for event in events):
            self.close()  # what is needed of the new episodes is told to a process when it starts
        else:
            self._announce(list(events))

    @property
    def horizon(self) -> int:
        """The first step that has not been begun. A change in force from this step on makes no work useless."""
        return max(self._horizon, self.step)

    def _announce(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self._process is not None and events:
            self._changes.append(min(e["step"] for e in events))
            self._process.send({"events": [dict(e) for e in events], "generation": len(self._changes)})

    def state_dict(self) -> dict[str, Any]:
        """The next step and the plan's log: all that an exact resume needs, on any number of homes."""
        return {**self.plan.state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. Ends the loader process; the next one starts at the step of the state."""
        self.close()
        self.plan.load_state_dict(state)
        self.step = int(state["step"])

    def close(self) -> None:
        """End the loader process. Batches that were handed over remain readable."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> TrajectoryLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """A running loader process, the connection to it, and the memory shared with it."""

    def __init__(self, spec: ProcessSpec):
        _fill_standard_streams()
        ours, theirs = socket.socketpair()
        memory = shared_memory.create()
        with theirs:
            self.popen = subprocess.Popen(
                python("-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(memory)),
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                env={
                    **_MALLOC,
                    **_THREADS,
                    **child_environment(),
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self.connection = Connection(ours.detach())
        self.reader = shared_memory.SlotReader(memory)
        self.note = DecodeNote(memory, shared_memory.NOTE)
        self._close = weakref.finalize(self, _end, self.popen, self.connection, memory)
        with contextlib.suppress(OSError):  # if the process died at once, the next receive notices it
            self.connection.send_bytes(pickle.dumps(spec, protocol=5))

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Does nothing if the process is gone: the next receive notices that."""
        if not self.connection.closed:
            with contextlib.suppress(OSError):
                self.connection.send(message)

    def close(self) -> int:
        self._close()
        self.note.close()
        return self.popen.returncode


def _fill_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed (as in a daemon), here and in children. Otherwise a socket
    could get one of their numbers, and printed or logged text would go through it."""
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
