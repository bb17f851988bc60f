"""Where all data of a process fit its cache, or nearly all, they are read once, shard by shard, in few large requests.

Rows come in random order, so that on-demand reading would ask for every episode by itself, for a data set of small episodes
hundreds of times as many requests as there are megabytes; and it would take several passes until each of them had been met.
Steps do not wait for this: what they need first they fetch themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dataio.storage import StoreError

if TYPE_CHECKING:
    from dataio.cache import RangeCache
    from dataio.loading.fetch import Fetcher
    from dataio.loading.units import Ints, UnitMap

PIECE = 8 << 20  # bytes of a piece at most: of what is asked for together
FLYING = 8  # pieces that are on their way at once, for which memory is set aside
_MORE = 24  # and how many more where the cache has free room for them


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


async def stream(units: UnitMap, wanted: Ints, fetcher: Fetcher, cache: Callable[[], RangeCache], most: int) -> None:
    """Reads what the cache has not got, in pieces of `most` bytes, until there is no room.

    What cannot be read is left to the steps that need it: they say what is wrong.
    """
    flying, full, landed = 0, False, asyncio.Event()

    async def one(piece: Ints) -> None:
        nonlocal flying, full
        data: dict[int, Any] = {}
        try:
            await fetcher.fetch(piece, data.__setitem__)
            full |= not cache().offer({unit: memoryview(part).cast("B") for unit, part in data.items()})
        except StoreError:
            pass
        finally:
            flying -= 1
            landed.set()

    async with asyncio.TaskGroup() as tasks:
        for piece in pieces(units, wanted, most):
            absent = cache().absent(piece)
            if not len(absent):
                continue
            while flying >= FLYING + min(_MORE, cache().free // (4 * most)):  # an empty cache lends its room
                landed.clear()
                await landed.wait()
            if full:
                break
            flying += 1
            tasks.create_task(one(absent))
