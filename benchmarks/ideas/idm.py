"""Inverse dynamics (Baker et al. 2022): actions are inferred from what comes before and after, and data are labelled.

The world is a grid. The model learns from 800 noisy walks to any goal. Then it labels 1500 walks to one corner, of which it sees
no action. Controls: a causal model, which does not see what follows; labels of other steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.ideas.grid import STEPS, Grid, after, walker
from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Played, behave
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.label import label

CORNER = 15


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Grid()
    known, walks = behave(world, 800, seed, walker()), behave(world, 1500, seed + 1000, walker(to=CORNER))
    labelled = write(folder / "known", [world.task], known.episodes(world.task, "known"))
    model = train(
        [{"dataset": labelled}],
        {"paradigm": "idm", "context": 26, "window": STEPS},
        steps=200,
        rows=48,
        rate=4e-3,
        seed=seed,
        model={"hidden": 64, "heads": 4},
        data={"starts": "windows"},
    )
    out = str(folder / "labelled")
    label(model, without_actions(world, walks, folder / "walks"), out)
    index = EpisodeIndex.open(out)
    given = {index.id(i): read_episode(index, i).fields["action"] for i in range(index.episodes)}
    actions = np.stack([given[f"walk-{i}"] for i in range(len(walks.actions))])
    causal = same_effect(cloned(world, known, folder / "causal", seed), walks) if control else None
    effect = float((after(walks.fields["observation"][:, :-1], actions) == walks.fields["observation"][:, 1:]).mean())
    yield Mark("labels with the same effect", effect, at_least(0.98), causal, at_most(0.45), "a causal model")
    truth = reached(cloned(world, walks, folder / "truth", seed), world, seed)
    labels = reached(cloned(world, replace(walks, actions=actions), folder / "clone", seed), world, seed)
    shuffled = None
    if control:
        order = np.random.default_rng(seed).permutation(actions.size)
        wrong = replace(walks, actions=actions.reshape(-1)[order].reshape(actions.shape))
        shuffled = reached(cloned(world, wrong, folder / "shuffled", seed), world, seed) / truth
    yield Mark(
        "cloned from labels ÷ from truth",
        labels / truth,
        at_least(0.95),
        shuffled,
        at_most(0.5),
        "labels of other steps",
    )


def without_actions(world: Grid, data: Played, folder: Path) -> str:
    """A dataset of the walks as if they were seen only."""
    task = replace(world.task, fields=tuple(f for f in world.task.fields if f.role == "observation"))
    seen = [replace(e, fields={"observation": e.fields["observation"]}) for e in data.episodes(task, "walk")]
    return write(folder, [task], seen)


def cloned(world: Grid, data: Played, folder: Path, seed: int) -> Policy:
    dataset = write(folder, [world.task], data.episodes(world.task, "walk"))
    return train(
        [{"dataset": dataset}],
        {"paradigm": "bc", "context": 16, "window": 1},
        steps=80,
        rows=32,
        seed=seed,
        sample=False,
    )


def same_effect(policy: Policy, data: Played, n: int = 800) -> float:
    """Share of the policy's actions that have the effect of those that were taken."""
    i, t = np.arange(n), np.arange(n) % STEPS
    cell, follows = data.fields["observation"][i, t], data.fields["observation"][i, t + 1]
    policy.reset("grid", n)
    return float((after(cell, np.array(policy.act([{"observation": c} for c in cell]))) == follows).mean())


def reached(policy: Policy, world: Grid, seed: int, n: int = 200) -> float:
    """Share of the episodes that end in the corner."""
    policy.reset("grid", n)
    observed = world.reset(n, np.random.default_rng([seed, 4]))["observation"]
    for _ in range(STEPS):
        observed = world.step(np.array(policy.act([{"observation": o} for o in observed])))[0]["observation"]
    return float((observed == CORNER).mean())
