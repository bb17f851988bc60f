"""UniMASK (Carroll et al. 2022): one model that fills in hidden parts answers every query.

The world is a grid with noisy walks to goals that no observation tells. Control: a model that was trained for `bc` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ideas.grid import STEPS, Grid, after, filled, pairs, walker
from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import behave
from tiphys.pretrain.acting.policy import Policy

SCHEMES = {"random": 0.1, "bc": 0.1, "goal": 0.35, "forward": 0.2, "backward": 0.25}
OBJECTIVE: dict[str, Any] = {"paradigm": "unimask", "context": 24, "window": STEPS, "options": {"hiding": SCHEMES}}


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Grid()
    data, fresh = behave(world, 3000, seed, walker()), behave(world, 400, seed + 1000, walker())
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "walk"))
    policy = learnt(dataset, OBJECTIVE, seed)
    broken = learnt(dataset, OBJECTIVE | {"options": {"hiding": {"bc": 1.0}}}, seed) if control else None
    cell, _, follows = pairs(fresh)
    for role, name, bar in (("observation", "next observation", 0.98), ("action", "action, same effect", 0.98)):
        scores = []
        for one in filter(None, (policy, broken)):
            found = filled(one, fresh, role)
            scores.append(float((found == follows if role == "observation" else after(cell, found) == follows).mean()))
        worse = scores[1] if control else None
        yield Mark(name, scores[0], at_least(bar), worse, at_most(0.4), "trained for bc alone")
    goals = np.random.default_rng(seed).integers(0, 16, 200)
    hidden = reached(policy, world, goals, seed, "bc") if control else None
    yield Mark(
        "goal is reached",
        reached(policy, world, goals, seed, "goal"),
        at_least(0.8),
        hidden,
        at_most(0.15),
        "goal hidden",
    )


def reached(policy: Policy, world: Grid, goals: np.ndarray, seed: int, query: str) -> float:
    """Share of the episodes that end in their goal."""
    ends = []
    for goal in np.unique(goals):
        many = int((goals == goal).sum())
        policy.reset("grid", many, query=query, goal={"observation": goal} if query == "goal" else None)
        observed = world.reset(many, np.random.default_rng([seed, int(goal)]))["observation"]
        for _ in range(STEPS):
            observed = world.step(np.array(policy.act([{"observation": o} for o in observed], [0.0] * many)))[0][
                "observation"
            ]
        ends.append(observed == goal)
    return float(np.concatenate(ends).mean())


def learnt(dataset: str, objective: dict[str, Any], seed: int) -> Policy:
    return train(
        [{"dataset": dataset}],
        objective,
        steps=350,
        rows=64,
        rate=5e-3,
        seed=seed,
        model={"hidden": 64, "heads": 4, "timesteps": 8, "init_std": 0.125},
        data={"starts": "windows"},
        sample=False,
    )
