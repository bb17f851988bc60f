"""What is at home with a process: the episodes that its rows may draw, their bytes and their units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.placement import data_share

if TYPE_CHECKING:
    from tiphys.dataio.loading.units import Ints, UnitMap
    from tiphys.dataio.placement import Placement
    from tiphys.dataio.sampling import SamplingPlan


def drawable_episodes(plan: SamplingPlan, units: UnitMap) -> list[NDArray[np.bool_]]:
    """For each dataset, a mask of the episodes that some row may draw."""
    out = [np.zeros(index.episodes, bool) for index in units.datasets]
    for number, entry in enumerate(plan.entries):
        index = entry.index
        some = np.isin(index.task, np.asarray(entry.tasks)) & (index.held_out(plan.validation) == plan.held_out)
        if entry.priority is not None:
            some &= np.asarray(entry.priority) > 0
        out[units.entry_dataset[number]] |= some
    return out


def bucket_bytes(plan: SamplingPlan, units: UnitMap) -> NDArray[np.float64]:
    """float64 [buckets]: bytes of each bucket's episodes."""
    out = np.zeros(plan.buckets)
    mine = drawable_episodes(plan, units)
    for column in units.columns:
        some = np.flatnonzero(mine[column.dataset])
        bucket = np.asarray(column.index.hash)[some] % np.uint64(plan.buckets)
        out += np.bincount(bucket.astype(np.int64), column.bytes_of_episodes()[some], minlength=plan.buckets)
    return out


def home_bytes(placement: Placement, of_buckets: NDArray[np.float64], step: int = 0) -> float:
    """Bytes of the data that a process draws from. A bucket that is cut between two processes counts for both."""
    return float(of_buckets[list(data_share(placement.plan, placement.home, step))].sum())


def home_units(placement: Placement, units: UnitMap, step: int, part: float = 1.0) -> Ints:
    """Units of the episodes at home, ascending, by the weights in force at a step.

    part  share of the buckets to include. If there is no room for all, the buckets that this process serves least are left out.
    """
    plan, share = placement.plan, data_share(placement.plan, placement.home, step)
    most_first = sorted(share, key=lambda bucket: -share[bucket])
    here = np.zeros(plan.buckets, bool)
    here[most_first[: int(len(share) * min(part, 1.0))]] = True
    mine = drawable_episodes(plan, units)
    out = []
    for column in units.columns:
        index = column.index
        at_home = here[(np.asarray(index.hash) % np.uint64(plan.buckets)).astype(np.int64)]
        episodes = np.flatnonzero(mine[column.dataset] & at_home)
        low, high = column.base[episodes], column.base[episodes + 1]
        ends = np.cumsum(high - low)
        total = int(ends[-1]) if len(ends) else 0
        out.append(np.arange(total) + np.repeat(low - (ends - (high - low)), high - low) + column.first_unit)
    return np.concatenate(out) if out else np.zeros(0, np.int64)
