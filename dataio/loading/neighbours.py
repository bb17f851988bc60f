"""Neighbours: units that lie after those that a step misses, read by the same request of a hub while the cache has unused room.

A request of a hub takes long and is counted, and groups of pictures are small. Until the cache is full, a miss is therefore
read with what follows it in its file, up to 8 MiB. The cache keeps it for later steps, because all data at home is drawn in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.loading.stream import FLYING
from tiphys.dataio.stores.ranges import PART

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.cache import RangeCache
    from tiphys.dataio.loading.fetch import Fetcher
    from tiphys.dataio.loading.units import Ints, UnitMap

_MOST = FLYING * PART  # most bytes of neighbours in flight
_STEPS = 4096  # most units after a miss
_HUB = "hf://"


def on_hubs(units: UnitMap) -> bool:
    """Whether any shard lies on a hub."""
    return any(_HUB in (index.url[: len(_HUB)], s.name[: len(_HUB)]) for index in units.datasets for s in index.shards)


class Neighbours:
    """Fetches units as a Fetcher does, with their neighbours.

    home  int64: the units that steps of this process may need; only these are read as neighbours
    """

    def __init__(self, units: UnitMap, fetcher: Fetcher, cache: RangeCache, home: Ints) -> None:
        self._units, self._fetcher, self._cache = units, fetcher, cache
        self._home = np.zeros(units.units, bool)
        self._home[home] = True
        self._flying: dict[int, asyncio.Future[dict[int, bytes]]] = {}  # neighbours that were asked for
        self._bytes = 0  # of them
        self._hub = [
            np.array([(s.name if "://" in s.name else index.url).startswith(_HUB) for s in index.shards], bool)
            for index in units.datasets
        ]

    async def fetch(self, units: Ints, put: Callable[[int, Buffer], None]) -> dict[int, Exception]:
        """As `Fetcher.fetch`. Neighbours go to the cache; that one of them cannot be read is ignored."""
        waited = [unit for unit in units.tolist() if unit in self._flying]
        own = units[~np.isin(units, waited)] if waited else units
        arriving = {unit: self._flying[unit] for unit in waited}
        failed = await self._fetch(own, put)
        left = []
        for unit, future in arriving.items():
            data = (await asyncio.shield(future)).get(unit)
            if data is None:
                left.append(unit)
            else:
                put(unit, data)
        return failed | await self._fetcher.fetch(np.array(left, np.int64), put) if left else failed

    async def _fetch(self, own: Ints, put: Callable[[int, Buffer], None]) -> dict[int, Exception]:
        more, size = self._beside(own)
        if not len(more):
            return await self._fetcher.fetch(own, put)
        slabs = self._cache.lend(size)
        arrived = asyncio.get_running_loop().create_future()
        self._flying.update(dict.fromkeys(more.tolist(), arrived))
        self._bytes += size
        wanted, data = set(own.tolist()), dict[int, bytes]()

        def take(unit: int, part: Buffer) -> None:  # a copy: the whole answer must not stay in memory for a part of it
            if unit in wanted:
                put(unit, bytes(part))
            else:
                data[unit] = bytes(part)

        try:
            failed = await self._fetcher.fetch(np.concatenate([own, more]), take)
        except BaseException:  # the cache may have been closed
            data.clear()
            raise
        finally:
            for unit in more.tolist():
                del self._flying[unit]
            self._bytes -= size
            self._cache.take_back(slabs)
            if data:
                self._cache.offer(data)
            arrived.set_result(data)
        again = np.array([unit for unit in failed if unit in wanted], np.int64)
        return await self._fetcher.fetch(again, put) if len(again) else {}

    def _beside(self, own: Ints) -> tuple[Ints, int]:
        """The neighbours of units to read now, and their bytes."""
        where = self._units.ranges(own)
        hub = np.array([self._hub[d][s] for d, s in zip(where.dataset, where.shard, strict=True)], bool)
        room = min(_MOST - self._bytes, self._cache.free // 2 - self._bytes)
        nothing = np.zeros(0, np.int64), 0
        if not hub.any() or room <= 0:
            return nothing
        begins = np.sort(own[hub])
        begins = begins[np.unique(np.linspace(0, len(begins) - 1, 2 * FLYING).astype(np.int64))]  # more finds no room
        around = self._units.ranges(begins)
        mean = max(int(around.size.mean()), 1)
        steps = np.arange(1, min(PART // mean, _STEPS) + 2)
        near = np.unique((begins[:, None] + steps).ravel())
        near = near[near < self._units.units]
        near = self._cache.absent(near[self._home[near]])
        near = near[~np.isin(near, [*own.tolist(), *self._flying])]
        place = self._units.ranges(near)
        before = np.searchsorted(begins, near, side="right") - 1
        same = (place.dataset == around.dataset[before]) & (place.shard == around.shard[before])
        ahead = place.offset + place.size - around.offset[before]
        same &= (ahead > 0) & (ahead <= PART)
        near, sizes = near[same], place.size[same]
        count = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
        return (near[:count], int(sizes[:count].sum())) if count else nothing
