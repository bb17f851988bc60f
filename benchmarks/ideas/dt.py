"""Decision Transformer (Chen et al. 2021): the return that is asked for is the return that is reached.

The world is a chain of ten rewards; the skill of the recorded behaviour is drawn for each episode, so returns of 0 to 10 are in
the data. Controls: returns that belong to other episodes; a policy that is not told its rewards, so the asked return never falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import Chain, Played, behave, competent, play
from tiphys.pretrain.acting.policy import Policy

ASKED = np.repeat(np.arange(11.0), 12)
MANY = np.repeat(np.arange(11.0), 40)  # a slope near 0 is told from noise by more episodes


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Chain()
    data = behave(world, 1000, seed, competent())
    policy = learnt(world, data, folder / "data", seed)
    reached = play(policy, world, len(ASKED), seed, asked=ASKED).returns
    shuffled = deaf = None
    if control:
        order = np.random.default_rng(seed).permutation(len(data.actions))
        other = learnt(world, data.with_rewards_of(order), folder / "shuffled", seed)
        shuffled = slope(MANY, play(other, world, len(MANY), seed, asked=MANY).returns)
        told_nothing = play(policy, world, len(ASKED), seed, asked=ASKED, rewards=False)
        deaf = float(np.abs(told_nothing.returns - ASKED).mean())
    yield Mark(
        "slope of reached on asked return",
        slope(ASKED, reached),
        at_least(0.9),
        shuffled,
        at_most(0.1),
        "returns of other episodes",
    )
    yield Mark(
        "mean |reached − asked|",
        float(np.abs(reached - ASKED).mean()),
        at_most(0.5),
        deaf,
        at_least(1.0),
        "rewards are not passed on",
    )


def slope(asked: np.ndarray, reached: np.ndarray) -> float:
    return float(np.polyfit(asked, reached, 1)[0])


def learnt(world: Chain, data: Played, folder: Path, seed: int) -> Policy:
    dataset = write(folder, [world.task], data.episodes(world.task, "chain"))
    objective = {"paradigm": "dt", "context": 64, "window": 10}
    return train([{"dataset": dataset}], objective, steps=150, seed=seed, data={"starts": "windows"})
