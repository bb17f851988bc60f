"""Saves checkpoints during training."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tiphys.dataio.messages import say
from tiphys.pretrain import checkpoint_files
from tiphys.pretrain.callbacks.base import Callback, Every
from tiphys.pretrain.checkpoint import Writer

if TYPE_CHECKING:
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer

Listener: TypeAlias = "Callable[[Trainer, Path, int], None]"


class Checkpointer(Callback):
    """Saves a checkpoint every `every` steps and at the end, and keeps the newest `keep`.

    also    further clocks that need a checkpoint (those of evaluation and publication)
    """

    def __init__(
        self, run_dir: str | Path, every: int, keep: int = 3, *, asynchronous: bool = True, also: Sequence[Every] = ()
    ) -> None:
        self.run_dir, self.keep, self.asynchronous = Path(run_dir), keep, asynchronous
        self.clocks = (Every(every), *also)
        self.protected: dict[Path, int] = {}
        self._saved = -1
        self._committed: list[Path] = []  # the thread of `Writer` appends, `_notify_listeners` takes
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Register a function: rank 0 calls listener(trainer, folder, step) between two steps, after each whole checkpoint."""
        self._listeners.append(listener)

    def on_start(self, trainer: Trainer) -> None:
        launch = str(trainer.world.gather(secrets.token_hex(8))[0])
        self.writer = Writer(self.run_dir, launch, asynchronous=self.asynchronous)
        if trainer.resumed is not None:
            self._saved = trainer.step

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.writer.check()
        if any(clock(trainer.step) for clock in self.clocks):
            self.save(trainer)
        self._notify_listeners(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._saved != trainer.step:
            self.save(trainer)
        self.writer.wait()
        self._notify_listeners(trainer)
        if trainer.stopped:
            if trainer.world.rank == 0:
                say(f"stopped after step {trainer.step}, which is saved; the same command resumes from there")
            trainer.world.barrier()  # a launcher ends the other ranks as soon as one has ended

    def save(self, trainer: Trainer) -> None:
        self.writer.save(trainer.engine, trainer.state(), self._committed.append)
        self._saved = trainer.step

    def protect(self, folder: Path) -> Callable[[], None]:
        """Do not remove a checkpoint until the returned function is called."""
        self.protected[folder] = self.protected.get(folder, 0) + 1

        def release() -> None:
            self.protected[folder] -= 1
            if not self.protected[folder]:
                del self.protected[folder]

        return release

    def _notify_listeners(self, trainer: Trainer) -> None:
        while self._committed:
            folder = self._committed.pop(0)
            if trainer.world.rank == 0:
                for listener in self._listeners:
                    listener(trainer, folder, checkpoint_files.step_of(folder))
                checkpoint_files.prune(self.run_dir, self.keep, frozenset(self.protected))
