"""Open-loop error: how far predicted actions are from the recorded ones, given the recorded past; on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tiphys.pretrain.model.targets import IDS, TARGETS, targets_of

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel, DecisionOutput

COLUMNS = (
    4  # predicted tokens and pairs, wrong ones among them, regressed vectors, and the sum of the vectors' mean |error|
)


def action_errors(model: DecisionModel, output: DecisionOutput, inputs: Mapping[str, Tensor]) -> Tensor:
    """float64 [tasks, 4], see COLUMNS. A token is wrong if another id of its softmax has a higher probability."""
    sums = torch.zeros(max(1, len(model.config.tasks)), COLUMNS, dtype=torch.float64, device=output.hidden.device)
    for name in inputs:
        kind, _, head = name.partition("/")
        if kind not in TARGETS or (targets := targets_of(inputs, name)) is None:
            continue
        hidden, low = output.hidden[targets.place], 0
        # Do not call the modules: under ZeRO-3 the call is a collective, and other ranks may have no target for this head.
        if kind in IDS:
            low = model.output.bounds[int(head)][0]
            guess = model.logits(hidden, int(head))
        elif kind == "pairs":
            part = model.head.match
            assert part is not None
            guess = part.without_hooks(hidden, output.hidden[targets.payload[:, 0]])
        else:
            layer = model.head.regressions[model.head.names[head]]
            guess = F.linear(hidden, layer.weight, layer.bias).float()  # type: ignore[arg-type]
        _add(sums, targets.task, TARGETS[kind].column, TARGETS[kind].errors(guess, targets.payload, low))
    return sums


def _add(sums: Tensor, task: Tensor, column: int, errors: Tensor) -> None:
    sums[:, column].index_add_(0, task, torch.ones_like(errors))
    sums[:, column + 1].index_add_(0, task, errors)
