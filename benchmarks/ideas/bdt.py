"""Generalized Decision Transformer, bidirectional (Furuta et al. 2022): a held-out episode is imitated after one look at it.

Nine steps, three actions; each observation shows the last action. The policy is shown the observations of an episode that it has
not learned from. Score: total variation between the actions of that episode and its own. The last action of an episode is shown
by no observation, so it is guessed. Control: the policy is shown another episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.gdt import shares
from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import Choice, behave, play

SHOWN = 90


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Choice(shows_actions=True)
    data = behave(world, 1000, seed, world.habitual)
    wanted = behave(world, SHOWN, seed + 500, world.habitual)
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "choice"))
    objective = {"paradigm": "bdt", "context": 64, "window": 9}
    policy = train([{"dataset": dataset}], objective, steps=200, seed=seed, data={"starts": "windows"}, model=WIDE)

    def distance(order: np.ndarray) -> float:
        taken = play(policy, world, SHOWN, seed, future=[wanted.window(i) for i in order.tolist()]).actions
        return float(np.abs(shares(taken) - shares(wanted.actions)).sum(1).mean() / 2)

    numbers = np.arange(SHOWN)
    yield Mark(
        "total variation, shown and taken",
        distance(numbers),
        at_most(0.1),
        distance(np.roll(numbers, 1)) if control else None,
        at_least(0.4),
        "another episode is shown",
    )
