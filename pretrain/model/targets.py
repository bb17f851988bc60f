"""TARGETS: the kinds of targets. Inputs, loss, pipeline and action errors read what a kind is from here.

A tensor of targets is int32 [n, 3 + payload]: compact place, task, loss weight (the bits of a float32), then what is to be
predicted. Its name is that of its kind and of its head, `target/2` or `regression/action:6`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tiphys.pretrain.model.bits import from_bits, to_bits
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

COMMON = 3  # columns before the payload
Found = tuple[str, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TargetKind:
    """One kind of targets.

    heads     config -> the names of its heads, in a fixed order
    payload   (config, head) -> columns of what is to be predicted
    collect   batch -> (head, flat positions [n], float32 weights [n], int32 payload [n, …]) of each head with targets
    losses    (prediction [n, …], payload, first id of the head) -> float32 [n], without weights
    errors    the same, for people: wrong or not, or mean |error|
    column    where `action_error` counts them
    """

    heads: Callable[[DecisionConfig], list[str]]
    payload: Callable[[DecisionConfig, str], int]
    collect: Callable[[TokenBatch], Iterator[Found]]
    losses: Callable[[Tensor, Tensor, int], Tensor]
    errors: Callable[[Tensor, Tensor, int], Tensor]
    column: int


def _ids(batch: TokenBatch) -> Iterator[Found]:
    target, weight = batch.target.reshape(-1), batch.weight.reshape(-1)
    flat = np.flatnonzero(target >= 0)
    softmax = batch.softmax.reshape(-1)[flat]
    for number in np.unique(softmax):
        at = flat[softmax == number]
        yield str(number), at, weight[at], target[at, None]


def _vectors(batch: TokenBatch) -> Iterator[Found]:
    for name, r in batch.regression.items():
        if len(r.index):
            yield name, r.index, r.weight, to_bits(r.value)


# Ids are predicted over a range of the vocabulary. Vectors are regressed, with the mean square over their dimensions (Chen et
# al. 2021).
TARGETS: dict[str, TargetKind] = {
    "target": TargetKind(
        heads=lambda config: [str(i) for i in range(len(config.ranges) + 1)],
        payload=lambda config, head: 1,
        collect=_ids,
        losses=lambda logits, ids, low: F.cross_entropy(logits, ids[:, 0].long() - low, reduction="none"),
        errors=lambda logits, ids, low: (logits.argmax(-1) + low != ids[:, 0]).double(),
        column=0,
    ),
    "regression": TargetKind(
        heads=lambda config: sorted(config.regressions),
        payload=lambda config, head: config.regressions[head],
        collect=_vectors,
        losses=lambda vectors, values, low: (vectors - from_bits(values)).square().mean(-1),
        errors=lambda vectors, values, low: (vectors - from_bits(values)).abs().mean(-1).double(),
        column=2,
    ),
}


def target_arrays(batch: TokenBatch, place: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of all targets of a batch. `place`: flat position -> compact place."""
    task, out = batch.task.reshape(-1), {}
    for kind, targets in TARGETS.items():
        for head, at, weight, payload in targets.collect(batch):
            columns = (place[at, None], task[at, None], to_bits(weight)[:, None], payload)
            out[f"{kind}/{head}"] = np.concatenate(columns, axis=1).astype(np.int32)
    return out


def target_names(config: DecisionConfig) -> list[str]:
    """The names of targets that a batch may have, in a fixed order."""
    return [f"{kind}/{head}" for kind, targets in TARGETS.items() for head in targets.heads(config)]


def no_targets(name: str, config: DecisionConfig, device: torch.device) -> Tensor | None:
    """An empty tensor of targets; None if the name is not one of targets."""
    kind, _, head = name.partition("/")
    if kind not in TARGETS:
        return None
    return torch.zeros(0, COMMON + TARGETS[kind].payload(config, head), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Targets:
    """The columns of one tensor of targets: compact places [n], tasks [n], float32 weights [n], payload [n, …]."""

    place: Tensor
    task: Tensor
    weight: Tensor
    payload: Tensor


def targets_of(inputs: Mapping[str, Tensor], name: str) -> Targets | None:
    """The targets of a name; None if the batch has none."""
    found = inputs.get(name)
    if found is None or not len(found):
        return None
    return Targets(found[:, 0], found[:, 1], from_bits(found[:, 2]), found[:, COMMON:])
