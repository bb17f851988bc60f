"""The loader process: plans ahead, fetches what the cache lacks, decodes, makes batches, and hands them over in plan order.

One thread with an event loop does the work. Transfers continue in obstore's own threads while rows are decoded. A second thread
listens to the trainer, and ends the process as soon as the trainer has ended, in whatever way.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.cache import Block, RangeCache
from tiphys.dataio.caching.tiers import InheritedTier
from tiphys.dataio.episode import BadValue, Window
from tiphys.dataio.loading import decode_note, shared_memory
from tiphys.dataio.loading.ahead import Ahead
from tiphys.dataio.loading.assemble import Assembler
from tiphys.dataio.loading.counters import Counters
from tiphys.dataio.loading.fetch import Fetcher
from tiphys.dataio.loading.homes import home_units
from tiphys.dataio.loading.mending import Mender
from tiphys.dataio.loading.neighbours import Neighbours, on_hubs
from tiphys.dataio.loading.sizing import most_staging, sized
from tiphys.dataio.loading.stream import FLYING, stream
from tiphys.dataio.loading.units import Span, UnitRanges
from tiphys.dataio.peers import Peers, PeerServer
from tiphys.dataio.placement import Home, Placement, data_share
from tiphys.dataio.plan.log import PlanLog

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.loader import ProcessSpec
    from tiphys.dataio.sampling import PlannedWindows

_AHEAD = 64  # most training steps that are begun and not finished


@dataclass
class Work:
    """A training step that is begun and not finished."""

    step: int
    rows: np.ndarray
    planned: PlannedWindows
    spans: list[Span]
    ranges: list[UnitRanges]
    block: Block
    fetched: asyncio.Task[dict[int, Exception]]
    generation: int  # of the plan: how many changes of it were known
    counters: dict[str, float] = field(default_factory=dict)


class LoaderProcess:
    """Makes the batches of a spec's steps and writes them into the slots of shared memory."""

    def __init__(self, spec: ProcessSpec, connection: Connection, memory: int):
        self.spec, self.settings, self.connection = spec, spec.settings, connection
        self.plan = spec.plan
        self.plan.log = PlanLog(events=self.plan.log.events)  # only the trainer writes the log's file, if there is one
        self.placement = Placement(self.plan, spec.home)
        self.slots = shared_memory.SlotWriter(memory, self.settings.prefetch)
        sizing = sized(self.placement, spec)
        self.units, self._staging, self._home = sizing.units, sizing.staging, sizing.home
        self._piece = sizing.piece
        note = decode_note.DecodeNote(memory, shared_memory.NOTE)
        self.assembler = Assembler(self.units, spec.tasks, note, spec.deadly)
        self.fetcher = Fetcher(self.units, self.settings.requests, self.settings.timeout, self.settings.attempts)
        self.step, self.generation = spec.step, 0  # step: the next one to be handed over
        self.ahead = Ahead(self.plan, self.placement, self.units, _AHEAD)
        self.mender = Mender(
            self.plan,
            self.units,
            self.fetcher,
            self.assembler,
            lambda unit, data: self.cache.correct(unit, data),
            lambda step, row, window: self.spec.make_batch(step, np.array([row]), [[window]]),
        )
        self.counters = Counters(self.fetcher)
        self._freed = asyncio.Event()
        self._messages: list[dict[str, Any]] = []
        self._changed = asyncio.Event()  # tells `run` to look at messages and tasks again
        self._connected = asyncio.Event()
        self._begun = asyncio.Event()  # a step has been handed over
        self.cache = self._new_cache(self.step)
        self._neighbours = self._new_neighbours()

    def _new_neighbours(self) -> Neighbours | None:
        """None if all data is streamed anyway, or no data is on a hub."""
        if self._piece or not on_hubs(self.units):
            return None
        return Neighbours(self.units, self.fetcher, self.cache, home_units(self.placement, self.units, self.step))

    def _new_cache(self, start: int) -> RangeCache:
        budget = self.settings.cache
        return RangeCache(
            self.units.units,
            self.units.sizes,
            self.ahead.wanted,
            total=self._home,
            memory=budget.memory - FLYING * self._piece,
            disk=budget.disk,
            directory=budget.dir,
            fingerprint=self._layout(),
            start=start,
            stop=self.spec.stop,
            pin=not self.plan.replacement,
            staging=self._staging,
        )

    # Messages of the trainer

    def hear(self, message: dict[str, Any]) -> None:
        if "peers" in message:
            if message["peers"]:
                self._connect(message["peers"], message["homes"])
            self._connected.set()
        elif "release" in message:
            self.slots.release(message["release"])
            self._freed.set()
        else:
            self._messages.append(message)
            self._changed.set()

    # Peers

    async def serve_peers(self) -> str:
        """Let other loaders read this process's cache. Returns the address."""
        assert self.spec.peers is not None
        opened = (InheritedTier.open(folder, self._layout()) for folder in self.settings.cache.inherited)
        inherited = [tier for tier in opened if tier is not None]

        def read(unit: int) -> Buffer | None:
            if (found := self.cache.peek(unit)) is not None or not 0 <= unit < self.units.units or not inherited:
                return found
            size = int(self.units.sizes(np.array([unit]))[0])
            return next((data for tier in inherited if (data := tier.read(unit, size)) is not None), None)

        return await PeerServer(self.spec.peers, self._layout(), read).start()

    def _connect(self, addresses: list[str], homes: list[Home] | None) -> None:
        """Ask peers for missing units: for each bucket, the one that was home to most of it."""
        assert self.spec.peers is not None
        owners, most = np.full(self.plan.buckets, -1), np.zeros(self.plan.buckets)
        homes = homes or [Home(number, len(addresses)) for number in range(len(addresses))]
        for number, home in enumerate(homes):
            for bucket, part in data_share(self.plan, home, self.step).items():
                if addresses[number] and part > most[bucket]:
                    owners[bucket], most[bucket] = number, part
        hashes = [np.asarray(index.hash) for index in self.units.datasets]

        def owner(dataset: np.ndarray, episode: np.ndarray) -> np.ndarray:
            out = np.full(len(dataset), -1)
            for number in np.unique(dataset).tolist():
                here = dataset == number
                out[here] = owners[(hashes[number][episode[here]] % np.uint64(self.plan.buckets)).astype(np.int64)]
            return out

        self.fetcher.connect(Peers(addresses, self.spec.peers.secret, self._layout()), owner)

    def _layout(self) -> str:
        """A fingerprint of the data and of how it is cut into units."""
        text = "-".join(
            [d.fingerprint for d in self.units.datasets] + [f"{c.field}:{c.unit_rows}" for c in self.units.columns]
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # The work

    async def run(self) -> None:
        if self.spec.peers is not None:
            await self._connected.wait()
        self._streaming = asyncio.create_task(self._stream())
        pipeline = asyncio.create_task(self._pipeline())
        changed = asyncio.create_task(self._changed.wait())
        while True:
            waiting = {task for task in (pipeline, self._streaming) if not task.done()}
            await asyncio.wait({*waiting, changed}, return_when=asyncio.FIRST_COMPLETED)
            if self._streaming.done() and not self._streaming.cancelled():
                self._streaming.result()
            if pipeline.done():
                pipeline.result()  # raises its error; without one all steps are made, but the plan may still change
            if changed.done():
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait())
            if self._messages:
                pipeline = await self._adopt(pipeline)

    async def _adopt(self, pipeline: asyncio.Task[None]) -> asyncio.Task[None]:
        """Put the trainer's events into the plan's log. Steps that were begun too early are begun again."""
        messages, self._messages = self._messages, []
        first = min(event["step"] for m in messages for event in m["events"])
        again = first < self.cache.next
        if again:
            pipeline.cancel()
            await asyncio.gather(pipeline, return_exceptions=True)
        else:
            self.cache.replan(first)
        for message in messages:
            for event in message["events"]:
                self.plan.log.append(event)
            self.generation = message["generation"]
        self.ahead.forget()
        if again:
            self.step = min(self.step, first)
            await self._restart_cache(self.step)
        return asyncio.create_task(self._pipeline()) if again or pipeline.done() else pipeline

    async def _restart_cache(self, start: int) -> None:
        """Replace the cache by a new one, for the steps from `start` on."""
        self._streaming.cancel()
        await asyncio.wait({self._streaming})
        self.cache.close()
        self.cache = self._new_cache(start)
        self._neighbours = self._new_neighbours()
        self._streaming = asyncio.create_task(self._stream())
        self._changed.set()  # so that `run` watches the new task

    async def _stream(self) -> None:
        """If (nearly) all data of this home fits the cache, read it once while steps are made."""
        if self._piece:
            await self._begun.wait()
            wanted = home_units(self.placement, self.units, self.step, self.cache.capacity / max(self._home, 1))
            await stream(self.units, wanted, self.fetcher, self.cache, self._piece)

    async def _pipeline(self) -> None:
        """Make the steps from `self.step` until `stop`: begin them as far ahead as the cache has room, finish them in order."""
        begun: deque[Work] = deque()
        try:
            while True:
                while len(begun) < _AHEAD and self.cache.can_open():
                    begun.append(await self._begin())
                if not begun:
                    return
                await self._finish(begun.popleft())
        finally:
            for work in begun:
                work.fetched.cancel()

    async def _begin(self) -> Work:
        began = time.perf_counter()
        try:
            block = self.cache.open()
        except MemoryError:  # this step needs more than any before: begin again with more room for data in flight
            most = most_staging(self.settings.cache.memory)
            if self._staging >= most:
                raise
            self._staging = min(2 * self._staging, most)
            await self._restart_cache(self.cache.next)
            return await self._begin()
        rows, planned, spans = self.ahead.step(block.number)
        ranges = [self.units.ranges(span.units) for span in spans]
        fetcher = self._neighbours or self.fetcher
        fetched = asyncio.create_task(fetcher.fetch(block.misses, block.put))
        work = Work(
            step=block.number,
            rows=rows,
            planned=planned,
            spans=spans,
            ranges=ranges,
            block=block,
            fetched=fetched,
            generation=self.generation,
        )
        work.counters["plan_seconds"] = time.perf_counter() - began
        return work

    async def _finish(self, work: Work) -> None:
        began = time.perf_counter()
        await work.fetched
        fetched = time.perf_counter()
        found = self.assembler.windows(work.planned, work.spans, work.ranges, work.block.copy)
        windows, quarantined = await self.mender.mend(work.step, work.planned, found)
        work.block.close()
        decoded = time.perf_counter()
        try:
            arrays = self._make(work, windows)
        except BadValue:
            windows, quarantined = await self.mender.mend(work.step, work.planned, found, test=True)
            arrays = self._make(work, windows)
        made = time.perf_counter()
        places, size = shared_memory.layout(arrays)
        while (slot := self.slots.acquire(size)) is None:
            self._freed.clear()
            await self._freed.wait()
        self.slots.write(slot, places, arrays)
        work.counters.update(
            windows=len(windows),
            bytes_delivered=float(sum(map(_delivered, work.spans, work.ranges))),
            fetch_wait_seconds=fetched - began,
            decode_seconds=decoded - fetched,
            make_seconds=made - decoded,
        )
        self.connection.send(
            {
                "step": work.step,
                "generation": work.generation,
                "horizon": self.cache.next,
                "slot": slot,
                "bytes": size,
                "places": places,
                "counters": {
                    **work.counters,
                    **self.counters.step(work.planned, self.cache),
                    "queue_steps": float(self.cache.next - work.step - 1),
                },
                "quarantined": quarantined,
            }
        )
        self.step = work.step + 1
        self._begun.set()

    def _make(self, work: Work, windows: Sequence[Window | None]) -> dict[str, np.ndarray]:
        """The arrays of a step. None stands for a window that is left out."""
        by_row: list[list[Window]] = [[] for _ in work.rows]
        place = {row: k for k, row in enumerate(work.rows.tolist())}
        for row, window in zip(work.planned.row.tolist(), windows, strict=True):
            if window is not None:
                by_row[place[row]].append(window)
        return self.spec.make_batch(work.step, work.rows, by_row)


def _delivered(span: Span, ranges: UnitRanges) -> int:
    """Bytes that windows need of a column."""
    return int((span.end - span.begin).sum() if span.needed is None else ranges.size.sum())


def _listen(connection: Connection, trainer: int, hear: Any) -> None:
    """Pass on the trainer's messages; end the process when the trainer is gone."""
    try:
        while True:
            if connection.poll(0.5):
                hear(connection.recv())
            elif os.getppid() != trainer:  # other children of a killed trainer may keep the connection open
                break
    except (EOFError, OSError):
        pass
    os._exit(0)


async def _serve(spec: ProcessSpec, connection: Connection, memory: int, trainer: int) -> None:
    process = LoaderProcess(spec, connection, memory)
    loop = asyncio.get_running_loop()

    def hear(message: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(process.hear, message)

    if spec.peers is not None:
        connection.send({"peer": await process.serve_peers()})
    threading.Thread(target=_listen, args=(connection, trainer, hear), daemon=True).start()
    await process.run()


def _unpickled(data: bytes) -> ProcessSpec:
    """The spec. Unpickling is safe here: the bytes come from our own parent over a private pipe."""
    try:
        return pickle.loads(data)
    except AttributeError as error:
        error.add_note(
            "the loader process must be able to import make_batch: define it in a module, not in the main script"
        )
        raise


def main() -> None:
    """`sys.argv[1:]`: sys.path as JSON, file descriptors of the connection and of the shared memory."""
    connection, memory, trainer = Connection(int(sys.argv[2])), int(sys.argv[3]), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group; the trainer decides
        signal.signal(number, signal.SIG_IGN)
    try:
        spec = _unpickled(connection.recv_bytes())
        asyncio.run(_serve(spec, connection, memory, trainer))
    except EOFError:
        pass
    except BaseException as error:
        error.add_note("In the loader process:\n" + traceback.format_exc())
        try:
            data = pickle.dumps({"error": error})
            pickle.loads(data)
        except Exception:  # the error cannot be pickled
            text = "".join(traceback.format_exception(error))
            data = pickle.dumps({"error": RuntimeError(f"the loader process failed:\n{text}")})
        connection.send_bytes(data)
    os._exit(0)
