"""KeptUnits: what a cache holds in its tiers, how many announced blocks need each unit, and which units are evicted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.caching.slabs import ALIGN, size_classes, slab_size
from tiphys.dataio.caching.tiers import DiskTier, MemoryTier, room_for_items
from tiphys.dataio.episode import DataError

Units = NDArray[np.int64]
NOWHERE, STAGED = -1, -2  # place of a unit that is not here; place of a unit whose bytes an open block holds
_ROUNDS = 3  # of making room for the units of a block
_RETRACTIONS = 8  # announced blocks that a round may take back
_IDLE = 4096  # most units in one element of the queue of idle units
_SAMPLE = 16384  # units whose sizes determine slabs and size classes


class KeptUnits:
    """Units in memory and on disk. A unit without a planned use is idle: it stays as long as its room is not needed.

    place     [units]: a unit's address in both tiers one after the other, in steps of ALIGN bytes; or NOWHERE; or STAGED
    planned   uint16 [units]: number of announced blocks that use the unit
    live      bytes of the slots of units with a planned use
    capacity  bytes of both tiers
    retract   called if there is not enough room: takes one announcement back; returns False if there is none
    """

    def __init__(
        self,
        units: int,
        sizes: Callable[[Units], NDArray[np.int64]],
        *,
        memory: int,
        disk: int,
        directory: str,
        fingerprint: str,
        pin: bool,
        retract: Callable[[], bool],
    ) -> None:
        self.sizes, self.pin, self._retract = sizes, pin, retract
        some = np.unique(np.linspace(0, max(units - 1, 0), min(units, _SAMPLE)).astype(np.int64))
        sample = sizes(some) if units else np.ones(1, np.int64)
        self.memory, self.disk = _tiers(sample, memory, disk, directory, fingerprint)
        self._tiers: list[MemoryTier | DiskTier] = [self.memory] + ([self.disk] if self.disk else [])
        self.base = [0]  # where each tier begins
        for tier in self._tiers:
            self.base.append(self.base[-1] + tier.slabs.count * tier.slabs.slab)
        self.capacity = self.base[-1]
        wide = self.capacity // ALIGN >= 2**31 - 4
        self.place: NDArray[Any] = np.full(units, NOWHERE, np.int64 if wide else np.int32)
        self.planned = np.zeros(units, np.uint16)
        self.live = self.written = 0
        self._idle: deque[Units] = deque()  # the unit used longest ago comes first
        self._idle_units = 0
        self._adopt()

    @property
    def occupied(self) -> int:
        """Bytes of both tiers in use, in whole slabs."""
        return sum(tier.slabs.used for tier in self._tiers)

    @property
    def memory_used(self) -> int:
        """Bytes of the memory tier in use, in whole slabs."""
        return self.memory.slabs.used

    @property
    def disk_used(self) -> int:
        """Bytes of the disk tier in use, in whole slabs; 0 without a disk tier."""
        return self.disk.slabs.used if self.disk else 0

    @property
    def metadata_bytes(self) -> int:
        """Bytes of `place` and `planned`."""
        return self.place.nbytes + self.planned.nbytes

    @property
    def memory_view(self) -> memoryview:
        """All bytes of the memory tier."""
        return self.memory.view

    @property
    def free(self) -> int:
        """Bytes of the memory tier that are neither used nor lent."""
        return self.memory.slabs.free

    def lend(self, size: int) -> list[int]:
        """Withhold free slabs of the memory tier, `size` bytes or more together. There must be as much free room."""
        return self.memory.slabs.withhold(size)

    def take_back(self, slabs: list[int]) -> None:
        """Make the slabs that `lend` returned usable again."""
        self.memory.slabs.release(slabs)

    def holds(self, units: Units) -> NDArray[np.bool_]:
        """Mask of the units that are kept in a tier."""
        return self.place[units] >= 0

    def in_memory(self, place: Units) -> NDArray[np.bool_]:
        """Mask of the places that lie in the memory tier."""
        return (place >= 0) & (place < self.base[1] // ALIGN)

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()

    # -- uses --------------------------------------------------------------------------------------------------------

    def announce(self, units: Units) -> None:
        """One more block needs these units (each once)."""
        fresh = units[self.planned[units] == 0]
        self.live += int(self.slot_bytes(fresh).sum())
        self.planned[units] += 1

    def used(self, units: Units, *, last: bool = True) -> None:
        """One fewer block needs these units. Units that no block needs become idle; with `last=False` they are evicted first."""
        self.planned[units] -= 1
        done = units[self.planned[units] == 0]
        done = done[self.place[done] >= 0]
        self.live -= int(self.slot_bytes(done).sum())
        if last:
            self._retire(done)
        else:
            self._idle.appendleft(done)
            self._idle_units += len(done)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def find(
        self, units: Units, place: Units, sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], dict[int, tuple[int, int] | memoryview]]:
        """The units' addresses in the memory tier (−1: not there), and the places and sizes of the units on disk."""
        address = np.where(self.in_memory(place), place.astype(np.int64) * ALIGN, -1)
        if self.disk is None:
            return address, {}
        disk = place >= self.base[1] // ALIGN
        return address, dict(zip(units[disk].tolist(), zip(place[disk].tolist(), sizes[disk].tolist())))

    def read(self, unit: int, place: int, size: int) -> memoryview | None:
        """The bytes of a unit that is kept at `place`; None if the copy on disk is damaged."""
        address = place * ALIGN
        if address < self.base[1]:
            return self.memory.view[address : address + size]
        assert self.disk is not None
        return self.disk.read(address - self.base[1], unit, size)

    def rewrite(self, unit: int, data: memoryview) -> None:
        """Replace the bytes of a kept unit by others of the same size."""
        address, number = int(self.place[unit]) * ALIGN, 0
        while address >= self.base[number + 1]:
            number += 1
        self._tiers[number].write(np.array([address - self.base[number]]), np.array([unit]), {unit: data})

    def forget(self, units: Units) -> None:
        """Drop kept units, even if blocks need them."""
        self.live -= int(self.slot_bytes(units[self.planned[units] > 0]).sum())
        self._free(units)

    def keep(self, units: Units, sizes: NDArray[np.int64], data: Mapping[int, Any], in_use: list[Units]) -> None:
        """Copy units into the tiers: those with a planned use, and the others only if there is free room. Units of `in_use`
        are not evicted."""
        self._fill(units, sizes, data)
        largest = max((int(t.slabs.classes[-1]) - t.HEADER for t in self._tiers if t.slabs.count), default=0)
        for attempt in range(_ROUNDS):
            still = (self.place[units] == NOWHERE) & (self.planned[units] > 0) & (sizes <= largest)
            units, sizes = units[still], sizes[still]
            if self.pin or not len(units):
                break
            if attempt < _ROUNDS - 1:
                self._make_room(sizes)
            else:  # there is room, but in slabs of other sizes: empty one of them
                self._vacate(sizes, in_use)
            self._fill(units, sizes, data)
        for tier in self._tiers:
            tier.flush()

    def _fill(self, units: Units, sizes: NDArray[np.int64], data: Mapping[int, Any]) -> None:
        """Put as many of the units into free slots as there are, those with a planned use first."""
        order = np.argsort(self.planned[units] == 0, kind="stable")
        units, sizes = units[order], sizes[order]
        for number, tier in enumerate(self._tiers):
            kinds = tier.slabs.class_of(sizes + tier.HEADER)
            for kind in sorted(set(kinds[kinds < len(tier.slabs.classes)].tolist())):
                self._write(number, kind, units[kinds == kind], data)
            homeless = self.place[units] == NOWHERE
            units, sizes = units[homeless], sizes[homeless]
            if not len(units):
                return

    def _write(self, number: int, kind: int, units: Units, data: Mapping[int, Any]) -> None:
        """Write units of one size class into a tier, as far as it has free slots."""
        tier, base = self._tiers[number], self.base[number]
        addresses = tier.slabs.take(kind, units)
        units = units[: len(addresses)]
        good = tier.write(addresses, units, data)
        if not good.all():
            tier.slabs.give(addresses[~good])
            units, addresses = units[good], addresses[good]
        self.place[units] = (addresses + base) // ALIGN
        wanted = self.planned[units] > 0
        self.live += int(wanted.sum()) * int(tier.slabs.classes[kind])
        self.written += len(units)
        if not self.pin:
            self._retire(units[~wanted])

    def _make_room(self, sizes: NDArray[np.int64]) -> None:
        """Free slots for units of these sizes: evict idle units, and if that is not enough, take announcements back."""
        missing = len(sizes) - self._evict(sizes, len(sizes))
        for _ in range(_RETRACTIONS):
            if missing <= 0 or not self._retract():
                return
            missing -= self._evict(sizes, missing)

    def _evict(self, sizes: NDArray[np.int64], most: int) -> int:
        """Evict idle units in slots of these sizes' classes, the one used longest ago first. Returns how many were evicted."""
        usable = [tier.slabs.kinds_like(sizes + tier.HEADER) for tier in self._tiers]
        evicted, passed = 0, []
        while self._idle and evicted < most:
            some, together = [self._idle.popleft()], 0
            while self._idle and together < _IDLE:  # units that were skipped before stand in small elements
                some.append(self._idle.popleft())
                together += len(some[-1])
            units = np.concatenate(some)
            units = units[(self.planned[units] == 0) & (self.place[units] >= 0)]
            fits = self._kind_in(units, usable)
            last = np.searchsorted(np.cumsum(fits), most - evicted) + 1
            gone, rest = units[:last][fits[:last]], np.concatenate([units[:last][~fits[:last]], units[last:]])
            gone = distinct(gone)
            self._free(gone)
            evicted += len(gone)
            if len(rest):
                passed.append(rest)
        self._idle.extendleft(reversed(passed))
        self._idle_units = sum(map(len, self._idle))
        return evicted

    def _kind_in(self, units: Units, usable: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Mask of the kept units whose slots are of a usable class. `usable`: for each tier, a mask of its classes."""
        place = self.place[units].astype(np.int64) * ALIGN
        out = np.zeros(len(units), bool)
        for base, end, tier, mask in zip(self.base, self.base[1:], self._tiers, usable):
            here = (place >= base) & (place < end)
            out[here] = mask[tier.slabs.kind[(place[here] - base) // tier.slabs.slab]]
        return out

    def _vacate(self, sizes: NDArray[np.int64], in_use: list[Units]) -> None:
        """Empty the slab that holds least, for a size class of which there is no free slot."""
        tier = max(self._tiers, key=lambda t: t.slabs.count)
        units = tier.slabs.emptiest(~tier.slabs.kinds_like(sizes + tier.HEADER))
        if not np.isin(units, np.concatenate([*in_use, units[:0]])).any():
            self.forget(units)

    def _retire(self, units: Units) -> None:
        """Put kept units at the end of the queue of idle units. A unit that was used again stands in the queue twice, so the
        queue is cleaned from time to time."""
        if not len(units):
            return
        self._idle.extend([units] if len(units) <= _IDLE else np.array_split(units, -(-len(units) // _IDLE)))
        self._idle_units += len(units)
        if self._idle_units > 2 * len(units) + 2 * sum(int(t.slabs.live.sum()) for t in self._tiers):
            everything = np.concatenate(self._idle)[::-1]
            last = np.sort(np.unique(everything, return_index=True)[1])[::-1]
            kept = everything[last]
            kept = kept[(self.planned[kept] == 0) & (self.place[kept] >= 0)]
            self._idle = deque(np.array_split(kept, -(-len(kept) // _IDLE))) if len(kept) else deque()
            self._idle_units = len(kept)

    def _free(self, units: Units) -> None:
        place = self.place[units].astype(np.int64) * ALIGN
        self.place[units] = NOWHERE
        for base, end, tier in zip(self.base, self.base[1:], self._tiers):
            tier.slabs.give(place[(place >= base) & (place < end)] - base)

    def slot_bytes(self, units: Units) -> NDArray[np.int64]:
        """Bytes of the units' slots; 0 for units that are not kept."""
        place = self.place[units].astype(np.int64) * ALIGN
        out = np.zeros(len(units), np.int64)
        for base, end, tier in zip(self.base, self.base[1:], self._tiers):
            here = (place >= base) & (place < end)
            out[here] = tier.slabs.slot_bytes(place[here] - base)
        return out

    def _adopt(self) -> None:
        """Take over what the disk tier held before a restart."""
        if self.disk:
            address, unit, _ = self.disk.slabs.contents()
            strange = unit >= len(self.place)
            self.disk.slabs.give(address[strange])
            address, unit = address[~strange], unit[~strange]
            self.place[unit] = (address + self.base[1]) // ALIGN
            if not self.pin:
                self._retire(unit)


def distinct(units: Units) -> Units:
    """The same as np.unique. Sorting is several times as fast as the hash table of np.unique."""
    out = np.sort(units)
    keep = np.ones(len(out), bool)
    np.not_equal(out[1:], out[:-1], out=keep[1:])
    return out[keep]


def _tiers(
    sample: NDArray[Any], memory: int, disk: int, directory: str, fingerprint: str
) -> tuple[MemoryTier, DiskTier | None]:
    """The tiers, with slabs and size classes that suit a sample of the units' sizes. Raises DataError for a disk tier
    without a folder."""

    def shape(capacity: int, header: int) -> tuple[int, NDArray[np.int64]]:
        items = np.asarray(sample, np.int64) + header
        slab = slab_size(capacity, items)
        return slab, size_classes(items, capacity // slab, slab)

    if disk and not directory:
        raise DataError("cache: a disk tier needs a folder: set data.cache.dir, or data.cache.disk to 0")
    room = room_for_items(disk, float(np.mean(sample)) + DiskTier.HEADER) if len(sample) else disk
    on_disk = DiskTier(room, *shape(room, DiskTier.HEADER), directory, fingerprint) if disk else None
    return MemoryTier(memory, *shape(memory, MemoryTier.HEADER)), on_disk
