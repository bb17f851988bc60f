"""`Callback`, the base of all callbacks with its stages, and the clock `Every`.

The trainer calls each stage on all ranks, for all callbacks in the same order. A callback may therefore use collectives, if
all ranks reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiphys.pretrain.health import Spike
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer


class Callback:
    """Does nothing at any stage.

    on_start   before the first step, after a checkpoint was loaded
    on_step    after every step
    on_change  when events (of `tiphys mixture`) were added to the plan's log, before `on_step` of the step that is being done
    on_spike   when the last steps damaged the model, instead of `on_step`; training ends after it
    on_end     after the last step, or after a stop
    close      at the very end, also after an error
    """

    def on_start(self, trainer: Trainer) -> None: ...
    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None: ...
    def on_change(self, trainer: Trainer, events: Sequence[dict[str, Any]]) -> None: ...
    def on_spike(self, trainer: Trainer, spike: Spike) -> None: ...
    def on_end(self, trainer: Trainer) -> None: ...
    def close(self, trainer: Trainer) -> None: ...


@dataclass(frozen=True)
class Every:
    """A clock: true at every n-th training step; with 0 never."""

    steps: int

    def __call__(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0
