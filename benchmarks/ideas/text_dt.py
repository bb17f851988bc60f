"""Text-conditioned Decision Transformer (Putterman et al. 2022): the instruction decides what is done.

The instruction changes from episode to episode of one task. Control: another episode's instruction. The policy must then miss the
goal, and reach the one that it was told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Told, behave, play

GOALS = len(Told.WORDS)


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Told(np.arange(300) % GOALS)
    played = behave(world, len(world.goals), seed, world.expert)
    dataset = write(folder / "told", [world.task], played.episodes(world.task, "told", {"mission": world.missions}))
    objective = {"paradigm": "text-dt", "context": 32, "window": 2}
    policy = train([{"dataset": dataset}], objective, steps=150, seed=seed, rate=5e-3, sample=False)
    world = Told(np.arange(60) % GOALS)
    other = Told((world.goals + 1) % GOALS)
    hit = play(policy, world, len(world.goals), seed, instruction=world.missions).rewards.mean()
    swapped = told = None
    if control:
        misled = play(policy, world, len(world.goals), seed, instruction=other.missions)
        swapped = float(misled.rewards.mean())
        told = float((misled.actions == other.goals[:, None]).mean())
    broken = "instruction of another episode"
    yield Mark("share of actions that hit the goal", float(hit), at_least(0.95), swapped, at_most(0.25), broken)
    if told is not None:
        yield Mark(
            "share that hit the goal of a swapped instruction", told, at_least(0.95), swapped, at_most(0.25), broken
        )
