"""What planning costs: slots a second over simulated indexes, one row alone, a change of weights, and the cost of a window.

    python benchmarks/plan.py [--episodes 1e6,1e7,1e8] [--json FILE]

It also measures how close the cache comes to its bound, with and without replacement, for units of 1, 2, 5 and 20 rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tiphys.dataio.cache import RangeCache, hit_bound
from tiphys.dataio.placement import Home, Placement
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan

TASKS, ROWS, BUDGET, WINDOW = 50, 512, 1024, 20


class SimulatedIndex:
    """The part of an EpisodeIndex that a plan uses: tasks by a power law, lognormal lengths around 150 steps."""

    def __init__(self, episodes: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        share = np.cumsum(np.arange(1, TASKS + 1) ** -0.7)
        self.episodes, self.fingerprint, self.url = episodes, f"simulated-{episodes}-{seed}", "simulated"
        self.task = np.searchsorted(share / share[-1], random.random(episodes, np.float32)).astype(np.int32)
        np.minimum(self.task, TASKS - 1, out=self.task)
        length = random.standard_normal(episodes, np.float32)
        self.steps = np.clip(np.exp(length + 5.0), 5, 20000).astype(np.int32)
        self.hash = random.integers(0, 2**64, episodes, np.uint64)

    def held_out(self, share: float) -> np.ndarray:
        return self.hash < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def simulated_plan(episodes: int, **options: Any) -> SamplingPlan:
    index: Any = SimulatedIndex(episodes)
    per_unit = np.random.default_rng(1).integers(3, 45, TASKS).astype(np.int32)
    lengths = EntryLengths.plain(index.steps, WINDOW, per_unit, tasks=TASKS, prompt=0.25, prompt_units=5)
    entry = PlanEntry(index=index, lengths=lengths, weight=1.0, name="simulated", tasks=range(TASKS))
    return SamplingPlan([entry], rows=ROWS, budget=BUDGET, seed=3, validation=0.01, **options)


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median processor time of a call, in seconds."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return statistics.median(took)


def planning(episodes: int, folder: str) -> dict[str, float]:
    """The costs of planning for one size of the data."""
    began = time.process_time()
    plan = simulated_plan(episodes, cache_dir=folder)
    built = time.process_time() - began
    began = time.process_time()
    plan._built.clear()
    plan._indexes.clear()
    plan._ready(0)
    mapped = time.process_time() - began
    everything = [np.arange(ROWS)] * 32
    steps = iter(range(10**6))

    def ahead() -> int:
        first = next(steps) * 32
        return sum(len(p.row) for p in plan.many(range(first, first + 32), everything))

    windows = ahead()
    many = seconds(ahead, 7) / windows
    one_step = seconds(lambda: plan.windows(next(steps)), 7) / (windows / 32)
    one_row = seconds(lambda: plan.windows(next(steps), [17]), 15)
    place = Placement(plan, Home(3, 64))
    rows = seconds(lambda: [place.rows(s) for s in range(256)]) / 256
    eight = seconds(lambda: plan.many(s := range(next(steps), next(steps) + 128), [place.rows(i) for i in s]))
    weights = iter(range(10**6))

    def change() -> None:
        plan.log.append({"step": 10**6, "kind": "weights", "weights": {"simulated": 1.0 + next(weights)}})
        plan.windows(10**6, [0])

    return {
        "episodes": episodes,
        "buckets": plan.buckets,
        "build_seconds": built,
        "open_seconds": mapped,
        "slots_per_second": 1 / many,
        "slots_per_second_step_by_step": 1 / one_step,
        "one_row_ms": one_row * 1e3,
        "rows_of_a_process_us": rows * 1e6,
        "us_a_window_at_8_rows_a_step": eight / (128 * windows / 32 / 64) * 1e6,
        "change_of_weights_ms": seconds(change, 3) * 1e3,
        "resident_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def caching(unit_rows: int, share: float, pin: bool, episodes: int = 1500, steps: int = 200) -> dict[str, float]:
    """Fetched over delivered bytes in the steady state, and the cache's processor time for a window (no bytes are copied from a
    store). A block is 256 windows of 20 steps."""
    per_episode, block, size = -(-steps // unit_rows), 256, 64
    starts = steps // WINDOW
    tiles = episodes * starts

    def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
        if pin:
            epoch, i = divmod(number, tiles // block)
            tile = np.random.default_rng([1, epoch]).permutation(tiles)[i * block : (i + 1) * block]
            return tile // starts, tile % starts * WINDOW
        random = np.random.default_rng([2, number])
        return random.integers(0, episodes, block), random.integers(0, steps - WINDOW + 1, block)

    def plan(number: int) -> np.ndarray:
        episode, start = drawn(number)
        first, count = start // unit_rows, (start + WINDOW - 1) // unit_rows - start // unit_rows + 1
        ends = np.cumsum(count)
        return np.arange(ends[-1]) + np.repeat(episode * per_episode + first - (ends - count), count)

    units = episodes * per_episode
    total, staging = units * unit_rows * size, block * (WINDOW + 2 * unit_rows) * size
    cache = RangeCache(
        units,
        lambda u: np.full(len(u), unit_rows * size),
        plan,
        total=total,
        memory=int(share * total) + staging,
        staging=staging,
        pin=pin,
    )
    data, epoch = bytes(unit_rows * size), episodes * steps // (block * WINDOW)

    def go(blocks: int) -> None:
        for _ in range(blocks):
            opened = cache.open()
            for unit in opened.misses.tolist():
                opened.put(unit, data)
            opened.close()

    go(2 * epoch)
    before, began = cache.counters["missed_bytes"], time.process_time()
    go(epoch)
    took = time.process_time() - began
    fetched = (cache.counters["missed_bytes"] - before) / (epoch * block * WINDOW * size)
    return {
        "unit_rows": unit_rows,
        "share": cache.capacity / total,
        "pin": pin,
        "fetched_over_delivered": fetched,
        "bound_of_single_steps": 1 - hit_bound(cache.capacity / total, pin),
        "us_a_window": took / (epoch * block) * 1e6,
        "metadata_bytes_a_unit": cache.metadata_bytes / units,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", default="1e6,1e7", help="sizes of the simulated data, separated by commas")
    parser.add_argument("--json", default="", help="write the figures to this file instead of printing them")
    arguments = parser.parse_args()
    out: dict[str, Any] = {"planning": [], "caching": []}
    for text in filter(None, arguments.episodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            out["planning"].append(planning(int(float(text)), folder))
        print(json.dumps(out["planning"][-1]), file=sys.stderr)
    for unit_rows, share, pin in (
        (1, 0.25, False),
        (2, 0.25, False),
        (5, 0.25, False),
        (20, 0.25, False),
        (2, 0.25, True),
    ):
        out["caching"].append(caching(unit_rows, share, pin))
        print(json.dumps(out["caching"][-1]), file=sys.stderr)
    text = json.dumps(out, indent=1)
    if arguments.json:
        with open(arguments.json, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
