"""Sizing: from a plan's first steps and a cache's budget to the units of a loader's data and the room for what is on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.cache import hit_bound
from tiphys.dataio.loading.homes import bucket_bytes, home_bytes
from tiphys.dataio.loading.runs import RunModel
from tiphys.dataio.loading.stream import PIECE
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home, Placement

if TYPE_CHECKING:
    from tiphys.dataio.loader import LoaderSettings
    from tiphys.dataio.sampling import SamplingPlan

_SMALLEST = 64 << 10  # bytes of a piece that is worth its while
_ROOMY = 8 << 20  # bytes of memory from which on there is room for some of them
_NEARLY = 0.8  # of the data at home that fit the cache, from which on streaming is worth its while
_WASTE = 1.03  # what data take in the cache, over what they weigh
_TYPICAL = 256  # rows of the first step whose windows show what windows are like


@dataclass(frozen=True)
class Sizing:
    """How a loader cuts and keeps its data: see `sized`."""

    units: UnitMap
    staging: int  # bytes of the cache's memory for what is on its way
    home: int  # bytes of the data that are at home here
    piece: int  # bytes of each piece in which all of it is read once (stream.py); 0: there is no room for all

    def describe(self, settings: LoaderSettings) -> dict[str, Any]:
        """For people, before a run: what is cached of what, in which pieces, and how well that can do at best."""
        kept = settings.cache.memory - self.staging + settings.cache.disk
        pin = not settings.plan.replacement
        runs = {f"{self.units.datasets[c.dataset].url} {c.field}": c.run for c in self.units.columns}
        return {
            "data_bytes": sum(column.total for column in self.units.columns),
            "home_bytes": self.home,
            "cache_bytes": {"memory": settings.cache.memory, "disk": settings.cache.disk, "on_its_way": self.staging},
            "units": self.units.units,
            "rows_of_a_unit": runs,
            "policy": "pinned (each datum once an epoch)" if pin else "counted look-ahead",
            "whole_shards": self.piece > 0,
            "hit_bound": hit_bound(kept / max(self.home, 1), pin),
        }


def most_staging(memory: int) -> int:
    """What may be set aside at most of the cache's memory for what is on its way."""
    return memory * 7 // 8


def sized(plan: SamplingPlan, placement: Placement, settings: LoaderSettings) -> Sizing:
    """Units of lengths that suit the data and the cache, and room in the cache for what is on its way."""
    indexes = [entry.index for entry in plan.entries]
    first = settings.step if settings.stop is None else min(settings.step, max(settings.stop - 1, 0))
    some = [plan.windows(step, placement.rows(step)) for step in range(first, first + 4)]
    rough = UnitMap(indexes, settings.needs, 1 << 20)  # whole episodes: only to know what the data weigh
    # The same windows in every process and after every restart: caches on disk and peers agree on the units, or are of no use.
    typical = plan.windows(0, np.unique(np.linspace(0, plan.rows - 1, min(plan.rows, _TYPICAL)).astype(np.int64)))
    counts = rough.rows(typical)[1]
    memory, total = settings.cache.memory, sum(column.total for column in rough.columns)
    of_buckets = bucket_bytes(plan, rough)
    homes = [
        Home(process, placement.home.processes, placement.home.weights) for process in range(placement.home.processes)
    ]
    largest = max(home_bytes(Placement(plan, home), of_buckets) for home in homes)
    kept = memory * 15 // 16 + settings.cache.disk
    tile = 0 if plan.replacement else int(typical.units.max(initial=1))
    share = kept / max(_WASTE * largest, 1.0)
    model = RunModel(float(counts.mean()) if len(counts) else 1.0, share, tile, memory // 16, total)
    units = UnitMap(indexes, settings.needs, settings.run or model.rows)
    steps = [np.unique(np.concatenate([s.units for s in units.spans(planned)] or [counts[:0]])) for planned in some]
    wanted = max(int(units.sizes(step).sum()) for step in steps)
    home = home_bytes(placement, of_buckets, first)
    nearly = kept >= _NEARLY * home  # then next to nothing will be on its way
    staging = min(max(5 * wanted // 4, memory // (64 if nearly else 32)), most_staging(memory))
    streams = nearly and memory >= _ROOMY and not all(index.store.local for index in units.datasets)
    return Sizing(units, staging, int(home), min(PIECE, max(memory // 512, _SMALLEST)) if streams else 0)
