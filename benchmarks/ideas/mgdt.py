"""Multi-game Decision Transformer (Lee et al. 2022): returns that are drawn in favour of high ones lead to high returns.

The world is a chain of eight rewards; the skill of the recorded behaviour is drawn for each episode, and low skills are more
frequent. Control: returns of other episodes, which tell nothing about the actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import Chain, Played, behave, competent, play
from tiphys.pretrain.acting.policy import Policy

MANY = 100  # episodes of each figure


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Chain(8)
    data = behave(world, 1500, seed, competent(2.0))
    policy = learnt(world, data, folder / "data", seed)
    low, plain, high = (reached(policy, world, seed, kappa) for kappa in (-10.0, 0.0, 10.0))
    shuffled = None
    if control:
        order = np.random.default_rng(seed).permutation(len(data.actions))
        other = learnt(world, data.with_rewards_of(order), folder / "shuffled", seed)
        shuffled = reached(other, world, seed, 10.0) / reached(other, world, seed, 0.0)
    yield Mark(
        "return at κ = 10 ÷ at κ = 0", high / plain, at_least(2.2), shuffled, at_most(1.3), "returns of other episodes"
    )
    yield Mark("return at κ = −10", low, at_most(0.5), high, at_least(4.0), "κ = 10")
    behaved = float(data.returns.mean())
    yield Mark(
        "|return at κ = 0 − behaviour|", abs(plain - behaved), at_most(0.5), abs(high - behaved), at_least(2), "κ = 10"
    )


def reached(policy: Policy, world: Chain, seed: int, kappa: float) -> float:
    return float(play(policy, world, MANY, seed, acting={"kappa": kappa}).returns.mean())


def learnt(world: Chain, data: Played, folder: Path, seed: int) -> Policy:
    dataset = write(folder, [world.task], data.episodes(world.task, "chain"))
    return train([{"dataset": dataset}], {"paradigm": "mgdt", "context": 48}, steps=400, rows=16, seed=seed, model=WIDE)
