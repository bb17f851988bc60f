"""Placement: which rows of each global batch a process computes, so that it needs the same part of the data all the time.

With equal weights, process p of N has the range [p/N, (p + 1)/N) of the plan's line. The bounds of a range may lie within a
bucket. Rows stand at even distances on the line, so each process has ⌊B/N⌋ or ⌈B/N⌉ of the B rows, and finds them without asking
anyone. The placement depends only on the plan, the number of processes and their weights, never on what is cached or alive. So a
restarted process has the same home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.mixture import UNIT
from tiphys.dataio.sampling import SamplingPlan


@dataclass(frozen=True)
class Home:
    """One of the processes that share the rows: the process that should hold these rows' bytes.

    Attributes
    ----------
    process : int
        Number of the process, from 0. Processes are numbered host by host, always in the same order of hosts.
    processes : int
        Number of processes.
    weights : tuple of float [processes], optional
        Relative sizes of the processes' shares, for example of their caches; None: equal shares.

    Raises
    ------
    ValueError
        If `process` is out of range, or the weights are not one number of at least 0 for each process, or all are 0.
    """

    process: int
    processes: int
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"home: process {self.process} of {self.processes}: processes count from 0 to {self.processes - 1}"
            )
        if self.weights is not None:
            if len(self.weights) != self.processes:
                raise ValueError(f"home: {len(self.weights)} weights for {self.processes} processes")
            if min(self.weights) < 0 or sum(self.weights) <= 0:
                raise ValueError(f"home: weights must be at least 0 and not all 0, not {self.weights}")


class Placement:
    """The rows and the data of one home.

    Parameters
    ----------
    plan : SamplingPlan
        The plan that draws the rows.
    home : Home
        The process.

    Attributes
    ----------
    plan, home
        As given.
    low, high : int
        The home's range [low, high) of the line of rows · UNIT positions.
    """

    def __init__(self, plan: SamplingPlan, home: Home) -> None:
        self.plan, self.home = plan, home
        weights = home.weights or (1.0,) * home.processes
        line = plan.rows * UNIT
        running = np.concatenate([[0.0], np.cumsum(weights)])
        cuts = np.rint(running / running[-1] * line).astype(np.int64)
        self.low, self.high = int(cuts[home.process]), int(cuts[home.process + 1])

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a step's global batch that this process computes.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        int64 [n]
            Consecutive row numbers, ascending.
        """
        offset = self.plan.offset(step)
        return np.arange(-((offset - self.low) // UNIT), -((offset - self.high) // UNIT), dtype=np.int64)

    def share(self, step: int = 0) -> list[tuple[int, float, float]]:
        """The parts of buckets whose rows this process computes, by the weights in force at a step.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        list of (int, float, float)
            (bucket, lo, hi): the part [lo, hi) of a segment of the line, relative to its length. With replacement each bucket is
            one segment. Without replacement each entry has a segment in each bucket, so a bucket may come more than once.
        """
        bucket, low, high = self.plan.segments(step)
        span = np.maximum(high - low, 1)
        lo, hi = np.clip((self.low - low) / span, 0, 1), np.clip((self.high - low) / span, 0, 1)
        return [(int(bucket[i]), float(lo[i]), float(hi[i])) for i in np.flatnonzero(hi > lo)]


def data_share(plan: SamplingPlan, home: Home, step: int = 0) -> dict[int, float]:
    """Bucket -> the part of its rows that the home computes."""
    out: dict[int, float] = {}
    for bucket, lo, hi in Placement(plan, home).share(step):
        out[bucket] = out.get(bucket, 0.0) + hi - lo
    return out
