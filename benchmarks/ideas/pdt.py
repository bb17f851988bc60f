"""Pre-trained Decision Transformer (Cang et al. 2022): unlabelled episodes teach the skills, few labelled ones their returns.

3,000 episodes without rewards, then 60 steps of `dt` on 40 episodes with rewards, which begin with the weights of the first part
(`model.init`). Controls: no pre-training; pre-training on actions of other episodes and steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, publish, train
from benchmarks.ideas.worlds import Cued, Played, behave, play

ASKED = np.repeat(np.arange(11.0), 15)


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world, bare = Cued(), Cued(rewarded=False)
    unlabelled = behave(bare, 3000, seed, bare.competent)
    few = behave(world, 40, seed + 100, world.competent)
    labelled = write(folder / "labelled", [world.task], few.episodes(world.task, "labelled"))

    def reached(init: str) -> float:
        objective = {"paradigm": "dt", "context": 64, "window": 10}
        options: dict[str, Any] = {"model": {"init": init, **WIDE}, "data": {"starts": "windows"}}
        policy = train([{"dataset": labelled}], objective, steps=60, seed=seed, rate=8e-3, **options)
        returns = play(policy, world, len(ASKED), seed, asked=ASKED).returns
        return float(np.polyfit(ASKED, returns, 1)[0])

    score = reached(pretrained(bare, unlabelled, folder / "pre", seed))
    scratch = shuffled = None
    if control:
        scratch = reached("")
        random = np.random.default_rng(seed)
        mixed = replace(
            unlabelled, actions=random.permuted(unlabelled.actions.ravel()).reshape(unlabelled.actions.shape)
        )
        shuffled = reached(pretrained(bare, mixed, folder / "mixed", seed))
    measure = "slope of reached on asked return"
    yield Mark(measure, score, at_least(0.6), scratch, at_most(0.35), "no pre-training")
    yield Mark(measure, score, at_least(0.6), shuffled, at_most(0.35), "pre-training on shuffled actions")


def pretrained(world: Cued, data: Played, folder: Path, seed: int) -> str:
    """The folder of a policy that has learned episodes without rewards."""
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "bare"))
    objective = {"paradigm": "pdt", "context": 64, "window": 10}
    policy = train(
        [{"dataset": dataset}], objective, steps=400, seed=seed, rate=4e-3, data={"starts": "windows"}, model=WIDE
    )
    return publish(policy, folder / "policy")
