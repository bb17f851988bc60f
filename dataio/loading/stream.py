"""Where all data of a process fit its cache, or nearly all, they are read once, shard by shard, in few large requests.

Rows come in random order, so that on-demand reading would ask for every episode by itself, for a data set of small episodes
hundreds of times as many requests as there are megabytes; and it would take several passes until each of them had been met.
Steps do not wait for this: what they need first they fetch themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.storage import StoreError

if TYPE_CHECKING:
    from tiphys.dataio.cache import RangeCache
    from tiphys.dataio.loading.fetch import Fetcher
    from tiphys.dataio.loading.units import Ints, UnitMap

PIECE = 8 << 20  # bytes of a piece at most: of what is asked for together
FLYING = 8  # pieces that are on their way at once, for which memory is set aside
_MORE = 24  # and how many more while the cache has room for them that nothing uses yet


def pieces(units: UnitMap, wanted: Ints, most: int) -> Iterator[Ints]:
    """The wanted units, by place, in pieces of at most `most` bytes (or of one unit)."""
    where = units.ranges(wanted)
    order = np.lexsort((where.offset, where.shard, where.dataset))
    ends = np.cumsum(where.size[order])
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield wanted[order[first:last]]
        first = last


class _Room:
    """Memory for pieces on their way: what is set aside for them, and room that the cache lends while nothing uses it."""

    def __init__(self, cache: RangeCache, most: int) -> None:
        self.cache, self.most = cache, most
        self.own, self.lent, self.flying = FLYING * most, 0, 0  # bytes that are free; bytes lent; pieces

    def take(self, size: int) -> list[int] | None:
        """Room for a piece: the slabs that the cache lends for it, none where none are needed. None: there is no room now."""
        slabs = list[int]()
        if size <= self.own:
            self.own -= size
        elif self.lent + size <= _MORE * self.most and self.cache.free >= self.lent + 2 * size:  # to land in, too
            slabs = self.cache.lend(size)
            self.lent += size
        else:
            return None
        self.flying += 1
        return slabs

    def give(self, size: int, slabs: list[int]) -> None:
        self.flying -= 1
        if slabs:
            self.lent -= size
            self.cache.take_back(slabs)
        else:
            self.own += size


async def stream(units: UnitMap, wanted: Ints, fetcher: Fetcher, cache: RangeCache, most: int) -> None:
    """Reads what the cache has not got, in pieces of `most` bytes, until there is no room.

    Pieces on their way take FLYING · `most` bytes, which are not the cache's, and room of the cache that nothing uses.
    What cannot be read is left to the steps that need it: they say what is wrong.
    """
    room, full, landed = _Room(cache, most), False, asyncio.Event()

    async def one(piece: Ints, size: int, slabs: list[int]) -> None:
        nonlocal full
        data: dict[int, Any] = {}
        try:
            await fetcher.fetch(piece, data.__setitem__)
            kept = cache.offer(data)
            full |= not kept and not room.lent  # what is lent comes back: it may be enough
        except StoreError:
            pass
        finally:
            data.clear()
            room.give(size, slabs)
            landed.set()

    async with asyncio.TaskGroup() as tasks:
        for piece in pieces(units, wanted, most):
            absent = cache.absent(piece)
            size, slabs = int(units.sizes(absent).sum()), None
            while size and not full and (slabs := room.take(size)) is None and room.flying:
                landed.clear()
                await landed.wait()
            if full:
                break
            if slabs is not None:
                tasks.create_task(one(absent, size, slabs))
