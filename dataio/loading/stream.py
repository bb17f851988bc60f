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
FLYING = 8


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
    flying, full = asyncio.Semaphore(FLYING), False

    async def one(piece: Ints) -> None:
        nonlocal full
        data: dict[int, Any] = {}
        try:
            await fetcher.fetch(piece, data.__setitem__)
        except StoreError:
            return
        finally:
            flying.release()
        full = not cache().offer({unit: memoryview(part).cast("B") for unit, part in data.items()})

    async with asyncio.TaskGroup() as tasks:
        for piece in pieces(units, wanted, most):
            await flying.acquire()
            if full:
                break
            absent = cache().absent(piece)
            if len(absent):
                tasks.create_task(one(absent))
            else:
                flying.release()
