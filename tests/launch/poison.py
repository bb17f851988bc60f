"""Batches whose loss is NaN, for tests of rollbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tiphys.pretrain import engine
from tiphys.pretrain.tokens.batch import TokenBatch


class Poison:
    """Makes the loss of some batches NaN, wherever in the run they are drawn.

    steps   the steps of the plan, from 0, whose batches are poisoned when they are first drawn
    """

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps, self.known = set(steps), set[bytes]()
        self.train_step = engine.Engine.train_step

    def __call__(self, of: engine.Engine, batch: TokenBatch) -> Any:
        content = batch.tokens.tobytes()
        if batch.step in self.steps and len(self.known) < len(self.steps):
            self.known.add(content)
        if content in self.known:
            batch.weight[:] = np.nan
        return self.train_step(of, batch)
