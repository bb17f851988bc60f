"""Streaming: if (nearly) all of a process's data fits its cache, read it once, shard by shard, in few large requests.

Rows come in random order. Reading on demand would therefore ask for each episode separately (with small episodes, hundreds of
requests for each megabyte), and it would take several passes until every episode had been drawn. Steps do not wait for the
streaming: they fetch what they need before it has arrived.
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

PIECE = 8 << 20  # most bytes of a piece, which is asked for as one
FLYING = 8  # pieces in flight for which memory is set aside
_MORE = 24  # further pieces in flight, as long as the cache has unused room for them


def pieces(units: UnitMap, wanted: Ints, most: int) -> Iterator[Ints]:
    """The wanted units in order of their places, in pieces of at most `most` bytes (or of one unit)."""
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
    """Memory for pieces in flight: what is set aside for them, and unused room that the cache lends."""

    def __init__(self, cache: RangeCache, most: int) -> None:
        self.cache, self.most = cache, most
        self.own, self.lent, self.flying = FLYING * most, 0, 0  # free bytes; lent bytes; pieces in flight

    def take(self, size: int) -> list[int] | None:
        """Take room for a piece. Returns the slabs that the cache lends for it (an empty list if none are needed), or None if
        there is no room now."""
        slabs = list[int]()
        if size <= self.own:
            self.own -= size
        # The cache needs room for this piece, and for the copies of it and of all pieces that it lends room to
        elif self.lent + size <= _MORE * self.most and self.cache.free >= self.lent + 2 * size:
            slabs = self.cache.lend(size)
            self.lent += size
        else:
            return None
        self.flying += 1
        return slabs

    def give(self, size: int, slabs: list[int]) -> None:
        """Give back what `take` returned for a piece of `size` bytes."""
        self.flying -= 1
        if slabs:
            self.lent -= size
            self.cache.take_back(slabs)
        else:
            self.own += size


async def stream(units: UnitMap, wanted: Ints, fetcher: Fetcher, cache: RangeCache, most: int) -> None:
    """Read the wanted units that the cache does not have, in pieces of `most` bytes, until the cache has no room.

    Pieces in flight take FLYING · `most` bytes beside the cache, and unused room of the cache. What cannot be
    read is ignored here: the steps that need it raise the error.
    """
    room, full, landed = _Room(cache, most), False, asyncio.Event()

    async def one(piece: Ints, size: int, slabs: list[int]) -> None:
        nonlocal full
        data: dict[int, Any] = {}
        try:
            await fetcher.fetch(piece, data.__setitem__)
            kept = cache.offer(data)
            full |= not kept and not room.lent  # lent room comes back: it may be enough
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
