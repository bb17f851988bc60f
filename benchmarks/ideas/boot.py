"""Bootstrapped Transformer (Wang et al. 2022): learning from what it draws itself does no harm, if it is confident of it.

Few walks in a grid are learned. After half of the steps, the model draws last transitions anew, and the 2 % with the highest
confidence join the mixture. Score: the mean negative log probability of the observations of other walks, above that of a model
that has learned from the data alone, for as many steps. "No worse" is all that is claimed. Control: the 2 % with the lowest
confidence join.
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
from tiphys.pretrain.model.inputs import to_tensors, unpack

EPISODES, STEPS_OF_TRAINING, ROWS = 150, 200, 16
HOW = bootstrap.Drawing(keep=0.02, draws=20, windows=2)
Best = Callable[[np.ndarray, float], np.ndarray]
highest: Best = bootstrap.best  # its place is taken while the control draws


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
            rows=ROWS,
            seed=seed,
            model=WIDE,
            joins={STEPS_OF_TRAINING // 2: drawn} if best else None,
        )
        return held_out(policy, others)

    without = loss(None)
    yield Mark(
        "negative log probability, above that without",
        loss(highest, "best") - without,
        at_most(0.03),
        loss(worst, "worst") - without if control else None,
        at_least(0.04),
        "the lowest confidence is kept",
    )


def worst(confidence: np.ndarray, share: float) -> np.ndarray:
    """The share of the values that are lowest."""
    return highest(-confidence, share)


@torch.inference_mode()
def held_out(policy: Policy, data: Played) -> float:
    """Mean negative log probability of the observations after the first, in whole episodes."""
    layout, processor = policy.processor.layouts["it"]["grid"].acting(), policy.processor
    element = next(e for e in layout.elements if e.role == "observation")
    ((low, high),) = element.codec.choices()  # type: ignore[union-attr]
    windows = [data.window(i) for i in range(len(data.actions))]
    for window, rewards in zip(windows, data.rewards, strict=True):
        window.fields = {**window.fields, "reward": rewards.astype(np.float32)}
    batch = processor.encode(layout, [[window] for window in windows])
    inputs = to_tensors(batch)
    hidden = unpack(policy.model(inputs).hidden, inputs, batch.rows, batch.length)
    at = np.arange(1, STEPS) * layout.width + layout.columns[layout.elements.index(element)]
    chance = policy.model.logits(hidden[:, at - 1])[..., low:high].log_softmax(-1)
    seen = torch.from_numpy(batch.tokens[:, at] - low).long()
    return -float(chance.gather(-1, seen[..., None]).mean())
