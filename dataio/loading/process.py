"""The loader process: plans ahead, fetches what the cache lacks, decodes, makes batches, and hands them over in plan order.

One thread and one event loop do the work: transfers go on in obstore's own threads while rows are decoded. A second thread
listens to the trainer, and ends the process as soon as the trainer is gone, however that went.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from dataio.cache import Block, RangeCache
from dataio.caching.tiers import InheritedTier
from dataio.episode import DataError, Window
from dataio.loading import shared_memory
from dataio.loading.ahead import Ahead
from dataio.loading.assemble import Assembler
from dataio.loading.fetch import Fetcher
from dataio.loading.gather import copy_from
from dataio.loading.homes import home_units
from dataio.loading.sizing import most_staging, sized
from dataio.loading.stream import FLYING, stream
from dataio.loading.units import Span, UnitRanges
from dataio.peers import Peers, PeerServer
from dataio.placement import Home, Placement, data_share
from dataio.plan.log import PlanLog

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dataio.loader import LoaderSettings
    from dataio.sampling import PlannedWindows

_AHEAD = 64  # steps whose ranges may be on their way
_READS = 3  # of one window whose bytes are wrong, before another is drawn
_ATTEMPTS = 8  # draws in the place of one window that cannot be read
# Share of the windows of the last steps that may be redrawn: beyond it, it is not an episode that is bad
_MOST_BAD = 0.1


@dataclass
class Work:
    """A step on its way."""

    step: int
    rows: np.ndarray
    planned: PlannedWindows
    spans: list[Span]
    ranges: list[UnitRanges]
    block: Block
    fetched: asyncio.Task[dict[int, Exception]]
    generation: int  # of the plan
    counters: dict[str, float] = field(default_factory=dict)


class LoaderProcess:
    """What happens between the settings and the slots."""

    def __init__(self, settings: LoaderSettings, connection: Connection, memory: int):
        self.settings, self.connection = settings, connection
        self.plan = settings.plan
        self.plan.log = PlanLog(events=self.plan.log.events)  # the file, if there is one, is the trainer's to write
        self.placement = Placement(self.plan, settings.home)
        self.slots = shared_memory.SlotWriter(memory, settings.prefetch)
        sizing = sized(self.plan, self.placement, settings)
        self.units, self._staging, self._home = sizing.units, sizing.staging, sizing.home
        self._piece = sizing.piece
        self.assembler = Assembler(self.units, settings.tasks)
        self.fetcher = Fetcher(self.units, settings.requests, settings.timeout, settings.attempts)
        self.step, self.generation = settings.step, 0  # step: the next one to be handed over
        self.ahead = Ahead(self.plan, self.placement, self.units, _AHEAD)
        self._recent: deque[tuple[int, int]] = deque(maxlen=32)  # (windows, redrawn) of the last steps
        self._episodes: deque[tuple[int, int]] = deque(maxlen=256)
        self._totals: dict[str, float] = {}
        self._hit_rate = 0.0
        self._freed = asyncio.Event()
        self._messages: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._connected = asyncio.Event()
        self.cache = self._new_cache(self.step)

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
            stop=self.settings.stop,
            pin=not self.plan.replacement,
            staging=self._staging,
        )

    # What the trainer says

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
        """Let others read this process' cache; returns its address."""
        assert self.settings.peers is not None
        opened = (InheritedTier.open(folder, self._layout()) for folder in self.settings.cache.inherited)
        inherited = [tier for tier in opened if tier is not None]

        def read(unit: int) -> Buffer | None:
            if (found := self.cache.peek(unit)) is not None or not 0 <= unit < self.units.units or not inherited:
                return found
            size = int(self.units.sizes(np.array([unit]))[0])
            return next((data for tier in inherited if (data := tier.read(unit, size)) is not None), None)

        return await PeerServer(self.settings.peers, self._layout(), read).start()

    def _connect(self, addresses: list[str], homes: list[Home] | None) -> None:
        """Each bucket's units are asked for where most of the bucket was at home."""
        assert self.settings.peers is not None
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

        self.fetcher.connect(Peers(addresses, self.settings.peers.token, self._layout()), owner)

    def _layout(self) -> str:
        """Names the data and how they are cut into units."""
        text = "-".join(
            [d.fingerprint for d in self.units.datasets] + [f"{c.field}:{c.run}" for c in self.units.columns]
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # The work

    async def run(self) -> None:
        if self.settings.peers is not None:
            await self._connected.wait()
        streaming = asyncio.create_task(self._stream())
        pipeline = asyncio.create_task(self._pipeline())
        while True:
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait({pipeline, changed}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
            if not self._changed.is_set():
                pipeline.result()
                await changed  # all steps are made, but the plan may still change
            self._changed.clear()
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
                self.cache.close()
                self.cache = self._new_cache(self.step)
            if again or pipeline.done():
                pipeline = asyncio.create_task(self._pipeline())

    async def _stream(self) -> None:
        """Where there is room for all data that are at home here, or nearly: read them, beside the steps."""
        if self._piece:
            wanted = home_units(self.placement, self.units, self.step, self.cache.capacity / max(self._home, 1))
            await stream(self.units, wanted, self.fetcher, lambda: self.cache, self._piece)

    async def _pipeline(self) -> None:
        """Steps from `self.step` on, until `stop`: begun as far ahead as the cache has room, finished in order."""
        begun: deque[Work] = deque()
        try:
            while True:
                while len(begun) < _AHEAD and self.cache.can_open():
                    begun.append(self._begin())
                if not begun:
                    return
                await self._finish(begun.popleft())
        finally:
            for work in begun:
                work.fetched.cancel()

    def _begin(self) -> Work:
        began = time.perf_counter()
        try:
            block = self.cache.open()
        except MemoryError:  # a step that needs more than any before: begin again with more room for what is on its way
            most = most_staging(self.settings.cache.memory)
            if self._staging >= most:
                raise
            self._staging = min(2 * self._staging, most)
            step = self.cache.next
            self.cache.close()
            self.cache = self._new_cache(step)
            return self._begin()
        rows, planned, spans = self.ahead.step(block.number)
        ranges = [self.units.ranges(span.units) for span in spans]
        fetched = asyncio.create_task(self.fetcher.fetch(block.misses, block.put))
        work = Work(block.number, rows, planned, spans, ranges, block, fetched, self.generation)
        work.counters["plan_seconds"] = time.perf_counter() - began
        return work

    async def _finish(self, work: Work) -> None:
        began = time.perf_counter()
        await work.fetched
        fetched = time.perf_counter()
        windows = self.assembler.windows(work.planned, work.spans, work.ranges, work.block.copy)
        quarantined: list[dict[str, Any]] = []
        for i, window in enumerate(windows):
            if isinstance(window, DataError):
                windows[i], events = await self._mend(work, i, window)
                quarantined += events
        work.block.close()
        self._judge(len(windows), len(quarantined), quarantined)
        decoded = time.perf_counter()
        by_row: list[list[Window]] = [[] for _ in work.rows]
        place = {row: k for k, row in enumerate(work.rows.tolist())}
        for row, window in zip(work.planned.row.tolist(), windows, strict=True):
            assert isinstance(window, Window)
            by_row[place[row]].append(window)
        arrays = self.settings.make_batch(work.step, work.rows, by_row)
        made = time.perf_counter()
        places, size = shared_memory.layout(arrays)
        while (slot := self.slots.acquire(size)) is None:
            self._freed.clear()
            await self._freed.wait()
        self.slots.write(slot, places, arrays)
        work.counters.update(
            windows=len(windows),
            bytes_delivered=float(sum(int((span.end - span.begin).sum()) for span in work.spans)),
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
                "counters": self._counters(work),
                "quarantined": quarantined,
            }
        )
        self.step = work.step + 1

    async def _mend(self, work: Work, i: int, error: DataError) -> tuple[Window, list[dict[str, Any]]]:
        """A window whose bytes were wrong: read once more, past the cache; else another in its place, and the event."""
        events: list[dict[str, Any]] = []
        planned = work.planned
        for attempt in range(int(planned.attempt[i]), int(planned.attempt[i]) + _ATTEMPTS):
            if attempt > int(planned.attempt[i]):
                row, slot = int(work.planned.row[i]), int(work.planned.slot[i])
                again = self.plan.windows(work.step, np.array([row]), attempts={(row, slot): attempt})
                place = int(np.flatnonzero(again.slot == slot)[0])
                planned_one = _only(again, place)
            else:
                planned_one = _only(planned, i)
            for _ in range(_READS):
                found, got = await self._read_alone(planned_one)
                if isinstance(found, Window):
                    break
            if isinstance(found, Window):
                if not events:  # the block's other windows, and later ones, get the good bytes too
                    for unit, data in got.items():
                        self.cache.correct(unit, data)
                return found, events
            await self.fetcher.check_unchanged(np.array(list(got), np.int64))
            entry, episode = int(planned_one.entry[0]), int(planned_one.episode[0])
            index = self.plan.entries[entry].index
            events.append(
                {"kind": "quarantine", "entry": self.plan.entries[entry].name, "episode": episode,
                 "id": index.id(episode), "reason": str(found)}
            )  # fmt: skip
            error = found
        raise DataError(f"step {work.step}: {_ATTEMPTS} windows in a row could not be read; the last one: {error}")

    async def _read_alone(self, planned: PlannedWindows) -> tuple[Window | DataError, dict[int, Any]]:
        """One planned window straight from the store, and the bytes of its units."""
        spans = self.units.spans(planned)
        ranges = [self.units.ranges(s.units) for s in spans]
        got: dict[int, Any] = {}
        units = np.unique(np.concatenate([s.units for s in spans])) if spans else np.zeros(0, np.int64)
        failed = await self.fetcher.fetch(units, got.__setitem__, peers=False)
        for missing in failed.values():
            gone = f"{missing}: there is no such object" if isinstance(missing, FileNotFoundError) else str(missing)
            return DataError(gone), {}
        (window,) = self.assembler.windows(planned, spans, ranges, copy_from(lambda u: memoryview(got[u])))
        return window, got

    def _judge(self, windows: int, redrawn: int, events: list[dict[str, Any]]) -> None:
        """Some episodes are bad; when many are, something else is, and silence would bias the training."""
        self._recent.append((windows, redrawn))
        all_windows, bad = (sum(x) for x in zip(*self._recent, strict=True))
        if bad >= 10 and bad > _MOST_BAD * all_windows:
            raise DataError(
                f"{bad} of the last {all_windows} windows could not be read; run `tiphys verify`. "
                f"The last one: {events[-1]['reason'] if events else ''}"
            )

    def _counters(self, work: Work) -> dict[str, float]:
        """What the step cost, and how it compares with what is possible. Sums, but for names that end in _rate or _bound."""
        statistics = self.cache.statistics()
        traffic = [store.traffic for store in self.fetcher.stores]
        totals: dict[str, float] = {
            "bytes_memory": statistics["bytes"] - statistics["missed_bytes"] - statistics["disk_bytes"],
            "bytes_disk": statistics["disk_bytes"],
            "bytes_missed": statistics["missed_bytes"],
            "bytes_store": sum(t.bytes for t in traffic),
            "bytes_peer": self.fetcher.peer_bytes,
            "requests": sum(t.requests for t in traffic),
            "retries": sum(t.retries for t in traffic),
            "throttled": sum(t.throttled for t in traffic),
            "cpu_seconds": time.process_time(),
        }
        step = {name: float(total - self._totals.get(name, 0.0)) for name, total in totals.items()}
        self._totals = totals
        served = step["bytes_memory"] + step["bytes_disk"]
        if (
            asked := served + step["bytes_missed"]
        ):  # blocks open ahead of their steps: towards the end none is left to open
            self._hit_rate = served / asked
        self._episodes.extend(zip(work.planned.entry.tolist(), work.planned.episode.tolist(), strict=True))
        return {
            **work.counters,
            **step,
            "cache_hit_rate": self._hit_rate,
            "cache_hit_bound": float(statistics["bound"]),
            "cache_bytes": float(self.cache.kept.occupied),
            "look_ahead_steps": float(statistics["look_ahead"]),
            "queue_steps": float(self.cache.next - work.step - 1),
            "resident_bytes": float(_resident()),
            "distinct_rate": self._distinct(),
        }

    def _distinct(self) -> float:
        """Distinct episodes among the last 256 windows, as a share of these: how random the stream is."""
        drawn = len(self._episodes)
        return len(set(self._episodes)) / drawn if drawn else 1.0


def _only(planned: PlannedWindows, i: int) -> PlannedWindows:
    arrays: Any = (a[i : i + 1] for a in planned)
    return type(planned)(*arrays)


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _listen(connection: Connection, trainer: int, hear: Any) -> None:
    """Pass on what the trainer says; end the process when the trainer is gone."""
    try:
        while True:
            if connection.poll(0.5):
                hear(connection.recv())
            elif os.getppid() != trainer:  # the connection may live on in other children of a killed trainer
                break
    except (EOFError, OSError):
        pass
    os._exit(0)


async def _serve(settings: LoaderSettings, connection: Connection, memory: int, trainer: int) -> None:
    process = LoaderProcess(settings, connection, memory)
    loop = asyncio.get_running_loop()

    def hear(message: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(process.hear, message)

    if settings.peers is not None:
        connection.send({"peer": await process.serve_peers()})
    threading.Thread(target=_listen, args=(connection, trainer, hear), daemon=True).start()
    await process.run()


def _unpickled(data: bytes) -> LoaderSettings:
    """The settings, from our own parent over a private pipe."""
    try:
        return pickle.loads(data)
    except AttributeError as error:
        error.add_note("make_batch must be importable here: define it in a module, not in the script that is run")
        raise


def main() -> None:
    """`argv`: (sys.path), the connection's file descriptor, the shared memory's."""
    connection, memory, trainer = Connection(int(sys.argv[2])), int(sys.argv[3]), os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    try:
        settings = _unpickled(connection.recv_bytes())
        asyncio.run(_serve(settings, connection, memory, trainer))
    except EOFError:
        pass
    except BaseException as error:
        error.add_note("In the loader process:\n" + traceback.format_exc())
        try:
            data = pickle.dumps({"error": error})
            pickle.loads(data)
        except Exception:  # what cannot travel as it is
            text = "".join(traceback.format_exception(error))
            data = pickle.dumps({"error": RuntimeError(f"the loader process failed:\n{text}")})
        connection.send_bytes(data)
    os._exit(0)
