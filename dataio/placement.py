"""Placement: which rows of each global batch a process computes, so that every process keeps the same data near all the time.

Process p of N is home to the range [p/N, (p + 1)/N) of the plan's line of mass, cut through buckets where it falls. Rows stand
at even distances on that line, so that each process gets ⌊B/N⌋ or ⌈B/N⌉ of them and finds its own without asking anyone. The
placement depends on the plan and the launch's world only, never on what is alive or cached: a restarted process has the same
home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.mixture import UNIT
from tiphys.dataio.sampling import SamplingPlan


@dataclass(frozen=True)
class Home:
    """Process `process` of `processes`, which are numbered by hosts in a kept order, then within each host.

    weights   relative sizes of all processes' shares (of their caches, say); None: equal
    """

    process: int
    processes: int
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ValueError(f"home: process {self.process} of {self.processes}: processes count from 0")
        if self.weights is not None:
            if len(self.weights) != self.processes:
                raise ValueError(f"home: {len(self.weights)} weights for {self.processes} processes")
            if min(self.weights) < 0 or sum(self.weights) <= 0:
                raise ValueError(f"home: weights must be at least 0 and not all 0, not {self.weights}")


class Placement:
    """The rows and the data of one home."""

    def __init__(self, plan: SamplingPlan, home: Home) -> None:
        self.plan, self.home = plan, home
        weights = home.weights or (1.0,) * home.processes
        line = plan.rows * UNIT
        running = np.concatenate([[0.0], np.cumsum(weights)])
        cuts = np.rint(running / running[-1] * line).astype(np.int64)
        self.low, self.high = int(cuts[home.process]), int(cuts[home.process + 1])

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of the step's global batch whose home is here, ascending: neighbours, but for the line's own beginning."""
        offset = self.plan.offset(step)
        return np.arange(-((offset - self.low) // UNIT), -((offset - self.high) // UNIT), dtype=np.int64)

    def share(self, step: int = 0) -> list[tuple[int, float, float]]:
        """(bucket, lo, hi) for each bucket with data here, by the weights in force at a step: this process serves the
        part [lo, hi) of the bucket's rows."""
        bucket, low, high = self.plan.segments(step)
        span = np.maximum(high - low, 1)
        lo, hi = np.clip((self.low - low) / span, 0, 1), np.clip((self.high - low) / span, 0, 1)
        return [(int(bucket[i]), float(lo[i]), float(hi[i])) for i in np.flatnonzero(hi > lo)]


def data_share(plan: SamplingPlan, home: Home, step: int = 0) -> dict[int, float]:
    """Bucket -> the part of its rows that the home serves."""
    out: dict[int, float] = {}
    for bucket, lo, hi in Placement(plan, home).share(step):
        out[bucket] = out.get(bucket, 0.0) + hi - lo
    return out
