"""What several processes save together: rows at their homes over real loaders, and the caches of eight simulated nodes."""

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
from tiphys.dataio.loader import CacheBudget, TrajectoryLoader
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home, Placement
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan
from tiphys.launch.loader_bench import all_fields, stack_windows, window_plan

ROWS, WINDOW = 512, 20
_UNIT = 64  # bytes of a simulated unit
Units = NDArray[np.int64]


def owners(plan: SamplingPlan, processes: int) -> NDArray[np.int64]:
    """Bucket -> the process that is home to most of it: cuts through buckets give some of them two homes."""
    held = np.zeros((plan.buckets, processes))
    for process in range(processes):
        for bucket, low, high in Placement(plan, Home(process, processes)).share():
            held[bucket, process] += high - low
    return held.argmax(axis=1)


# Four loaders


def four_homes(
    index: EpisodeIndex, server: StoreServer, share: float = 0.27, passes: int = 3, run: int = 0
) -> dict[str, Any]:
    """Store traffic of four loaders by pass: each of them may cache `share` of the data, and serves a quarter of the rows.

    A pass is as many windows as there are disjoint ones. At home is what a process delivers of the buckets of which it holds
    the larger part.
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
    loaders = [
        TrajectoryLoader(
            window_plan(index, ROWS, WINDOW), Home(process, 4), stack_windows, [all_fields(index)],
            cache=CacheBudget(memory=int(share * total)), requests=32, prefetch=32 << 20, run=run, stop=passes * steps,
        )
        for process in range(4)
    ]  # fmt: skip
    out["described"] = loaders[0].describe()
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
    """Share of the windows that are served by the process that is home to most of their bucket."""
    owner, at_home, windows = owners(plan, processes), 0, 0
    places = [Placement(plan, Home(process, processes)) for process in range(processes)]
    for step in range(steps):
        bucket = plan.row_buckets(step)[1]
        for process, place in enumerate(places):
            rows = place.rows(step)
            at_home += int((owner[bucket[rows]] == process).sum())
            windows += len(rows)
    return at_home / windows


# Eight nodes, simulated: plan, placement and caches are real, the bytes are not


class Node(RangeCache):
    """A node's cache, that can be asked what it holds; its bytes are never looked at."""

    def holds(self, units: Units) -> NDArray[np.bool_]:
        return self.kept.place[units] >= 0


class Simulation:
    """Windows of 20 steps, several in a row of 1,024 tokens, of 50 tasks, from lognormal episodes; a unit is one step.

    There are as many buckets as rows, as there are by themselves from 200,000 episodes on; so many are not simulated.
    """

    def __init__(self, episodes: int, processes: int) -> None:
        self.index = SimulatedIndex(episodes)
        lengths = EntryLengths(
            units=self.index.steps.astype(np.int64),
            window=np.full(TASKS, WINDOW, np.int32),
            per_unit=np.random.default_rng(1).integers(3, 45, TASKS).astype(np.int32),
            fixed=np.zeros(episodes, np.int32),
            prompt=0.0,
            prompt_units=np.zeros(TASKS, np.int32),
        )
        entry = PlanEntry(self.index, lengths, 1.0, "simulated", range(TASKS))  # type: ignore[arg-type]
        self.plan = SamplingPlan([entry], rows=ROWS, budget=1024, seed=3, buckets=ROWS)
        self.places = [Placement(self.plan, Home(process, processes)) for process in range(processes)]
        self.first = np.concatenate([[0], np.cumsum(self.index.steps, dtype=np.int64)])
        self.units = int(self.first[-1])

    def block(self, step: int, rows: Units | None = None) -> Units:
        """The units of rows of a step, window by window."""
        planned = self.plan.windows(step, rows)
        ends = np.cumsum(planned.units)
        begin = self.first[planned.episode] + planned.start
        return np.arange(ends[-1]) + np.repeat(begin - (ends - planned.units), planned.units)

    def cache(self, place: Placement, share: float, on_their_way: int) -> Node:
        """The cache of a node that may hold `share` of all units, `on_their_way` of them set aside for a step's misses."""
        return Node(
            self.units,
            lambda units: np.full(len(units), _UNIT),
            lambda step: self.block(step, place.rows(step)),
            total=self.units * _UNIT // len(self.places),
            memory=int(share * self.units) * _UNIT,
            staging=on_their_way * _UNIT,
        )


def eight_nodes(episodes: int = 26_000, share: float = 0.05, nodes: int = 8) -> dict[str, Any]:
    """Units that nodes take from the store and from each other, as shares of what their windows use.

    Each node may keep `share` of all units, with what is set aside for those on their way. A unit that a node lacks comes from
    another node where one has it, which happens where a bucket has two homes. Two passes over the data fill the caches and
    look-aheads (1.4 passes long), then one is counted. Beside it: the same windows with rows dealt out in turn, and one LRU
    cache as large as all nodes' together.
    """
    simulated = Simulation(episodes, nodes)
    used = float(np.mean([len(simulated.block(step)) for step in range(8)]))
    steps = int(simulated.units / used)  # of a pass
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
    """Hit rate, over `count` steps after `settle`, of one cache of so many units that evicts what was used longest ago.

    At the grain of steps: what was last used in a step is kept as long as all that was used since fits.
    """
    last = np.full(simulated.units, -1, np.int64)  # step of each unit's last use
    of_step = np.zeros(settle + count, np.int64)  # units by that step
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
