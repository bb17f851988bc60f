"""Publishes checkpoints during training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.errors import Explained
from tiphys.dataio.messages import say
from tiphys.pretrain.callbacks.base import Callback, Every

if TYPE_CHECKING:
    from tiphys.pretrain.callbacks.checkpointer import Checkpointer
    from tiphys.pretrain.trainer import Trainer


class Publisher(Callback):
    """Calls publish(checkpoint folder, step) in a thread, every `every` steps. Errors are printed and do not stop training."""

    def __init__(self, every: int, publish: Callable[[Path, int], None], checkpointer: Checkpointer) -> None:
        self.clock, self.publish, self.checkpointer = Every(every), publish, checkpointer
        checkpointer.listen(self._checkpointed)
        self._thread: threading.Thread | None = None

    def _checkpointed(self, trainer: Trainer, folder: Path, step: int) -> None:
        if (
            not self.clock(step) or step == trainer.steps
        ):  # the last one is published with its evaluation, after training
            return
        if self._thread is not None and self._thread.is_alive():
            say(f"step {step}: not published, because the previous publication is still running")
            return
        release = self.checkpointer.protect(folder)
        self._thread = threading.Thread(target=self._run, args=(folder, step, release), name="publish")
        self._thread.start()

    def _run(self, folder: Path, step: int, release: Callable[[], None]) -> None:
        try:
            self.publish(folder, step)
        except Exception as error:
            kind = "" if isinstance(error, (Explained, ValueError, OSError)) else f"{type(error).__name__}: "
            say(f"step {step} was not published: {kind}{error}", error=True)
        finally:
            release()

    def on_end(self, trainer: Trainer) -> None:
        if self._thread is not None:
            self._thread.join()
