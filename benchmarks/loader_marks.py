"""What several processes save by their homes: with four real loaders, and with the caches of eight simulated nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.plan import TASKS, SimulatedIndex
from benchmarks.store import StoreServer
from tiphys.dataio.cache import RangeCache, hit_bound
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home, Placement
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan
from tiphys.launch.loader_bench import all_fields, stack_windows, window_plan

ROWS, WINDOW = 512, 20
_UNIT = 64  # bytes of a simulated unit
Units = NDArray[np.int64]


def owners(plan: SamplingPlan, processes: int) -> NDArray[np.int64]:
    """Bucket -> the process that is home to most of it. Some buckets are cut between two homes."""
    held = np.zeros((plan.buckets, processes))
    for process in range(processes):
        for bucket, low, high in Placement(plan, Home(process, processes)).share():
            held[bucket, process] += high - low
    return held.argmax(axis=1)


# Four loaders


def four_homes(
    index: EpisodeIndex, server: StoreServer, share: float = 0.27, passes: int = 3, unit_rows: int = 0
) -> dict[str, Any]:
    """Store traffic of four loaders in each pass. Each loader may cache `share` of the data and makes a quarter of the rows.

    A pass has as many windows as there are disjoint ones. `home_share`: see the function of this name.
    """
    total = sum(column.total for column in UnitMap([index], [all_fields(index)], 1).columns)
    steps = int(index.steps.sum()) // (WINDOW * ROWS)
    plan = window_plan(index, ROWS, WINDOW)
    out: dict[str, Any] = {
        "bytes": total,
        "episodes": index.episodes,
        "buckets": plan.buckets,
        "steps_of_a_pass": steps,
    }
    budget = CacheBudget(memory=int(share * total))
    settings = LoaderSettings(cache=budget, requests=32, prefetch=32 << 20, unit_rows=unit_rows)
    loaders = [
        TrajectoryLoader(
            window_plan(index, ROWS, WINDOW), Home(process, 4), stack_windows, [all_fields(index)],
            settings=settings, stop=passes * steps,
        )
        for process in range(4)
    ]  # fmt: skip
    out["cache_plan"] = loaders[0].cache_plan()
    out["passes"] = []
    with contextlib.ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(loader)
            loader.start()
        for _ in range(passes):
            out["passes"].append(_one_pass(loaders, server, steps))
    out["store_over_delivered"] = out["passes"][-1]["store_over_delivered"]
    out["home_share"] = home_share(plan, 4, steps)
    return out


def _one_pass(loaders: Sequence[TrajectoryLoader], server: StoreServer, steps: int) -> dict[str, float]:
    total: dict[str, float] = {}
    before = server.counts()[1]
    for _ in range(steps):
        for loader in loaders:
            batch = next(loader)
            for name, value in batch.counters.items():
                total[name] = total.get(name, 0.0) + value
            batch.release()
    return {
        "store_over_delivered": total["bytes_store"] / total["bytes_delivered"],
        "server_over_delivered": (server.counts()[1] - before) / total["bytes_delivered"],
        "requests_per_window": total["requests"] / total["windows"],
    }


def home_share(plan: SamplingPlan, processes: int, steps: int) -> float:
    """Share of the windows that are made by the process that is home to most of their bucket."""
    owner, at_home, windows = owners(plan, processes), 0, 0
    places = [Placement(plan, Home(process, processes)) for process in range(processes)]
    for step in range(steps):
        bucket = plan.row_buckets(step)[1]
        for process, place in enumerate(places):
            rows = place.rows(step)
            at_home += int((owner[bucket[rows]] == process).sum())
            windows += len(rows)
    return at_home / windows


# Eight simulated nodes: plan, placement and caches are real, the bytes are not


class Simulation:
    """Windows of 20 steps of 50 tasks, several in a row of 1,024 tokens, from episodes of lognormal lengths. A unit is one step.

    There are as many buckets as rows. The plan chooses so many by itself from 200,000 episodes on, which is more than simulated.
    """

    def __init__(self, episodes: int, processes: int) -> None:
        self.index = SimulatedIndex(episodes)
        each = np.random.default_rng(1).integers(3, 45, TASKS)
        lengths = EntryLengths.plain(self.index.steps, WINDOW, each, tasks=TASKS)
        index: Any = self.index
        entry = PlanEntry(index=index, lengths=lengths, weight=1.0, name="simulated", tasks=range(TASKS))
        self.plan = SamplingPlan([entry], rows=ROWS, budget=1024, seed=3, buckets=ROWS)
        self.places = [Placement(self.plan, Home(process, processes)) for process in range(processes)]
        self.first = np.concatenate([[0], np.cumsum(self.index.steps, dtype=np.int64)])
        self.units = int(self.first[-1])

    def block(self, step: int, rows: Units | None = None) -> Units:
        """The units of some rows of a step, window by window."""
        planned = self.plan.windows(step, rows)
        ends = np.cumsum(planned.units)
        begin = self.first[planned.episode] + planned.start
        return np.arange(ends[-1]) + np.repeat(begin - (ends - planned.units), planned.units)

    def cache(self, place: Placement, share: float, in_flight: int) -> RangeCache:
        """The cache of a node. It may hold `share` of all units; `in_flight` units of it are set aside for a step's misses."""
        return RangeCache(
            self.units,
            lambda units: np.full(len(units), _UNIT),
            lambda step: self.block(step, place.rows(step)),
            total=self.units * _UNIT // len(self.places),
            memory=int(share * self.units) * _UNIT,
            staging=in_flight * _UNIT,
        )


def eight_nodes(episodes: int = 26_000, share: float = 0.05, nodes: int = 8) -> dict[str, Any]:
    """Units that nodes read from the store and from each other, as shares of the units that their windows use.

    Each node may keep `share` of all units, including what is set aside for units in flight. A unit that a node lacks comes from
    another node if one has it, which is possible if a bucket has two homes. Two passes over the data fill the caches and
    look-aheads (which are 1.4 passes long); a third pass is counted. For comparison (`lru_*`): the same windows if rows are dealt
    to the nodes in turn and all nodes share one LRU cache of the same total size.
    """
    simulated = Simulation(episodes, nodes)
    used = float(np.mean([len(simulated.block(step)) for step in range(8)]))
    steps = int(simulated.units / used)  # in a pass
    caches = [simulated.cache(place, share, int(1.4 * used / nodes)) for place in simulated.places]
    data = bytes(_UNIT)
    counts = np.zeros((3 * steps, 3), np.int64)  # used, from the store, from other nodes
    for step in range(3 * steps):
        for number, cache in enumerate(caches):
            block = cache.open()
            elsewhere = np.zeros(len(block.misses), bool)
            for other in caches[:number] + caches[number + 1 :]:
                elsewhere |= other.holds(block.misses)
            counts[step] += len(block.units), (~elsewhere).sum(), elsewhere.sum()
            for unit in block.misses.tolist():
                block.put(unit, data)
            block.close()
    quarters = [part.sum(axis=0) for part in np.array_split(counts, 12)]
    wanted, store, peer = counts[2 * steps :].sum(axis=0)
    kept = sum(cache.capacity for cache in caches) / (simulated.units * _UNIT)
    lru = shared_lru(simulated, int(share * nodes * simulated.units), 2 * steps, steps)
    return {
        "episodes": episodes,
        "buckets": simulated.plan.buckets,
        "units": simulated.units,
        "store": store / wanted,
        "peer": peer / wanted,
        "bound": 1 - hit_bound(share * nodes),
        "kept": kept,
        "bound_of_kept": 1 - hit_bound(kept),
        "lru_store": 1 - lru,
        "lru_peer": lru * (nodes - 1) / nodes,
        "store_by_quarter_pass": [float(part[1] / part[0]) for part in quarters],
    }


def shared_lru(simulated: Simulation, capacity: int, settle: int, count: int) -> float:
    """Hit rate of one LRU cache of `capacity` units, over `count` steps after `settle` steps.

    Counted in whole steps: the units last used in a step are kept as long as they fit together with all units used since.
    """
    last = np.full(simulated.units, -1, np.int64)  # step of each unit's last use
    of_step = np.zeros(settle + count, np.int64)  # number of units whose last use is in that step
    oldest, kept, hits, uses = 0, 0, 0, 0
    for step in range(settle + count):
        units = np.unique(simulated.block(step))
        before = last[units]
        if step >= settle:
            hits, uses = hits + int((before >= oldest).sum()), uses + len(units)
        np.subtract.at(of_step, before[before >= 0], 1)
        kept += len(units) - int((before >= oldest).sum())
        last[units], of_step[step] = step, len(units)
        while kept > capacity:
            kept -= int(of_step[oldest])
            oldest += 1
    return hits / uses
