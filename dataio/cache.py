"""RangeCache: which runs of the data stay near, decided by a future that the sampling plan makes known.

A *unit* is what is fetched and kept as one: a run of steps of an episode's `steps.npy`, or a chunk of a large member.
A *block* is what is consumed as one, a training step or a few. The plan names every future block's units, so the cache counts,
for each unit, the planned blocks within a sliding look-ahead that use it, and keeps a unit exactly while its count is above
zero. The budget moves the far end of the look-ahead. That reaches the hit rate of Belady's rule without a heap, a clock or an
order among units.

For data that are visited once an epoch no order of eviction helps; there `pin` keeps the units that came first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]
MAX_LOOK_AHEAD = 255  # blocks: what a count of one byte can hold


def hit_bound(share: float, pin: bool = False) -> float:
    """Best possible share of bytes served by a cache that holds `share` of the data.

    With replacement 1 − e^(−x), where 1 − (1 + x)·e^(−x) = share: the hits that remain when exactly the units with a use in
    the next x epochs are kept. Without replacement (`pin`) the share itself.
    """
    share = min(max(share, 0.0), 1.0)
    if pin or share in (0.0, 1.0):
        return share
    low, high = 0.0, 64.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if 1 - (1 + x) * math.exp(-x) < share else (low, x)
    return 1 - math.exp(-low)


@dataclass
class Block:
    """The units of one block, while it is open: none of them leaves the cache.

    units   int64, ascending, each once
    misses  int64, ascending: those that must be fetched now and `put`
    """

    number: int
    units: Units
    misses: Units
    _cache: RangeCache
    _staged: Units = field(default_factory=lambda: np.empty(0, np.int64))

    def put(self, unit: int, data: Any) -> None:
        """Hands over a fetched unit: any buffer of exactly its size. It is not copied unless the cache keeps it."""
        self._cache._put(unit, data)

    def get(self, unit: int) -> memoryview | None:
        """The bytes of one of the block's units, valid until the block is closed; None if they must be fetched (and put):
        not there yet, or the cached copy was damaged."""
        return self._cache._get(unit)

    def close(self) -> None:
        """Done with the block: what no planned block needs may now make room."""
        self._cache._close(self)


@dataclass
class _Staged:
    data: Any = None
    blocks: int = 1  # open blocks that need it


class RangeCache:
    """A bounded cache of units over memory and disk, driven by a plan.

    Args:
        units: number of units, which are numbered from 0.
        sizes: units (int64 [n]) -> bytes of each (int64 [n]).
        plan: block -> units that it uses, in any order, repeats allowed. Must give the same answer until `replan`.
        total: bytes of all data that this process draws from, for the bound that is reported.
        memory: bytes of the memory tier, of which a quarter is set aside for the misses of open blocks.
        disk: bytes of the disk tier, in `directory`.
        fingerprint: names data and unit layout; files of the disk tier with another fingerprint are not used.
        start, stop: first block, and the block before which the plan ends.
        pin: keep what came first instead of what is needed next (sampling without replacement).

    The loop of its user::

        while cache.can_open():
            block = cache.open(); fetch(block.misses) -> block.put(unit, data)
        …
        block.get(unit) …; block.close()
    """

    def __init__(
        self,
        units: int,
        sizes: Callable[[Units], NDArray[np.int64]],
        plan: Callable[[int], Units],
        *,
        total: int,
        memory: int,
        disk: int = 0,
        directory: str = "",
        fingerprint: str = "",
        start: int = 0,
        stop: int | None = None,
        look_ahead: int = MAX_LOOK_AHEAD,
        pin: bool = False,
    ) -> None:
        self.sizes, self.plan, self.total, self.pin = sizes, plan, total, pin
        self.staging = memory // 4
        self.capacity = memory - self.staging
        self.next, self.far, self.stop = start, start, stop
        self.look_ahead = min(look_ahead, MAX_LOOK_AHEAD)
        self._planned = np.zeros(units, np.uint8)
        self._kept: dict[int, bytes] = {}
        self._staged: dict[int, _Staged] = {}
        self._open: dict[int, Block] = {}
        self._idle: deque[Units] = deque()
        self._peeked: tuple[int, Units, Units] | None = None
        self.occupied = self.live = self.staged = self.peak = 0
        self.counters = dict.fromkeys(("units", "misses", "bytes", "memory_bytes", "disk_bytes", "missed_bytes"), 0)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def can_open(self) -> bool:
        """Whether the next block exists and its misses fit beside those of the blocks that are open."""
        if self.stop is not None and self.next >= self.stop:
            return False
        _, _, misses = self._peek()
        return not self._open or self.staged + int(self.sizes(misses).sum()) <= self.staging

    def open(self) -> Block:
        """The next block. MemoryError if one block alone exceeds what is set aside for misses."""
        number, units, misses = self._peek()
        self._look()
        missed = int(self.sizes(misses).sum())
        if self.staged + missed > self.staging:
            raise MemoryError(
                f"cache: block {number} needs {missed} bytes that are not cached, beside {self.staged} of other open blocks, "
                f"but a quarter of data.cache.memory is {self.staging}; give it at least {4 * (self.staged + missed)} bytes"
            )
        staged = [u for u in units.tolist() if u in self._staged]
        for unit in staged:
            self._staged[unit].blocks += 1
        for unit in misses.tolist():
            self._staged[unit] = _Staged()
        block = Block(number, units, misses, self, np.union1d(misses, np.array(staged, np.int64)))
        self._open[number] = block
        self.staged += missed
        self.next, self._peeked = number + 1, None
        self.counters["units"] += len(units)
        self.counters["misses"] += len(misses)
        self.counters["missed_bytes"] += missed
        self.counters["bytes"] += int(self.sizes(units).sum())
        self.peak = max(self.peak, self.staged + self.occupied)
        return block

    def replan(self, first: int) -> None:
        """Forgets what was announced of blocks from `first` on. Call it before the plan changes there.

        ValueError if such a block is open already.
        """
        if first < self.next:
            raise ValueError(f"cache: block {first} cannot change, blocks before {self.next} are being fetched")
        while self.far > first:
            self._retract()
        self._peeked = None

    def statistics(self) -> dict[str, float]:
        """Counters since the start, occupied bytes, look-ahead in blocks, the hit rate in bytes and the best possible one."""
        seen = max(self.counters["bytes"], 1)
        return {
            **self.counters,
            "occupied": self.occupied,
            "look_ahead": self.far - self.next,
            "hit_rate": 1 - self.counters["missed_bytes"] / seen,
            "bound": hit_bound(self.capacity / max(self.total, 1), self.pin),
        }

    def close(self) -> None:
        """Gives everything back."""
        self._kept.clear()
        self._staged.clear()

    # -- look-ahead --------------------------------------------------------------------------------------------------

    def _peek(self) -> tuple[int, Units, Units]:
        if self._peeked is None:
            units = np.unique(self.plan(self.next))
            there = np.array([u in self._kept or u in self._staged for u in units.tolist()], bool)
            self._peeked = (self.next, units, units[~there])
        return self._peeked

    def _look(self) -> None:
        """Announces blocks while the budget has room for more of the future, a few at a time so that no call takes long."""
        for _ in range(2):
            ahead = self.far - self.next
            if ahead > 0 and (self.live >= self.capacity or ahead >= self.look_ahead or self.far == self.stop):
                return
            units = np.unique(self.plan(self.far))
            fresh = [u for u in units[self._planned[units] == 0].tolist() if u in self._kept]
            self.live += sum(len(self._kept[u]) for u in fresh)
            self._planned[units] += 1
            self.far += 1

    def _retract(self) -> None:
        self.far -= 1
        units = np.unique(self.plan(self.far))
        self._planned[units] -= 1
        gone = np.array([u for u in units[self._planned[units] == 0].tolist() if u in self._kept], np.int64)
        self.live -= sum(len(self._kept[u]) for u in gone.tolist())
        self._idle.append(gone)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _put(self, unit: int, data: Any) -> None:
        size = int(self.sizes(np.array([unit]))[0])
        view = memoryview(data).cast("B")
        if len(view) != size:
            raise ValueError(f"cache: unit {unit} has {size} bytes, got {len(view)}")
        self._staged[unit].data = view

    def _get(self, unit: int) -> memoryview | None:
        staged = self._staged.get(unit)
        if staged is not None:
            return staged.data
        kept = self._kept.get(unit)
        return None if kept is None else memoryview(kept)

    def _close(self, block: Block) -> None:
        del self._open[block.number]
        self._planned[block.units] -= 1
        done = block.units[self._planned[block.units] == 0]
        idle = np.array([u for u in done.tolist() if u in self._kept], np.int64)
        self.live -= sum(len(self._kept[u]) for u in idle.tolist())
        self._idle.append(idle)
        for unit in block._staged.tolist():
            staged = self._staged[unit]
            staged.blocks -= 1
            if staged.blocks == 0:
                del self._staged[unit]
                self.staged -= int(self.sizes(np.array([unit]))[0])
                if staged.data is not None:
                    self._keep(unit, staged.data)

    def _keep(self, unit: int, data: memoryview) -> None:
        while self.occupied + len(data) > self.capacity:
            if self.pin or not self._planned[unit] or not self._make_room():
                return
        if not self._planned[unit]:  # kept only because there was room
            self._idle.append(np.array([unit]))
        else:
            self.live += len(data)
        self._kept[unit] = bytes(data)
        self.occupied += len(data)
        self.peak = max(self.peak, self.staged + self.occupied)

    def _make_room(self) -> bool:
        while self._idle:
            units = self._idle.popleft()
            gone = [u for u in units.tolist() if self._planned[u] == 0 and u in self._kept]
            for unit in gone:
                self.occupied -= len(self._kept.pop(unit))
            if gone:
                return True
        if self.far <= self.next:
            return False
        self._retract()
        return True
