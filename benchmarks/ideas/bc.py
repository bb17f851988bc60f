"""Behaviour cloning, and %BC (Chen et al. 2021, sec. 5.1): the policy acts as well as the episodes that it is shown.

The best tenth of the episodes is learned, then all of them: each policy must earn the mean return of its own episodes. So each
is the other's control.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Chain, behave, competent, play

EPISODES = 256  # played, of ten steps
TOP = 0.1


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Chain()
    data = behave(world, 1000, seed, competent())
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "chain"))
    best = np.sort(data.returns)[::-1][: int(TOP * len(data.returns))].mean()

    def earned(top: float) -> float:
        entry = {"dataset": dataset, "prefer": "top", "top": top}
        policy = train([entry], {"paradigm": "bc", "context": 64, "window": 1}, steps=100, rows=8, rate=4e-3, seed=seed)
        return float(play(policy, world, EPISODES, seed).returns.mean())

    of_best, of_all = earned(TOP), earned(1.0)
    yield Mark(
        "best tenth: |earned − their mean|",
        float(abs(of_best - best)),
        at_most(0.5),
        float(abs(of_all - best)) if control else None,
        at_least(1.0),
        "all episodes are learned",
    )
    yield Mark(
        "all episodes: |earned − their mean|",
        float(abs(of_all - data.returns.mean())),
        at_most(0.5),
        float(abs(of_best - data.returns.mean())) if control else None,
        at_least(1.0),
        "the best tenth is learned",
    )
