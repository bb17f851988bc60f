"""Loss and open-loop action error on held-out rows: quality without a simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.pretrain.action_error import COLUMNS
from tiphys.pretrain.model.heads import SUMS
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.engine import Engine


@dataclass(frozen=True)
class ValidationResult:
    """Sums over the held-out rows.

    sums     [tasks, SUMS]: see `heads.add_by_task`
    errors   [tasks, 4]: predicted tokens, wrong ones, regressed vectors, Σ of their mean |error|
    fields   (number of the task, name) of each field of which there are errors in the units of the data
    by_field [fields, 2]: Σ error and number of elements
    text_bytes [tasks]: bytes of the tokens of texts among the targets; empty: they were not counted
    """

    sums: np.ndarray
    errors: np.ndarray
    fields: Sequence[tuple[int, str]] = ()
    by_field: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    text_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def loss(self) -> float:
        """Weighted mean over all targets, as in training."""
        return float(self.sums[:, 0].sum() / max(self.sums[:, 2].sum(), 1.0))

    @property
    def targets(self) -> int:
        return int(self.sums[:, 2].sum())

    def to_json(self, tasks: Sequence[str] = ()) -> dict[str, Any]:
        """The values for metrics.jsonl. Those by task are unweighted means over the targets of that task.

        wrong_by_task   share of the target tokens that were not the most probable token
        error_by_task   mean |error| of regressed actions, on the scale in which they are learned
        perplexity      task -> `token`: exp of the mean loss of the tokens of its texts; `byte`: exp of their summed loss ÷ their
                        bytes, which compares models with different tokenizers. Only tasks whose texts are predicted
        action_error    task -> field -> mean |error| in the units of the data, or the share of wrong values of a discrete field
        """
        by_field: dict[str, dict[str, float]] = {}
        for (task, name), (total, count) in zip(self.fields, self.by_field.tolist(), strict=True):
            if count:
                by_field.setdefault(tasks[task] if task < len(tasks) else str(task), {})[name] = total / count

        def means(total: np.ndarray, count: np.ndarray) -> dict[str, float]:
            pairs = enumerate(zip(total.tolist(), count.tolist(), strict=True))
            return {tasks[t] if t < len(tasks) else str(t): s / n for t, (s, n) in pairs if n}

        return {
            "loss": self.loss,
            "targets": self.targets,
            "loss_by_task": means(self.sums[:, 1], self.sums[:, 2]),
            "wrong_by_task": means(self.errors[:, 1], self.errors[:, 0]),
            "error_by_task": means(self.errors[:, 3], self.errors[:, 2]),
            "perplexity": self._perplexity(tasks),
            "action_error": by_field,
        }

    def _perplexity(self, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {}
        for task, (total, count) in enumerate(self.sums[:, 3:5].tolist()):
            if not count:
                continue
            mine = out[tasks[task] if task < len(tasks) else str(task)] = {"token": _exp(total / count)}
            if task < len(self.text_bytes) and self.text_bytes[task]:
                mine["byte"] = _exp(total / float(self.text_bytes[task]))
        return out


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def validate(engine: Engine, batches: Sequence[TokenBatch]) -> ValidationResult:
    """Evaluate the held-out batches of all ranks, which may have different numbers of them. Collective. Changes no state."""
    most = max(engine.world.gather(len(batches)))
    tasks = max(1, len(engine.config.tasks))
    fields = engine.native.fields if engine.native is not None else []
    sums = {
        "by_task": np.zeros((tasks, SUMS)),
        "text_bytes": np.zeros(tasks),
        "errors": np.zeros((tasks, COLUMNS)),
        "by_field": np.zeros((len(fields), 2)),
    }
    for i in range(most):
        part = engine.evaluate(batches[i] if i < len(batches) else TokenBatch.empty(0, 1))
        sums = {name: total + part[name] for name, total in sums.items()}
    return ValidationResult(sums["by_task"], sums["errors"], fields, sums["by_field"], sums["text_bytes"])
