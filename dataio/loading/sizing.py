"""Sizing: from a plan's first steps and a cache's budget to the units of a loader's data and the room for data in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.cache import hit_bound
from tiphys.dataio.loading.homes import bucket_bytes, home_bytes
from tiphys.dataio.loading.stream import PIECE
from tiphys.dataio.loading.unit_rows import UnitRowsModel
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home, Placement

if TYPE_CHECKING:
    from tiphys.dataio.loader import ProcessSpec

_SMALLEST = 64 << 10  # bytes of the smallest piece that is worth a request
_ROOMY = 8 << 20  # bytes of cache memory from which on there is room for several pieces
_NEARLY = 0.8  # share of the home's data that the cache must hold before streaming is worth it
_WASTE = 1.03  # bytes that data takes in the cache, over its own bytes
_TYPICAL = 256  # rows of the first step whose windows stand for all windows


@dataclass(frozen=True)
class Sizing:
    """How a loader cuts and keeps its data: see `sized`."""

    units: UnitMap
    staging: int  # bytes of the cache's memory that are set aside for data in flight
    home: int  # bytes of the data that is at home here
    piece: int  # bytes of each piece in which all of it is read once (stream.py); 0: there is no room for all of it

    def cache_plan(self, spec: ProcessSpec) -> dict[str, Any]:
        """For people, before a run: see `TrajectoryLoader.cache_plan`."""
        budget = spec.settings.cache
        kept = budget.memory - self.staging + budget.disk
        pin = not spec.plan.replacement
        return {
            "data_bytes": sum(column.total for column in self.units.columns),
            "home_bytes": self.home,
            "cache_bytes": {"memory": budget.memory, "disk": budget.disk, "in_flight": self.staging},
            "units": self.units.units,
            "unit_rows": {f"{self.units.datasets[c.dataset].url} {c.field}": c.unit_rows for c in self.units.columns},
            "policy": "pinned (each datum once an epoch)" if pin else "counted look-ahead",
            "whole_shards": self.piece > 0,
            "hit_bound": hit_bound(kept / max(self.home, 1), pin),
        }


def most_staging(memory: int) -> int:
    """Most bytes of the cache's memory that may be set aside for data in flight."""
    return memory * 7 // 8


def sized(placement: Placement, spec: ProcessSpec) -> Sizing:
    """Units whose lengths suit the data and the cache, and room in the cache for data in flight."""
    plan, budget = placement.plan, spec.settings.cache
    indexes = [entry.index for entry in plan.entries]
    first = spec.step if spec.stop is None else min(spec.step, max(spec.stop - 1, 0))
    some = [plan.windows(step, placement.rows(step)) for step in range(first, first + 4)]
    rough = UnitMap(indexes, spec.needs, 1 << 20)  # whole episodes: only to know the bytes of the data
    # The same windows in every process and after every restart: caches on disk and peers are of use only with the same units.
    typical = plan.windows(0, np.unique(np.linspace(0, plan.rows - 1, min(plan.rows, _TYPICAL)).astype(np.int64)))
    counts = rough.rows(typical)[1]
    memory, total = budget.memory, sum(column.total for column in rough.columns)
    of_buckets = bucket_bytes(plan, rough)
    homes = [
        Home(process, placement.home.processes, placement.home.weights) for process in range(placement.home.processes)
    ]
    largest = max(home_bytes(Placement(plan, home), of_buckets) for home in homes)
    kept = memory * 15 // 16 + budget.disk
    model = UnitRowsModel(
        window=float(counts.mean()) if len(counts) else 1.0,
        share=kept / max(_WASTE * largest, 1.0),
        tile=0 if plan.replacement else int(typical.units.max(initial=1)),
        room=memory // 16,
        total=total,
    )
    units = UnitMap(indexes, spec.needs, spec.settings.unit_rows or model.rows)
    steps = [np.unique(np.concatenate([s.units for s in units.spans(planned)] or [counts[:0]])) for planned in some]
    wanted = max(int(units.sizes(step).sum()) for step in steps)
    home = home_bytes(placement, of_buckets, first)
    nearly = kept >= _NEARLY * home  # then next to nothing will be in flight
    staging = min(max(5 * wanted // 4, memory // (64 if nearly else 32)), most_staging(memory))
    streams = nearly and memory >= _ROOMY and not all(index.store.local for index in units.datasets)
    return Sizing(
        units=units,
        staging=staging,
        home=int(home),
        piece=min(PIECE, max(memory // 512, _SMALLEST)) if streams else 0,
    )
