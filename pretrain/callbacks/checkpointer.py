"""Saves checkpoints during training."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tiphys.dataio.messages import say
from tiphys.pretrain import checkpoint_files
from tiphys.pretrain.callbacks.base import Callback, Every
from tiphys.pretrain.checkpoint_files import CheckpointError, StorageFull
from tiphys.pretrain.checkpoint_writer import Writer
from tiphys.pretrain.phases import mark

if TYPE_CHECKING:
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer

Listener: TypeAlias = "Callable[[Trainer, Path, int], None]"


class Checkpointer(Callback):
    """Saves a checkpoint every `every` steps, every `minutes`, and at the end, and keeps the newest `keep`.

    also      further clocks that need a checkpoint (those of evaluation and publication)
    patience  minutes that training goes on while checkpoints cannot be written
    permit    raises if this run may not save any more

    Rank 0 decides by its clock when minutes are over. What it decides, and whether a rank could not write, travels as votes with
    the numbers that ranks exchange in every step anyway (`Trainer.votes`).
    """

    def __init__(
        self,
        run_dir: str | Path,
        every: int,
        keep: int = 3,
        *,
        asynchronous: bool = True,
        also: Sequence[Every] = (),
        minutes: float = 0.0,
        patience: float = 30.0,
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir, self.keep, self.asynchronous = Path(run_dir), keep, asynchronous
        self.clocks = (Every(every), *also)
        self.seconds, self.permit, self.trouble = 60 * minutes, permit, Trouble(60 * patience)
        self.protected: dict[Path, int] = {}
        self._saved = -1
        self._next = float("inf")  # when rank 0 asks for the next save
        self._committed: list[Path] = []  # the thread of `Writer` appends, `_notify_listeners` takes
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Register a function: rank 0 calls listener(trainer, folder, step) between two steps, after each whole checkpoint."""
        self._listeners.append(listener)

    def on_start(self, trainer: Trainer) -> None:
        launch = str(trainer.world.gather(secrets.token_hex(8))[0])
        self.writer = self._writer(trainer, launch)
        self._next = self._in(self.seconds)
        if trainer.resumed is not None:
            self._saved = trainer.step

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.writer.check()
        if trainer.agreed["failed"] and self._settle(trainer):
            self._failed(trainer)
        if trainer.agreed["save"] or any(clock(trainer.step) for clock in self.clocks):
            self.save(trainer)
        self._notify_listeners(trainer)
        trainer.votes["failed"] = float(self.writer.failure is not None)
        trainer.votes["save"] = float(trainer.world.rank == 0 and time.monotonic() >= self._next)

    def on_end(self, trainer: Trainer) -> None:
        if self._saved != trainer.step:
            self.save(trainer)
        while self._settle(trainer):
            self._failed(trainer)
            time.sleep(self.trouble.pause)
            self.save(trainer)
        self._notify_listeners(trainer)
        if trainer.stopped:
            if trainer.world.rank == 0:
                say(f"stopped after step {trainer.step}, which is saved; the same command resumes from there")
            trainer.world.barrier()  # a launcher ends the other ranks as soon as one has ended

    def close(self, trainer: Trainer) -> None:
        if hasattr(self, "writer"):
            self.writer.close()

    def save(self, trainer: Trainer) -> None:
        """Start a save. Collective: it waits until the one before is written, or has failed, on all ranks."""
        if self._settle(trainer):
            self._failed(trainer)
        mark("save")
        self.writer.save(trainer.engine, trainer.state(), self._committed.append)
        self._saved = trainer.step
        self._next = self._in(self.seconds)

    def _settle(self, trainer: Trainer) -> bool:
        """Wait until no rank is writing. Returns whether the last save has failed. Collective.

        If one rank could not write its part, rank 0 is told so: it waits for a file that will never come.
        """
        mark("save")
        while True:
            self.writer.check()
            failed, busy = trainer.world.sum([self.writer.failure is not None, self.writer.busy]).result()
            if failed:
                self.writer.cancel()
            if not busy:
                return bool(failed)
            time.sleep(0.005)

    def _failed(self, trainer: Trainer) -> None:
        """The last save failed: say so, make room, and try again soon. Raises StorageFull if patience is over. Collective."""
        failure, self.writer.failure, self._saved = self.writer.failure, None, -1
        if trainer.world.rank == 0:
            self.trouble.add(self.run_dir, self.keep, frozenset(self.protected), trainer.step, failure)
            self._next = self._in(self.trouble.pause)
        over = trainer.world.sum([trainer.world.rank == 0 and self.trouble.over]).result()[0]
        if over:
            raise StorageFull(
                f"{self.run_dir}: no checkpoint could be written for {self.trouble.patience / 60:g} minutes "
                f"(checkpoint.patience), the last time because: {failure or 'another rank says why'}. Make room; "
                "the same command resumes from the newest whole checkpoint"
            )

    @staticmethod
    def _in(seconds: float) -> float:
        return time.monotonic() + seconds if seconds else float("inf")

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
                self.trouble.end()
                for listener in self._listeners:
                    listener(trainer, folder, checkpoint_files.step_of(folder))
                checkpoint_files.prune(self.run_dir, self.keep, frozenset(self.protected))

    def _writer(self, trainer: Trainer, launch: str) -> Writer:
        writer = Writer(self.run_dir, launch, asynchronous=self.asynchronous, permit=self.permit)
        writer.allocate(trainer.engine)
        return writer


class Trouble:
    """Rank 0's record of saves that failed one after another.

    patience  seconds after the first one until `over`
    pause     seconds until the next try: 1, 2, 4 … 60
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self._clock = patience, clock
        self._times, self._since = 0, 0.0

    @property
    def pause(self) -> float:
        return min(60.0, 2.0 ** max(self._times - 1, 0))

    @property
    def over(self) -> bool:
        return self._times > 0 and self._clock() - self._since >= self.patience

    def end(self) -> None:
        self._times = 0

    def add(
        self, run_dir: Path, keep: int, protect: frozenset[Path], step: int, failure: CheckpointError | None
    ) -> None:
        """One more failure. Removes what is not whole, and with each failure one more old checkpoint; the newest one stays."""
        self._times += 1
        if self._times == 1:
            self._since = self._clock()
        with suppress(OSError):
            checkpoint_files.make_room(run_dir, max(keep - self._times, 1), protect)
        newest = next((manifest["step"] for _, manifest in checkpoint_files.whole(run_dir)), 0)
        say(
            f"step {step}: the checkpoint could not be written ({failure or 'the log of another rank says why'}); training goes "
            f"on, next try in {self.pause:g} s; the newest whole checkpoint is "
            + (f"that of step {newest}" if newest else "yet to come"),
            error=True,
        )
