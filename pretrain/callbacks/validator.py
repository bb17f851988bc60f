"""Measures the loss on held-out episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.messages import say
from tiphys.pretrain.callbacks.base import Callback, Every
from tiphys.pretrain.phases import mark

if TYPE_CHECKING:
    from tiphys.pretrain.action_error import NativeErrors
    from tiphys.pretrain.callbacks.metrics_writer import MetricsWriter
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.pretrain.trainer import Trainer


class Validator(Callback):
    """Computes the loss on held-out rows, every `every` steps and at the end, on all ranks together.

    It is that of the raw weights, also if there is an average of them; the line of metrics.jsonl says so.

    every      0: only at the end
    batches    returns this rank's held-out batches; called once, when they are needed for the first time
    native     measures action errors in the units of the data; None: they are not measured
    texts      bytes of each id of the text tokenizer, for perplexities; None: they are not counted
    """

    def __init__(
        self,
        every: int,
        batches: Callable[[], Iterable[TokenBatch]],
        write: MetricsWriter | None,
        native: NativeErrors | None = None,
        texts: np.ndarray | None = None,
    ) -> None:
        self.clock, self._load, self._writer, self._native = Every(every), batches, write, native
        self._texts = np.zeros(0, np.int64) if texts is None else texts
        self._batches: list[TokenBatch] | None = None
        self._done = -1

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.clock(trainer.step) and trainer.step < trainer.steps:
            self.run(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """At the end of training; the last checkpoint is written before, because its callback stands before this one."""
        if trainer.step == trainer.steps and self._done != trainer.step:
            self.run(trainer)

    def run(self, trainer: Trainer) -> None:
        from tiphys.pretrain.validate import validate

        mark("validate")
        if self._batches is None:
            self._batches = list(self._load())
        trainer.engine.native, trainer.engine.text_sizes = self._native, self._texts
        result = validate(trainer.engine, self._batches)
        self._done = trainer.step
        if trainer.world.rank == 0:
            tasks = self._writer.tasks if self._writer is not None else ()
            line = {"kind": "validation", "step": trainer.step, "weights": "raw", **result.to_json(tasks)}
            whose = " (raw weights, not their average)" if trainer.recipe.train.ema.decay else ""
            say(f"step {trainer.step}  held-out loss {result.loss:.4f}{whose}")
            if self._writer is not None:
                self._writer.write(line)
