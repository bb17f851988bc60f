"""Loss on held-out rows: what a team can watch without a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.batch import TokenBatch

if TYPE_CHECKING:
    from pretrain.engine import Engine


@dataclass(frozen=True)
class ValidationResult:
    """sums [tasks, 3]: Σ weight · loss, Σ loss and number of targets of each task over the held-out rows."""

    sums: np.ndarray

    @property
    def loss(self) -> float:
        """As in training: weighted, over all targets."""
        return float(self.sums[:, 0].sum() / max(self.sums[:, 2].sum(), 1.0))

    @property
    def targets(self) -> int:
        return int(self.sums[:, 2].sum())

    def to_json(self, tasks: Sequence[str] = ()) -> dict[str, Any]:
        """`loss_by_task`: each task's own mean, unweighted."""
        by_task = {
            tasks[t] if t < len(tasks) else str(t): loss / n for t, (_, loss, n) in enumerate(self.sums.tolist()) if n
        }
        return {"loss": self.loss, "targets": self.targets, "loss_by_task": by_task}


def validate(engine: Engine, batches: Sequence[TokenBatch]) -> ValidationResult:
    """Held-out loss over this rank's batches and all other ranks'. Collective; no weight and no router's share moves."""
    most = max(engine.world.gather(len(batches)))
    sums = np.zeros((max(1, len(engine.config.tasks)), 3))
    for i in range(most):
        sums += engine.evaluate(batches[i] if i < len(batches) else TokenBatch.empty(0, 1))
    return ValidationResult(sums)
