"""Evaluates checkpoints during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tiphys.dataio.messages import say
from tiphys.pretrain.callbacks.base import Callback, Every

if TYPE_CHECKING:
    from tiphys.pretrain.callbacks.checkpointer import Checkpointer
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer


class Running(Protocol):
    """Another process: `poll()` is None while it runs, then its exit status."""

    def poll(self) -> int | None: ...


class Evaluator(Callback):
    """Starts evaluations of checkpoints, each in its own process, one at a time. Training does not wait for them.

    start    start(checkpoint folder, step) -> a handle with `poll()`
    """

    def __init__(self, every: int, start: Callable[[Path, int], Running], checkpointer: Checkpointer) -> None:
        self.clock, self.start, self.checkpointer = Every(every), start, checkpointer
        checkpointer.listen(self._checkpointed)
        self._running: tuple[Running, Callable[[], None], int] | None = None

    def _checkpointed(self, trainer: Trainer, folder: Path, step: int) -> None:
        if not self.clock(step) or step == trainer.steps:  # the last checkpoint is evaluated after training
            return
        self._collect()
        if self._running is not None:
            say(f"step {step}: not evaluated, because the evaluation of step {self._running[2]} is still running")
            return
        release = self.checkpointer.protect(folder)
        self._running = (self.start(folder, step), release, step)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._collect()

    def on_end(self, trainer: Trainer) -> None:
        while self._running is not None:
            self._collect()
            time.sleep(0.05)

    def _collect(self) -> None:
        if self._running is None:
            return
        handle, release, step = self._running
        status = handle.poll()
        if status is not None:
            release()
            self._running = None
            if status:
                say(f"the evaluation of step {step} failed with exit status {status}; training continues")
