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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache_tiers import DiskTier, MemoryTier
from .slabs import ALIGN, size_classes, slab_size

Units = NDArray[np.int64]
MAX_LOOK_AHEAD = 65535  # blocks: what a count of two bytes can hold
_ROUNDS, _RETRACTIONS = 3, 8  # of making room for the units of a block; announced blocks that a round may take back
_IDLE = 4096  # units of one entry of the queue of idle ones
_SAMPLE = 16384  # units whose sizes shape the tiers
_NOWHERE, _STAGED = -1, -2  # places of a unit that is not here, and of one whose bytes an open block holds


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
    _staged: list[int]
    _address: NDArray[np.int64]  # of each unit in the memory tier; −1: not there
    _kept: dict[int, tuple[int, int] | memoryview]  # what is on disk: unit -> place, size; once read, its bytes

    def put(self, unit: int, data: Any) -> None:
        """Hands over a fetched unit: any buffer of exactly its size. It is not copied unless the cache keeps it."""
        self._cache._put(unit, data)

    def get(self, unit: int) -> memoryview | None:
        """The bytes of one of the block's units, valid until the block is closed; None if they must be fetched (and put):
        not there yet, or the cached copy was damaged."""
        return self._cache._get(self, unit)

    def copy(self, units: Units, low: Units, high: Units, at: Units, out: memoryview) -> list[int]:
        """Copies bytes [low, high) of each of some of the block's units to `out[at:]`.

        Returns the positions in `units` of those whose bytes must be fetched first (see `get`).
        """
        address = self._address[np.searchsorted(self.units, units)]
        here, size, view = address >= 0, high - low, self._cache._memory.view
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
        """Done with the block: what no planned block needs may now make room."""
        self._cache._close(self)


@dataclass(slots=True)
class _Staged:
    size: int
    data: memoryview | None = None
    blocks: int = 1  # open blocks that need it


class RangeCache:
    """A bounded cache of units over memory and disk, driven by a plan. Not for use by several threads at once.

    Args:
        units: number of units, which are numbered from 0.
        sizes: units (int64 [n]) -> bytes of each (int64 [n]).
        plan: block -> units that it uses, in any order, repeats allowed. Must give the same answer until `replan`.
        total: bytes of all data that this process draws from, for the bound that is reported.
        memory: bytes of the memory tier, of which a part is set aside for the misses of open blocks.
        disk: bytes of the disk tier, in `directory`, which no other process uses.
        fingerprint: names data and unit layout; a disk tier of another fingerprint is discarded.
        start, stop: first block, and the block before which the plan ends.
        look_ahead: most blocks of the future that are counted.
        pin: keep what came first instead of what is needed next (sampling without replacement).
        staging: bytes of that part; 0: a quarter.

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
        staging: int = 0,
    ) -> None:
        self.sizes, self.plan, self.total, self.pin = sizes, plan, total, pin
        self.staging = staging or memory // 4
        self.next, self.far, self.stop = start, start, stop
        self.look_ahead = min(look_ahead, MAX_LOOK_AHEAD)
        some = np.unique(np.linspace(0, max(units - 1, 0), min(units, _SAMPLE)).astype(np.int64))
        sample = sizes(some) if units else np.ones(1, np.int64)
        self._memory, self._disk = _tiers(sample, memory - self.staging, disk, directory, fingerprint)
        self._tiers: list[MemoryTier | DiskTier] = [self._memory] + ([self._disk] if self._disk else [])
        self._base = [0]  # where each tier begins in the space of places; a place counts in ALIGN bytes
        for tier in self._tiers:
            self._base.append(self._base[-1] + tier.slabs.count * tier.slabs.slab)
        self.capacity = self._base[-1]
        wide = self.capacity // ALIGN >= 2**31 - 4
        self._place: NDArray[Any] = np.full(units, _NOWHERE, np.int64 if wide else np.int32)
        self._planned = np.zeros(units, np.uint16)  # announced blocks that use a unit
        self._staged: dict[int, _Staged] = {}
        self._open: dict[int, Block] = {}
        self._idle: deque[Units] = deque()  # kept units without a planned use, those that were used longest ago first
        self._idle_units = 0
        self._upcoming: tuple[Units, NDArray[np.int64]] | None = None  # units of the next block, and their sizes
        self._missed: int | None = None  # bytes of its misses
        self.live = self.staged = self.peak = 0
        self.counters = dict.fromkeys(("units", "misses", "bytes", "missed_bytes", "damaged", "kept"), 0)
        self.counters |= {f"{name}_bytes": 0 for name in ("memory", "disk", "shared")}
        self._adopt()

    # -- blocks ------------------------------------------------------------------------------------------------------

    def can_open(self) -> bool:
        """Whether the next block exists and its misses fit beside those of the blocks that are open."""
        if self.stop is not None and self.next >= self.stop:
            return False
        return not self._open or self.staged + self._missing() <= self.staging

    def open(self) -> Block:
        """The next block. MemoryError where one block alone exceeds what is set aside for misses."""
        units, sizes = self._next_units()
        number, missed = self.next, self._missing()
        if self.staged + missed > self.staging:
            raise MemoryError(
                f"cache: block {number} needs {missed} bytes that are not cached, beside {self.staged} of other open blocks, "
                f"but only {self.staging} of the cache's memory are set aside for these; raise data.cache.memory"
            )
        self._look()
        place = self._place[units]
        shared = units[place == _STAGED].tolist()
        for unit in shared:
            self._staged[unit].blocks += 1
        absent = place == _NOWHERE
        misses = units[absent]
        self._place[misses] = _STAGED
        missing = misses.tolist()
        self._staged.update(zip(missing, map(_Staged, sizes[absent].tolist())))
        address, kept = self._find(units, place, sizes)
        block = self._open[number] = Block(number, units, misses, self, missing + shared, address, kept)
        self.staged += missed
        self.next, self._upcoming, self._missed = number + 1, None, None
        self._count(place, sizes, missed)
        return block

    def replan(self, first: int) -> None:
        """Forgets what was announced of blocks from `first` on. To be called before the plan changes there.

        ValueError if such a block is open already.
        """
        if first < self.next:
            raise ValueError(f"cache: block {first} cannot change, blocks before {self.next} are being fetched")
        while self.far > first:
            self._retract()
        self._upcoming = self._missed = None

    def peek(self, unit: int) -> bytes | None:
        """A copy of a unit's bytes if they are here, for another process that asks; the cache takes no notice."""
        place = int(self._place[unit]) if 0 <= unit < len(self._place) else _NOWHERE
        if place == _STAGED:
            data = self._staged[unit].data
            return None if data is None else bytes(data)
        if place == _NOWHERE:
            return None
        size, address = int(self.sizes(np.array([unit]))[0]), place * ALIGN
        if address < self._base[1]:
            return bytes(self._memory.view[address : address + size])
        assert self._disk is not None
        found = self._disk.read(address - self._base[1], unit, size)
        return None if found is None else bytes(found)

    @property
    def occupied(self) -> int:
        """Bytes of both tiers in use, whole slabs."""
        return sum(tier.slabs.used for tier in self._tiers)

    def statistics(self) -> dict[str, float]:
        """Counters since the start, bytes in use by tier, blocks of look-ahead, hit rate in bytes and the best possible one."""
        return {
            **self.counters,
            "memory_used": self._memory.slabs.used + self.staged,
            "disk_used": self._disk.slabs.used if self._disk else 0,
            "look_ahead": self.far - self.next,
            "hit_rate": 1 - self.counters["missed_bytes"] / max(self.counters["bytes"], 1),
            "bound": hit_bound(self.capacity / max(self.total, 1), self.pin),
        }

    def close(self) -> None:
        """Gives memory back; what is on disk stays for the next start."""
        self._staged.clear()
        for tier in self._tiers:
            tier.close()

    def _next_units(self) -> tuple[Units, NDArray[np.int64]]:
        """The next block's units, and their sizes."""
        if self._upcoming is None:
            units = _distinct(self.plan(self.next))
            self._upcoming = units, self.sizes(units)
        return self._upcoming

    def _missing(self) -> int:
        """Bytes of the next block's units that are not here."""
        if self._missed is None:
            units, sizes = self._next_units()
            self._missed = int(sizes[self._place[units] == _NOWHERE].sum())
        return self._missed

    def _count(self, place: Units, sizes: NDArray[np.int64], missed: int) -> None:
        memory = (place >= 0) & (place < self._base[1] // ALIGN)
        in_memory, shared = int(sizes[memory].sum()), int(sizes[place == _STAGED].sum())
        everything = int(sizes.sum())
        for name, value in (
            ("units", len(place)),
            ("misses", int((place == _NOWHERE).sum())),
            ("bytes", everything),
            ("missed_bytes", missed),
            ("memory_bytes", in_memory),
            ("shared_bytes", shared),
            ("disk_bytes", everything - missed - in_memory - shared),
        ):
            self.counters[name] += value
        self._measure()

    def _measure(self) -> None:
        self.peak = max(self.peak, self.staged + self.occupied)

    # -- look-ahead --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Announces blocks while the budget has room for more of the future; a few at a time, so that no call takes long."""
        if self.pin:
            self.far = max(self.far, self.next + 1)
            return
        for _ in range(3):
            ahead = self.far - self.next
            if ahead > 0 and (self.live >= self.capacity or ahead >= self.look_ahead or self.far == self.stop):
                return
            units = self._next_units()[0] if self.far == self.next else _distinct(self.plan(self.far))
            fresh = units[self._planned[units] == 0]
            self.live += int(self._slot_bytes(fresh).sum())
            self._planned[units] += 1
            self.far += 1

    def _retract(self) -> None:
        """Takes back the farthest announcement; what only it needed is idle now, and the first to go."""
        self.far -= 1
        if self.pin:
            return
        units = _distinct(self.plan(self.far))
        self._planned[units] -= 1
        gone = units[self._planned[units] == 0]
        gone = gone[self._place[gone] >= 0]
        self.live -= int(self._slot_bytes(gone).sum())
        self._idle.appendleft(gone)
        self._idle_units += len(gone)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _find(
        self, units: Units, place: Units, sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], dict[int, tuple[int, int] | memoryview]]:
        """Addresses of the units in the memory tier (−1: not there), and places and sizes of those on disk."""
        border = self._base[1] // ALIGN
        address = np.where((place >= 0) & (place < border), place.astype(np.int64) * ALIGN, -1)
        if self._disk is None:
            return address, {}
        disk = place >= border
        return address, dict(zip(units[disk].tolist(), zip(place[disk].tolist(), sizes[disk].tolist())))

    def _put(self, unit: int, data: Any) -> None:
        staged = self._staged.get(unit)
        if staged is None:
            raise ValueError(f"cache: nothing waits for unit {unit}")
        view = memoryview(data).cast("B")
        if view.nbytes != staged.size:
            raise ValueError(f"cache: unit {unit} has {staged.size} bytes, got {view.nbytes}")
        staged.data = view

    def _get(self, block: Block, unit: int) -> memoryview | None:
        staged = self._staged.get(unit)
        if staged is not None and staged.data is not None:
            return staged.data
        i = int(np.searchsorted(block.units, unit))
        if i == len(block.units) or block.units[i] != unit:
            raise ValueError(f"cache: unit {unit} is not of block {block.number}")
        if (address := int(block._address[i])) >= 0:
            return self._memory.view[address : address + int(self.sizes(np.array([unit]))[0])]
        kept = block._kept.get(unit)
        if not isinstance(kept, tuple):
            return kept
        assert self._disk is not None
        place, size = kept
        data = self._disk.read(place * ALIGN - self._base[1], unit, size)
        if data is None:
            self._damaged(unit, size)
        else:
            block._kept[unit] = data
        return data

    def _damaged(self, unit: int, size: int) -> None:
        """Forgets a unit whose cached bytes are wrong; the blocks that are open wait for it to be fetched and put."""
        self.counters["damaged"] += 1
        units = np.array([unit], np.int64)
        if self._planned[unit]:
            self.live -= int(self._slot_bytes(units).sum())
        self._free(units)
        waiting = [block for block in self._open.values() if unit in block._kept]
        self._staged[unit] = _Staged(size, blocks=len(waiting))
        self._place[unit] = _STAGED
        self.staged += size
        for block in waiting:
            del block._kept[unit]
            block._staged.append(unit)

    def _close(self, block: Block) -> None:
        del self._open[block.number]
        self._missed = None  # what was staged may be kept or gone from here on
        if not self.pin:
            self._planned[block.units] -= 1
            done = block.units[self._planned[block.units] == 0]
            done = done[self._place[done] >= 0]
            self.live -= int(self._slot_bytes(done).sum())
            self._retire(done)
        over: list[int] = []
        data: dict[int, memoryview] = {}
        for unit in block._staged:
            staged = self._staged[unit]
            staged.blocks -= 1
            if staged.blocks == 0:
                del self._staged[unit]
                self.staged -= staged.size
                over.append(unit)
                if staged.data is not None:
                    data[unit] = staged.data
        self._place[np.array(over, np.int64)] = _NOWHERE
        self._keep(np.array(list(data), np.int64), np.array([v.nbytes for v in data.values()], np.int64), data)
        self._measure()

    def _keep(self, units: Units, sizes: NDArray[np.int64], data: dict[int, memoryview]) -> None:
        """Copies units into the tiers: those with a planned use, and the others as long as there is room anyway."""
        self._fill(units, sizes, data)
        largest = max((int(t.slabs.classes[-1]) - t.HEADER for t in self._tiers if t.slabs.count), default=0)
        for attempt in range(_ROUNDS):
            still = (self._place[units] == _NOWHERE) & (self._planned[units] > 0) & (sizes <= largest)
            units, sizes = units[still], sizes[still]
            if self.pin or not len(units):
                break
            if attempt < _ROUNDS - 1:
                self._make_room(sizes)
            else:  # there is room, but in slabs of other sizes: take one of them over
                self._vacate(sizes)
            self._fill(units, sizes, data)
        for tier in self._tiers:
            tier.flush()

    def _fill(self, units: Units, sizes: NDArray[np.int64], data: dict[int, memoryview]) -> None:
        """Puts as many of the units as have room into slots, those with a planned use first."""
        order = np.argsort(self._planned[units] == 0, kind="stable")
        units, sizes = units[order], sizes[order]
        for number, tier in enumerate(self._tiers):
            kinds = tier.slabs.class_of(sizes + tier.HEADER)
            for kind in np.unique(kinds[kinds < len(tier.slabs.classes)]).tolist():
                self._write(number, kind, units[kinds == kind], data)
            homeless = self._place[units] == _NOWHERE
            units, sizes = units[homeless], sizes[homeless]
            if not len(units):
                return

    def _write(self, number: int, kind: int, units: Units, data: dict[int, memoryview]) -> None:
        """Writes units of one size class into a tier, as far as it has slots."""
        tier, base = self._tiers[number], self._base[number]
        addresses = tier.slabs.take(kind, units)
        units = units[: len(addresses)]
        written = [tier.write(a, u, data[u]) for a, u in zip(addresses.tolist(), units.tolist())]
        if not all(written):
            good = np.array(written)
            tier.slabs.give(addresses[~good])
            units, addresses = units[good], addresses[good]
        self._place[units] = (addresses + base) // ALIGN
        wanted = self._planned[units] > 0
        self.live += int(wanted.sum()) * int(tier.slabs.classes[kind])
        self.counters["kept"] += len(units)
        if not self.pin:
            self._retire(units[~wanted])

    def _make_room(self, sizes: NDArray[np.int64]) -> None:
        """Frees slots for units of these sizes, of units that no announced block needs, announcing less if need be."""
        missing = len(sizes) - self._evict(sizes, len(sizes))
        for _ in range(_RETRACTIONS):
            if missing <= 0 or self.far <= self.next:
                return
            self._retract()
            missing -= self._evict(sizes, missing)

    def _evict(self, sizes: NDArray[np.int64], most: int) -> int:
        """Evicts idle units of the classes of these sizes, those that were used longest ago first. Returns how many."""
        usable = [tier.slabs.kinds_like(sizes + tier.HEADER) for tier in self._tiers]
        evicted, passed = 0, []
        while self._idle and evicted < most:
            some, together = [self._idle.popleft()], 0
            while self._idle and together < _IDLE:  # what was passed over stands in small pieces
                some.append(self._idle.popleft())
                together += len(some[-1])
            units = np.concatenate(some)
            units = units[(self._planned[units] == 0) & (self._place[units] >= 0)]
            fits = self._kind_in(units, usable)
            last = np.searchsorted(np.cumsum(fits), most - evicted) + 1
            gone, rest = units[:last][fits[:last]], np.concatenate([units[:last][~fits[:last]], units[last:]])
            gone = _distinct(gone)
            self._free(gone)
            evicted += len(gone)
            if len(rest):
                passed.append(rest)
        self._idle.extendleft(reversed(passed))
        self._idle_units = sum(map(len, self._idle))
        return evicted

    def _kind_in(self, units: Units, usable: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Whether each kept unit lies in a slot of a usable class (a mask of classes for each tier)."""
        place = self._place[units].astype(np.int64) * ALIGN
        out = np.zeros(len(units), bool)
        for base, end, tier, mask in zip(self._base, self._base[1:], self._tiers, usable):
            here = (place >= base) & (place < end)
            out[here] = mask[tier.slabs.kind[(place[here] - base) // tier.slabs.slab]]
        return out

    def _vacate(self, sizes: NDArray[np.int64]) -> None:
        """Empties the slab that holds least, for a class of which not one slot could be had."""
        tier = max(self._tiers, key=lambda t: t.slabs.count)
        units = tier.slabs.emptiest(~tier.slabs.kinds_like(sizes + tier.HEADER))
        in_use = np.concatenate([block.units for block in self._open.values()] or [units])
        if not np.isin(units, in_use).any():
            self.live -= int(self._slot_bytes(units[self._planned[units] > 0]).sum())
            self._free(units)

    def _retire(self, units: Units) -> None:
        """Marks kept units as idle. Units that were used again in between stand in the queue twice; it is tidied now and then."""
        if not len(units):
            return
        self._idle.extend(np.array_split(units, -(-len(units) // _IDLE)))
        self._idle_units += len(units)
        if self._idle_units > 2 * len(units) + 2 * sum(int(t.slabs.live.sum()) for t in self._tiers):
            everything = np.concatenate(self._idle)[::-1]
            last = np.sort(np.unique(everything, return_index=True)[1])[::-1]
            kept = everything[last]
            kept = kept[(self._planned[kept] == 0) & (self._place[kept] >= 0)]
            self._idle = deque(np.array_split(kept, -(-len(kept) // _IDLE))) if len(kept) else deque()
            self._idle_units = len(kept)

    def _free(self, units: Units) -> None:
        place = self._place[units].astype(np.int64) * ALIGN
        self._place[units] = _NOWHERE
        for base, end, tier in zip(self._base, self._base[1:], self._tiers):
            tier.slabs.give(place[(place >= base) & (place < end)] - base)

    def _slot_bytes(self, units: Units) -> NDArray[np.int64]:
        """Bytes of the slots of units; 0 for those that are not kept."""
        place = self._place[units].astype(np.int64) * ALIGN
        out = np.zeros(len(units), np.int64)
        for base, end, tier in zip(self._base, self._base[1:], self._tiers):
            here = (place >= base) & (place < end)
            out[here] = tier.slabs.slot_bytes(place[here] - base)
        return out

    def _adopt(self) -> None:
        """Finds again what a disk tier held before a restart."""
        if self._disk:
            address, unit, _ = self._disk.slabs.contents()
            strange = unit >= len(self._place)
            self._disk.slabs.give(address[strange])
            address, unit = address[~strange], unit[~strange]
            self._place[unit] = (address + self._base[1]) // ALIGN
            if not self.pin:
                self._retire(unit)


def _distinct(units: Units) -> Units:
    """The same as np.unique, whose hash table takes several times as long as sorting does."""
    out = np.sort(units)
    keep = np.ones(len(out), bool)
    np.not_equal(out[1:], out[:-1], out=keep[1:])
    return out[keep]


def _tiers(
    sample: NDArray[Any], memory: int, disk: int, directory: str, fingerprint: str
) -> tuple[MemoryTier, DiskTier | None]:
    """The tiers, with slabs and size classes that suit a sample of the units' sizes."""

    def shape(capacity: int, header: int) -> tuple[int, NDArray[np.int64]]:
        items = np.asarray(sample, np.int64) + header
        slab = slab_size(capacity, items)
        return slab, size_classes(items, capacity // slab, slab)

    if disk and not directory:
        raise ValueError("cache: a disk tier needs a folder (data.cache.dir)")
    on_disk = DiskTier(disk, *shape(disk, DiskTier.HEADER), directory, fingerprint) if disk else None
    return MemoryTier(memory, *shape(memory, MemoryTier.HEADER)), on_disk
