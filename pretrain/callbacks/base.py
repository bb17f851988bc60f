"""What every callback is: `Callback` with its stages, and the clock `Every`.

The trainer calls each stage on all ranks, for all callbacks in the same order. So what is collective in one callback must be
reached by all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer


class Callback:
    """Does nothing at every stage.

    on_start   training can begin, after a resume
    on_step    after every step
    on_end     after the last step, or after a stop
    close      at last, after an error too
    """

    def on_start(self, trainer: Trainer) -> None: ...
    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None: ...
    def on_end(self, trainer: Trainer) -> None: ...
    def close(self, trainer: Trainer) -> None: ...


@dataclass(frozen=True)
class Every:
    """A clock: true at every n-th step; 0 never."""

    steps: int

    def __call__(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0
