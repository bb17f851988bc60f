"""`tiphys loader-bench`: where a loader's time and bytes go on a dataset, beside the theoretical bound.

Windows of a fixed length are drawn uniformly from all tasks and consumed as fast as they arrive.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tiphys.dataio.episode import Needs, Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.messages import counted
from tiphys.dataio.placement import Home
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan
from tiphys.launch.display import human_bytes
from tiphys.recipes.sizes import parse_size


def stack_windows(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    """The arrays of all windows, one after the other, by field: the cheapest batch that there can be."""
    parts: dict[str, list[np.ndarray]] = {}
    count = 0
    for row in windows:
        for window in row:
            count += 1
            for name, value in window.fields.items():
                if isinstance(value, np.ndarray) and value.dtype.kind != "T":
                    parts.setdefault(f"{window.task}/{name}", []).append(value)
    out = {name: _joined(arrays) for name, arrays in parts.items()}
    return {**out, "row": np.asarray(rows, np.int64), "windows": np.array(count)}


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    shape = arrays[0].shape[1:]
    same = {a.shape[1:] for a in arrays} == {shape}  # images may differ in size
    return np.concatenate(arrays) if same else np.concatenate([a.reshape(-1) for a in arrays])


def window_plan(index: EpisodeIndex, rows: int, window: int, **more: Any) -> SamplingPlan:
    """A plan over every task of a dataset whose rows hold one window each."""
    tasks = len(index.tasks)
    units = np.maximum(np.asarray(index.steps, np.int64), 1)
    lengths = EntryLengths.plain(units, window, tasks=tasks)
    entry = PlanEntry(index=index, lengths=lengths, weight=1.0, name=index.url, tasks=list(range(tasks)), priority=None)
    return SamplingPlan([entry], rows=rows, budget=window, seed=more.pop("seed", 0), **more)


def all_fields(index: EpisodeIndex) -> Needs:
    """Every field of every task."""
    return Needs(tuple(sorted({field.name for task in index.tasks for field in task.fields})))


def bench(
    dataset: str, *, steps: int = 200, rows: int = 64, window: int = 20, cache: int | str = "256MiB", requests: int = 64
) -> dict[str, Any]:
    """Run a loader over a dataset and measure it. Times are in seconds, sizes in bytes.

    `bound`: the fetched share of the delivered bytes that is the best possible for any cache of this size.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one batch must be loaded")
    index = EpisodeIndex.open(dataset)
    budget = cache if isinstance(cache, int) else parse_size(cache)
    plan = window_plan(index, rows, window)
    loader = TrajectoryLoader(
        plan,
        Home(0, 1),
        stack_windows,
        [all_fields(index)],
        settings=LoaderSettings(cache=CacheBudget(memory=budget), requests=requests),
        stop=steps,
    )
    counters: dict[str, float] = {}
    halves: list[dict[str, float]] = []
    episodes, began, half = 0, 0.0, steps // 2
    with loader:
        for batch in loader:
            if batch.step == 0:
                began = time.monotonic()
                counters = dict.fromkeys(batch.counters, 0.0)
            else:
                for name, value in batch.counters.items():
                    counters[name] = counters.get(name, 0.0) + value
            if batch.step == half:
                halves.append(dict(counters))
            last = batch.counters
            batch.release()
    seconds = time.monotonic() - began
    steady = {name: counters[name] - halves[0].get(name, 0.0) for name in counters} if halves else counters
    count = max(counters["windows"], 1.0)
    episodes = index.episodes
    return {
        "dataset": dataset,
        "episodes": episodes,
        "windows": int(count),
        "seconds": seconds,
        "windows_per_second": count / seconds,
        "cpu_seconds_per_1000_windows": counters["cpu_seconds"] / count * 1000,
        "time": {n: counters[f"{n}_seconds"] / seconds for n in ("plan", "fetch_wait", "decode", "make")},
        "bytes": {n: counters[f"bytes_{n}"] for n in ("delivered", "memory", "disk", "missed", "store")},
        "fetched_over_delivered": steady["bytes_store"] / max(steady["bytes_delivered"], 1.0),
        "bound": 1.0 - last["cache_hit_bound"],
        "requests": counters["requests"],
        "retries": counters["retries"],
        "resident_bytes": last["resident_bytes"],
        "distinct_rate": counters["distinct_rate"] / max(steps - 1, 1),
        "distinct_bound": distinct_bound(index, window),
        "buckets": plan.buckets,
    }


def distinct_bound(index: EpisodeIndex, window: int, draws: int = 256) -> float:
    """Expected number of distinct episodes in `draws` windows drawn independently and uniformly, over `draws`."""
    mass = np.maximum(np.asarray(index.steps, np.float64) - window + 1, 1)
    return float((1 - (1 - mass / mass.sum()) ** draws).sum() / draws)


def format_result(found: dict[str, Any]) -> str:
    """The result of `bench` as a few lines for people."""
    used, moved = found["time"], found["bytes"]
    waiting = max(0.0, 1 - sum(used.values()))
    lines = [
        f"{found['dataset']}: {counted(found['windows'], 'window')} from {counted(found['episodes'], 'episode')}, "
        f"{counted(found['buckets'], 'bucket')}",
        f"speed      {found['windows_per_second']:.0f} windows/s; "
        f"{found['cpu_seconds_per_1000_windows']:.3f} CPU s per 1,000 windows",
        "time       " + ", ".join(f"{n.replace('_', ' ')} {v:.0%}" for n, v in used.items()) + f", other {waiting:.0%}",
        f"bytes      memory {human_bytes(moved['memory'])}, disk {human_bytes(moved['disk'])}, "
        f"missed {human_bytes(moved['missed'])}, received from the store {human_bytes(moved['store'])} "
        f"in {found['requests']:.0f} requests, {found['retries']:.0f} retries",
        f"fetched    {found['fetched_over_delivered']:.3f} of the delivered bytes (second half); the best possible for a cache "
        f"of this size is {found['bound']:.3f} in the long run",
        f"random     {found['distinct_rate']:.3f} distinct episodes for each window, over 256 windows; independent draws give "
        f"{found['distinct_bound']:.3f}",
        f"resident   {human_bytes(found['resident_bytes'])}",
    ]
    return "\n".join(lines)
