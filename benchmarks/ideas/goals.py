"""Six hidden goals that only a demonstration tells, for the experiments with prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Goal, behave, play
from tiphys.pretrain.acting.policy import Policy

GOALS = 6
EPISODES = 10  # played for each goal


def learnt(objective: Mapping[str, Any], folder: Path, seed: int, **options: Any) -> Policy:
    """A policy that has learned all goals from expert episodes."""
    episodes = []
    worlds = [Goal(goal, GOALS) for goal in range(GOALS)]
    for world in worlds:
        episodes += behave(world, 50, seed + world.goal, world.expert).episodes(world.task, world.task.name)
    dataset = write(folder / "goals", [w.task for w in worlds], episodes)
    return train(
        [{"dataset": dataset}],
        objective,
        **{"steps": 150, "rows": 32, "rate": 5e-3, "seed": seed, "sample": False, **options},
    )


def hit(policy: Policy, seed: int, other: int | None, **reset: Any) -> float:
    """Share of the actions that hit the goal, after the demonstration of the goal that is `other` goals further; None: none."""
    shares = []
    for goal in range(GOALS):
        world = Goal(goal, GOALS)
        prompt = None
        if other is not None:
            shown = Goal((goal + other) % GOALS, GOALS)
            prompt = behave(shown, 1, 1000 + seed, shown.expert).window(0)
        played = play(policy, world, EPISODES, seed, prompt=prompt, **reset)
        shares.append(played.rewards.mean())
    return float(np.mean(shares))
