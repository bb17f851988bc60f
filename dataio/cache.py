"""RangeCache: keeps the pieces of the data that will be needed next. The sampling plan says which these are.

A *unit* is fetched and kept as one: consecutive rows of an episode's `steps.npy`, or chunks of a large member.
A *block* is consumed as one: in the loader, a training step. The plan names the units of every future block. For each unit the
cache counts the planned blocks within a sliding look-ahead that use it, and keeps the unit while its count is above zero; after
that it may be evicted. The budget decides how far the look-ahead reaches. This gives the hit rate of Belady's rule without a
heap, a clock or an order of units.

If data is visited once an epoch, no order of eviction helps. Then `pin` keeps the units that came first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.caching.kept import NOWHERE, STAGED, KeptUnits, Units, distinct

MAX_LOOK_AHEAD = 65535  # blocks: the largest count of two bytes


@lru_cache(64)
def hit_bound(share: float, pin: bool = False) -> float:
    """Best possible share of bytes that are found in a cache that holds `share` of the data.

    With replacement: 1 − e^(−x), with x from 1 − (1 + x)·e^(−x) = share. These are the hits if exactly the units that are used
    in the next x epochs are kept. Without replacement (`pin`): `share` itself.
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
    """The units of one block. While the block is open, none of them leaves the cache.

    units   int64, ascending, each once
    misses  int64, ascending: the units that must be fetched now and `put`
    """

    number: int
    units: Units
    misses: Units
    _cache: RangeCache
    _staged: list[int]
    _address: NDArray[np.int64]  # of each unit in the memory tier; −1: not there
    _kept: dict[int, tuple[int, int] | memoryview]  # units on disk -> (place, size); after they were read, their bytes

    def put(self, unit: int, data: Any) -> None:
        """Hand over a fetched unit as a buffer. `close` raises ValueError if its size is not the unit's. The buffer is copied
        only if the cache keeps the unit."""
        self._cache._put(unit, data)

    def get(self, unit: int) -> memoryview | None:
        """The bytes of one of the block's units, valid until the block is closed. None if the unit must be fetched and put,
        because it has not arrived yet or the cached copy was damaged."""
        return self._cache._get(self, unit)

    def copy(self, units: Units, low: Units, high: Units, at: Units, out: memoryview) -> list[int]:
        """Copy bytes [low, high) of each of these units of the block to `out[at:]`.

        Returns the positions in `units` of the units that must be fetched first (see `get`).
        """
        address = self._address[np.searchsorted(self.units, units)]
        here, size, view = address >= 0, high - low, self._cache.kept.memory_view
        begin = address + low
        spots = (a[here].tolist() for a in (at, at + size, begin, begin + size))
        for a, z, b, e in zip(*spots):
            out[a:z] = view[b:e]
        missing = []
        for i in np.flatnonzero(~here).tolist():
            data = self._cache._get(self, int(units[i]))
            if data is None:
                missing.append(i)
            else:
                out[at[i] : at[i] + size[i]] = data[low[i] : high[i]]
        return missing

    def close(self) -> None:
        """End the use of the block. Units that no planned block needs may be evicted from now on."""
        self._cache._close(self)


class RangeCache:
    """A bounded cache of units in memory and on disk, driven by a plan. Not safe for use by several threads.

    units        number of units; they are numbered from 0
    sizes        units (int64 [n]) -> bytes of each (int64 [n])
    plan         block -> the units that it uses, in any order, repeats allowed; must give the same answer until `replan`
    total        bytes of all data that this process draws from, for the bound that is reported
    memory       bytes of memory: of the memory tier, and of the misses of open blocks (`staging`)
    disk         bytes of the disk tier in the folder `directory`, which no other process may use
    fingerprint  names the data and how it is cut into units; a disk tier with another fingerprint is discarded
    start, stop  first block, and the block before which the plan ends
    look_ahead   most blocks of the future that are counted
    pin          keep what came first instead of what is needed next (for sampling without replacement)
    staging      bytes of `memory` that are set aside for the misses of open blocks; 0: a quarter

    The loop that uses it::

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
        staging: int = 0,
    ) -> None:
        self.sizes, self.plan, self.total, self.pin = sizes, plan, total, pin
        self.staging = staging or memory // 4
        self.next, self.far, self.stop = start, start, stop
        self.look_ahead = min(look_ahead, MAX_LOOK_AHEAD)
        self.kept = KeptUnits(
            units, sizes, memory=memory - self.staging, disk=disk, directory=directory, fingerprint=fingerprint,
            pin=pin, retract=self._retract,
        )  # fmt: skip
        self.capacity = self.kept.capacity
        self._staged: dict[int, Any] = {}  # units that open blocks wait for -> their bytes, or None before they arrive
        self._shared: dict[int, int] = {}  # staged units that several open blocks need -> how many beside the first
        self._open: dict[int, Block] = {}
        self._upcoming: tuple[Units, NDArray[np.int64]] | None = None  # units of the next block, and their sizes
        self._missed: int | None = None  # bytes of its misses
        self.staged = self.peak = 0
        self.counters = dict.fromkeys(("units", "misses", "bytes", "missed_bytes", "damaged"), 0)
        self.counters |= {f"{name}_bytes": 0 for name in ("memory", "disk", "shared")}

    # -- blocks ------------------------------------------------------------------------------------------------------

    def can_open(self) -> bool:
        """Whether there is a next block and its misses fit beside those of the open blocks."""
        if self.stop is not None and self.next >= self.stop:
            return False
        return not self._open or self.staged + self._missing() <= self.staging

    def open(self) -> Block:
        """Open the next block. Raises MemoryError if its misses do not fit into the memory that is set aside for them."""
        units, sizes = self._next_units()
        number, missed = self.next, self._missing()
        if self.staged + missed > self.staging:
            raise MemoryError(
                f"cache: block {number} needs {missed} bytes that are not cached, and other open blocks {self.staged}, but "
                f"only {self.staging} bytes of the cache's memory are set aside for these; increase data.cache.memory"
            )
        self._look()
        place = self.kept.place[units]
        shared = units[place == STAGED].tolist()
        for unit in shared:
            self._shared[unit] = self._shared.get(unit, 0) + 1
        absent = place == NOWHERE
        misses = units[absent]
        self.kept.place[misses] = STAGED
        missing = misses.tolist()
        self._staged.update(dict.fromkeys(missing))
        address, kept = self.kept.find(units, place, sizes)
        block = self._open[number] = Block(
            number=number,
            units=units,
            misses=misses,
            _cache=self,
            _staged=missing + shared,
            _address=address,
            _kept=kept,
        )
        self.staged += missed
        self.next, self._upcoming, self._missed = number + 1, None, None
        self._count(place, sizes, missed)
        return block

    def replan(self, first: int) -> None:
        """Forget the announcements of blocks from `first` on. To be called before the plan changes for these blocks.

        Raises ValueError if such a block is already open.
        """
        if first < self.next:
            raise ValueError(f"cache: block {first} cannot change: blocks before {self.next} are being fetched already")
        while self.far > first:
            self._retract()
        self._upcoming = self._missed = None

    def peek(self, unit: int) -> bytes | None:
        """A copy of a unit's bytes if they are here, for another process. This does not count as a use."""
        place = int(self.kept.place[unit]) if 0 <= unit < len(self.kept.place) else NOWHERE
        if place == STAGED:
            data = self._staged[unit]
            return None if data is None else bytes(data)
        if place == NOWHERE:
            return None
        found = self.kept.read(unit, place, int(self.sizes(np.array([unit]))[0]))
        return None if found is None else bytes(found)

    def absent(self, units: Units) -> Units:
        """Those of the given units that are neither here nor in flight."""
        return units[self.kept.place[units] == NOWHERE]

    def offer(self, data: Mapping[int, Any]) -> bool:
        """Keep units that no block has asked for, as far as there is room. Returns whether there was room for all of them. No
        unit that a planned block needs is evicted for them."""
        units = self.absent(np.array(list(data), np.int64))
        self._keep(units, self.sizes(units), data)
        self._missed = None
        return not len(self.absent(units))

    @property
    def free(self) -> int:
        """Bytes of the memory tier that are neither used nor lent."""
        return self.kept.free

    def lend(self, size: int) -> list[int]:
        """Lend free room of the memory tier to a caller that has `size` bytes in flight. There must be as much free room.
        Returns the lent slabs, which hold nothing until `take_back`."""
        return self.kept.lend(size)

    def take_back(self, slabs: list[int]) -> None:
        """Take back the slabs that `lend` returned."""
        self.kept.take_back(slabs)

    @property
    def occupied(self) -> int:
        """Bytes of both tiers in use, in whole slabs."""
        return self.kept.occupied

    def holds(self, units: Units) -> NDArray[np.bool_]:
        """Mask of the units that are kept in memory or on disk."""
        return self.kept.holds(units)

    @property
    def metadata_bytes(self) -> int:
        """Bytes of what the cache knows of its units."""
        return self.kept.metadata_bytes

    def correct(self, unit: int, data: Any) -> None:
        """Replace a unit's wrong bytes by valid ones, whether the unit is staged or kept."""
        if self.kept.place[unit] == STAGED:
            self._put(unit, data)
        elif self.kept.place[unit] != NOWHERE:
            self.kept.rewrite(unit, memoryview(data).cast("B"))

    def statistics(self) -> dict[str, float]:
        """Counters since the start, bytes in use by tier, blocks of look-ahead, hit rate in bytes, and its bound."""
        return {
            **self.counters,
            "kept": self.kept.written,
            "memory_used": self.kept.memory_used + self.staged,
            "disk_used": self.kept.disk_used,
            "look_ahead": self.far - self.next,
            "hit_rate": 1 - self.counters["missed_bytes"] / max(self.counters["bytes"], 1),
            "bound": hit_bound(self.capacity / max(self.total, 1), self.pin),
        }

    def close(self) -> None:
        """Free the memory. What is on disk stays for the next start."""
        self._staged.clear()
        self.kept.close()

    def _next_units(self) -> tuple[Units, NDArray[np.int64]]:
        """The next block's units, and their sizes."""
        if self._upcoming is None:
            units = distinct(self.plan(self.next))
            self._upcoming = units, self.sizes(units)
        return self._upcoming

    def _missing(self) -> int:
        """Bytes of the next block's units that are not here."""
        if self._missed is None:
            units, sizes = self._next_units()
            self._missed = int(sizes[self.kept.place[units] == NOWHERE].sum())
        return self._missed

    def _count(self, place: Units, sizes: NDArray[np.int64], missed: int) -> None:
        in_memory, shared = int(sizes[self.kept.in_memory(place)].sum()), int(sizes[place == STAGED].sum())
        everything = int(sizes.sum())
        for name, value in (
            ("units", len(place)),
            ("misses", int((place == NOWHERE).sum())),
            ("bytes", everything),
            ("missed_bytes", missed),
            ("memory_bytes", in_memory),
            ("shared_bytes", shared),
            ("disk_bytes", everything - missed - in_memory - shared),
        ):
            self.counters[name] += value
        self._measure()

    def _measure(self) -> None:
        self.peak = max(self.peak, self.staged + self.kept.occupied)

    # -- look-ahead --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Announce blocks while the budget has room for more of the future; only a few in one call, so that no call is long."""
        if self.pin:
            self.far = max(self.far, self.next + 1)
            return
        for _ in range(3):
            ahead = self.far - self.next
            if ahead > 0 and (self.kept.live >= self.capacity or ahead >= self.look_ahead or self.far == self.stop):
                return
            units = self._next_units()[0] if self.far == self.next else distinct(self.plan(self.far))
            self.kept.announce(units)
            self.far += 1

    def _retract(self) -> bool:
        """Take back the farthest announcement, if there is one. Units that only it needed are evicted first."""
        if self.far <= self.next:
            return False
        self.far -= 1
        if not self.pin:
            self.kept.used(distinct(self.plan(self.far)), last=False)
        return True

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _put(self, unit: int, data: Any) -> None:
        if unit not in self._staged:
            raise ValueError(f"cache: no open block waits for unit {unit}")
        self._staged[unit] = data

    def _get(self, block: Block, unit: int) -> memoryview | None:
        data = self._staged.get(unit)
        if data is not None:
            return memoryview(data).cast("B")
        i = int(np.searchsorted(block.units, unit))
        if i == len(block.units) or block.units[i] != unit:
            raise ValueError(f"cache: unit {unit} does not belong to block {block.number}")
        if (address := int(block._address[i])) >= 0:
            return self.kept.memory_view[address : address + int(self.sizes(np.array([unit]))[0])]
        kept = block._kept.get(unit)
        if not isinstance(kept, tuple):
            return kept
        data = self.kept.read(unit, *kept)
        if data is None:
            self._damaged(unit, kept[1])
        else:
            block._kept[unit] = data
        return data

    def _damaged(self, unit: int, size: int) -> None:
        """Forget a unit whose cached bytes are wrong. The open blocks that need it wait until it is fetched and put."""
        self.counters["damaged"] += 1
        self.kept.forget(np.array([unit], np.int64))
        waiting = [block for block in self._open.values() if unit in block._kept]
        self._staged[unit] = None
        if len(waiting) > 1:
            self._shared[unit] = len(waiting) - 1
        self.kept.place[unit] = STAGED
        self.staged += size
        for block in waiting:
            del block._kept[unit]
            block._staged.append(unit)

    def _close(self, block: Block) -> None:
        del self._open[block.number]
        self._missed = None  # staged units are kept or dropped below
        if not self.pin:
            self.kept.used(block.units)
        over = [unit for unit in block._staged if self._unshared(unit)] if self._shared else block._staged
        data = {unit: self._staged.pop(unit) for unit in over}
        units = np.array(over, np.int64)
        sizes = self.sizes(units)
        self.staged -= int(sizes.sum())
        self.kept.place[units] = NOWHERE
        here = np.array([part is not None for part in data.values()], bool)
        self._keep(units[here], sizes[here], data)

    def _unshared(self, unit: int) -> bool:
        """Whether no other open block needs a staged unit. If one does, one fewer needs it from now on."""
        others = self._shared.pop(unit, 0)
        if others > 1:
            self._shared[unit] = others - 1
        return not others

    def _keep(self, units: Units, sizes: NDArray[np.int64], data: Mapping[int, Any]) -> None:
        """Keep some units of `data`. Raises ValueError, and keeps nothing, if one of them has a wrong size."""
        have = np.fromiter(map(len, map(data.__getitem__, units.tolist())), np.int64, len(units))
        if (wrong := np.flatnonzero(have != sizes)).size:
            bad = int(wrong[0])
            raise ValueError(f"cache: unit {units[bad]} must have {sizes[bad]} bytes, but {have[bad]} were put")
        self.kept.keep(units, sizes, data, [block.units for block in self._open.values()])
        self._measure()
