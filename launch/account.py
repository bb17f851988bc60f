"""What a launch was, in metrics.jsonl: when, where, on which layout, and what its plan draws. The report shows it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tiphys.pretrain.callbacks.base import Callback

if TYPE_CHECKING:
    from tiphys.pretrain.callbacks.metrics_writer import MetricsWriter
    from tiphys.pretrain.trainer import Trainer


class Account(Callback):
    """Rank 0 writes a line `launch` when training starts or resumes, and a line `plan` when the mixture changes.

    describe   (step) -> `SamplingPlan.describe` of the step
    """

    def __init__(self, writer: MetricsWriter, describe: Callable[[int], dict[str, Any]]) -> None:
        self.writer, self.describe = writer, describe

    def on_start(self, trainer: Trainer) -> None:
        world, engine = trainer.world, trainer.engine
        if world.rank:
            return
        line = {
            "kind": "launch",
            "step": trainer.step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "device": str(world.device),
            "ranks": world.world,
            "layout": f"{world.pipeline} pipeline × {world.data} data, {world.expert} expert; ZeRO-{engine.zero_stage}",
            "precision": "bf16" if engine.bf16 else "fp32",
            "steps": trainer.steps,
        }
        self.writer.write(line)
        self._plan(trainer.step, trainer.step)

    def on_change(self, trainer: Trainer, events: Sequence[dict[str, Any]]) -> None:
        if trainer.world.rank == 0:
            self._plan(trainer.step, max(event["step"] for event in events))

    def _plan(self, step: int, first: int) -> None:
        """Shares, and steps of an epoch, of each entry of the mixture, from training step `first` + 1 on."""
        found = self.describe(first)["entries"]
        self.writer.write({"kind": "plan", "step": step, "first": first, "entries": found})
