"""Where all data of a process fit its cache, they are read once, shard by shard, in few large requests.

Rows come in random order, so that on-demand reading would ask for every episode by itself: for a data set of small episodes
hundreds of times as many requests as there are megabytes. Steps do not wait for this: what they need first they fetch themselves.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dataio.episode import DataError
from dataio.storage import StoreError

if TYPE_CHECKING:
    from dataio.cache import RangeCache
    from dataio.loading.fetch import Fetcher
    from dataio.loading.units import Ints, UnitMap
    from dataio.placement import Placement
    from dataio.sampling import SamplingPlan

REQUEST = 8 << 20  # bytes of a request at most
FLYING = 4
_GAP = 16 << 10  # bytes between two wanted units that are read along rather than asked for separately


def wanted_units(plan: SamplingPlan, placement: Placement, units: UnitMap, step: int) -> Ints:
    """Units of the episodes that this home may draw from step `step` on, by the weights in force there; ascending."""
    here = np.zeros(plan.buckets, bool)
    here[[bucket for bucket, _, _ in placement.share(step)]] = True
    drawn = [np.zeros(index.episodes, bool) for index in units.datasets]
    for number, entry in enumerate(plan.entries):
        index, dataset = entry.index, units.entry_dataset[number]
        some = np.isin(index.task, np.asarray(entry.tasks)) & here[np.asarray(index.hash) % np.uint64(plan.buckets)]
        if entry.priority is not None:
            some &= np.asarray(entry.priority) > 0
        drawn[dataset] |= some & (index.held_out(plan.validation) == plan.held_out)
    parts = []
    for column in units.columns:
        episodes = np.flatnonzero(drawn[column.dataset])
        low, high = column.base[episodes], column.base[episodes + 1]
        count = high - low
        ends = np.cumsum(count)
        parts.append(np.arange(count.sum()) + np.repeat(low - (ends - count), count) + column.first_unit)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def requests(units: UnitMap, wanted: Ints, most: int) -> Iterator[Ints]:
    """The wanted units, by place, in groups that lie together in a shard and take at most `most` bytes (or are one unit)."""
    where = units.ranges(wanted)
    order = np.lexsort((where.offset, where.shard, where.dataset))
    begin, end = where.offset[order], (where.offset + where.size)[order]
    file = where.dataset[order] << 32 | where.shard[order]
    cut = np.flatnonzero((file[1:] != file[:-1]) | (begin[1:] > end[:-1] + _GAP)) + 1
    for low, high in itertools.pairwise([0, *cut.tolist(), len(order)]):
        first = low
        while first < high:
            last = max(first + 1, first + int(np.searchsorted(end[first:high], begin[first] + most, side="right")))
            yield wanted[order[first:last]]
            first = last


async def stream(units: UnitMap, wanted: Ints, fetcher: Fetcher, cache: Callable[[], RangeCache], most: int) -> None:
    """Reads what the cache has not got, `most` bytes a request, until there is no room.

    What cannot be read is left to the steps that need it: they say what is wrong.
    """
    flying, full = asyncio.Semaphore(FLYING), False

    async def one(group: Ints) -> None:
        nonlocal full
        try:
            full = not cache().offer(await fetcher.read_together(group))
        except (DataError, FileNotFoundError, StoreError):
            pass
        finally:
            flying.release()

    async with asyncio.TaskGroup() as tasks:
        for group in requests(units, wanted, most):
            await flying.acquire()
            if full:
                break
            absent = cache().absent(group)
            if len(absent):
                tasks.create_task(one(absent))
            else:
                flying.release()
