"""Generalized Decision Transformer, categorical (Furuta et al. 2022): how often each action is taken is what was demanded.

Nine steps, three actions; the demands are the counts of held-out episodes. Score: total variation between demanded and taken
counts. Control: the policy is given the demand of another episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Choice, Played, behave, play

DEMANDS = 90


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Choice()
    data = behave(world, 1000, seed, world.habitual)
    wanted = behave(world, DEMANDS, seed + 500, world.habitual)
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "choice"))
    objective = {"paradigm": "gdt", "context": 64, "window": 9, "options": {"histogram": "action"}}
    policy = train([{"dataset": dataset}], objective, steps=200, seed=seed, data={"starts": "windows"})

    def distance(asked: Played) -> float:
        future = [asked.window(i) for i in range(DEMANDS)]
        taken = play(policy, world, DEMANDS, seed, future=future).actions
        return float(np.abs(shares(taken) - shares(wanted.actions)).sum(1).mean() / 2)

    order = np.roll(np.arange(DEMANDS), 1)
    other = Played(wanted.fields, wanted.actions[order], wanted.rewards[order])
    failed = distance(other) if control else None
    yield Mark(
        "total variation, demanded and taken",
        distance(wanted),
        at_most(0.05),
        failed,
        at_least(0.4),
        "demands of others",
    )


def shares(actions: np.ndarray) -> np.ndarray:
    """[n, 3]: share of each action in each episode."""
    return np.stack([(actions == value).mean(1) for value in range(3)], 1)
