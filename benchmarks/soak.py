"""Whether a loader's memory stays constant: its process is watched from outside while it runs for a long time.

The budget is what a user sets: bytes of the cache, and of finished batches (`prefetch`, in shared memory). Memory beyond it is
the interpreter with its libraries, the index, what the plan and the cache know of the data, and any leak.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.loader_bench import all_fields, stack_windows, window_plan

_EVERY = 10.0  # seconds from sample to sample
_PREFETCH = 64 << 20


def soak(index: EpisodeIndex, rows: int, window: int, cache: int, minutes: float, pace: float) -> dict[str, Any]:
    """Run a loader for so many minutes, at `pace` steps a second (0: as fast as it can). Sizes are in bytes; the slope is fitted
    by least squares."""
    settings = LoaderSettings(cache=CacheBudget(memory=cache), requests=128, prefetch=_PREFETCH)
    needs, plan = [all_fields(index)], window_plan(index, rows, window)
    samples, windows, spent = [], 0.0, 0.0
    with TrajectoryLoader(plan, Home(0, 1), stack_windows, needs, settings=settings) as loader:
        loader.start()
        began = time.monotonic()
        due, tick = began + _EVERY, began
        while (now := time.monotonic()) < began + minutes * 60:
            batch = next(loader)
            windows, spent = windows + batch.counters["windows"], spent + batch.counters["cpu_seconds"]
            occupied = batch.counters["cache_bytes"]
            batch.release()
            if now >= due:
                samples.append((now - began, *_resident(loader.pid), occupied))
                due += _EVERY
            if pace:
                tick = max(tick + 1 / pace, now)
                time.sleep(max(0.0, tick - time.monotonic()))
        seconds = time.monotonic() - began
    table = np.array(samples, np.float64)
    beyond = table[:, 1] - cache + np.maximum(table[:, 2] - _PREFETCH, 0)
    late = table[:, 0] >= table[-1, 0] / 3  # by then the cache is full and all code has run
    slope = float(np.polyfit(table[late, 0], beyond[late], 1)[0]) if late.sum() > 1 else float("nan")
    return {
        "minutes": seconds / 60,
        "windows": windows,
        "loader_cpu_share": spent / seconds,
        "cache": cache,
        "cache_occupied": float(table[-1, 3]),
        "prefetch": _PREFETCH,
        "beyond_budget_max": float(beyond.max()),
        "beyond_budget_first": float(beyond[late][0]),
        "beyond_budget_last": float(beyond[-1]),
        "slope_bytes_a_minute": slope * 60,
        "samples": [[round(t), int(private), int(shared), int(used)] for t, private, shared, used in samples],
    }


def summary(found: dict[str, Any]) -> str:
    """The result of `soak` as one line for people."""
    mib = {name: value / 2**20 for name, value in found.items() if isinstance(value, float)}
    return (
        f"soak: {found['minutes']:.0f} minutes, {found['windows']:.3g} windows at {found['loader_cpu_share']:.0%} of a core; "
        f"beyond the budget {mib['beyond_budget_first']:.1f} MiB after a third, {mib['beyond_budget_last']:.1f} MiB at the end, "
        f"{mib['beyond_budget_max']:.1f} MiB at most, slope {mib['slope_bytes_a_minute']:+.3f} MiB a minute "
        f"({len(found['samples'])} samples; cache of {found['cache'] >> 20} MiB, {mib['cache_occupied']:.0f} MiB in use)"
    )


def _resident(pid: int | None) -> tuple[int, int]:
    """(resident bytes that are private or of files, resident bytes of shared memory) of a process."""
    with open(f"/proc/{pid}/status") as file:
        size = {k: int(v.split()[0]) << 10 for k, v in (line.split(":") for line in file) if k.startswith("Rss")}
    return size["RssAnon"] + size["RssFile"], size["RssShmem"]
