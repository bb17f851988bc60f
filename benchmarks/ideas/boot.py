"""Bootstrapped Transformer (Wang et al. 2022): learning from what it draws itself does no harm, if it is confident of it.

Few walks in a grid are learned. After half of the steps, the model draws last transitions anew, and those with the highest
confidence join the mixture. Score: the loss on other walks, compared with a model that has learned from the data alone, for as
many steps. "No worse" is all that is claimed. Control: those with the lowest confidence join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.ideas.grid import STEPS, Grid, walker
from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import Played, behave
from tiphys.pretrain import bootstrap
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.tokens.sequence import assemble

EPISODES, STEPS_OF_TRAINING = 150, 300
HOW = bootstrap.Drawing(keep=0.1, draws=4, windows=4)
Best = Callable[[np.ndarray, float], np.ndarray]


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Grid()
    data, others = behave(world, EPISODES, seed, walker(to=0)), behave(world, 300, seed + 500, walker(to=0))
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "walk"))

    def loss(best: Best | None, name: str = "") -> float:
        def drawn(policy: Policy) -> str:
            with mock.patch.object(bootstrap, "best", best):
                bootstrap.bootstrap(policy, dataset, str(folder / name), HOW)
            return str(folder / name)

        policy = train(
            [{"dataset": dataset}],
            {"paradigm": "boot", "context": 48},
            steps=STEPS_OF_TRAINING,
            rows=16,
            seed=seed,
            model=WIDE,
            joins={STEPS_OF_TRAINING // 2: drawn} if best else None,
        )
        return held_out(policy, others)

    without = loss(None)
    yield Mark(
        "loss on other walks, above that without",
        loss(bootstrap.best, "best") - without,
        at_most(0.03),
        loss(worst, "worst") - without if control else None,
        at_least(0.07),
        "the lowest confidence is kept",
    )


def worst(confidence: np.ndarray, share: float) -> np.ndarray:
    """The share of the values that are lowest."""
    return bootstrap.best(-confidence, share)


@torch.inference_mode()
def held_out(policy: Policy, data: Played) -> float:
    """The objective's loss on whole episodes."""
    layout = policy.processor.layouts["it"]["grid"]
    windows = [[data.window(i)] for i in range(len(data.actions))]
    for i, (window,) in enumerate(windows):
        window.fields = {**window.fields, "reward": data.rewards[i].astype(np.float32)}
    processor, rows = policy.processor, np.arange(len(windows))
    batch = assemble(0, rows, windows, [{0: layout}], processor.vocabulary, processor.text, training=False)
    assert batch.rows == len(windows)
    assert (batch.timestep.max(axis=1) == STEPS - 1).all()
    return float(policy.model(to_tensors(batch), batch.targets, batch.real_tokens).loss)
