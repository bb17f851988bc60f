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
from tiphys.pretrain.model.chunks import payload_size
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

IDS = ("target", "allowed")  # kinds of targets that are ids
COMMON = 3  # columns before the payload
Found = tuple[str, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TargetKind:
    """One kind of targets.

    heads     config -> the names of its heads, in a fixed order
    payload   (config, head) -> columns of what is to be predicted
    collect   (batch, compact place of each flat position) -> (head, flat positions [n], float32 weights [n], int32 payload
              [n, …]) of each head with targets
    losses    (prediction [n, …], payload, first id of the head) -> float32 [n], without weights
    errors    the same, for people: wrong or not, or mean |error|
    column    where `action_error` counts them
    """

    heads: Callable[[DecisionConfig], list[str]]
    payload: Callable[[DecisionConfig, str], int]
    collect: Callable[[TokenBatch, np.ndarray], Iterator[Found]]
    losses: Callable[[Tensor, Tensor, int], Tensor]
    errors: Callable[[Tensor, Tensor, int], Tensor]
    column: int


def _ids(batch: TokenBatch, place: np.ndarray) -> Iterator[Found]:
    target, weight = batch.target.reshape(-1), batch.weight.reshape(-1)
    free = target >= 0
    for a in batch.allowed.values():
        free[a.index] = False
    flat = np.flatnonzero(free)
    softmax = batch.softmax.reshape(-1)[flat]
    for number in np.unique(softmax):
        at = flat[softmax == number]
        yield str(number), at, weight[at], target[at, None]


def _some_ids(batch: TokenBatch, place: np.ndarray) -> Iterator[Found]:
    target, weight = batch.target.reshape(-1), batch.weight.reshape(-1)
    for name, a in batch.allowed.items():
        if len(a.index):
            yield name, a.index, weight[a.index], np.concatenate([target[a.index, None], a.bits], axis=1)


def only_allowed(logits: Tensor, payload: Tensor) -> Tensor:
    """Logits [n, ids], with -inf for the ids that the payload (id, words of bits) does not allow."""
    bits = (payload[:, 1:, None] >> torch.arange(32, device=payload.device, dtype=torch.int32)) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def _vectors(batch: TokenBatch, place: np.ndarray) -> Iterator[Found]:
    for name, r in batch.regression.items():
        if len(r.index):
            yield name, r.index, r.weight, to_bits(r.value)


def _pairs(batch: TokenBatch, place: np.ndarray) -> Iterator[Found]:
    for name, p in batch.pairs.items():
        if len(p.index):
            row = p.index // max(1, batch.length)
            yield name, p.index, p.weight, np.stack([place[p.index + p.ahead], row, p.text], axis=1)


def _chunks(batch: TokenBatch, place: np.ndarray) -> Iterator[Found]:
    for name, c in batch.chunks.items():
        if n := len(c.index):
            numbers = (c.value, c.noise.reshape(n, -1), c.time)
            yield name, c.index, c.weight, np.concatenate([c.count[:, None], *map(to_bits, numbers)], axis=1)


def _by_head(prediction: Tensor, payload: Tensor, low: int) -> Tensor:
    raise NotImplementedError("a chunk's loss comes from its head (`chunks.ChunkHead`)")


def candidates(pairs: Tensor) -> Tensor:
    """bool [n, n]: the texts (columns) that each window is told from: those of its row that differ from its own; and its own.

    pairs  int32 [n, 3]: place of the text, row, number of the text in its row
    """
    row, text = pairs[:, 1], pairs[:, 2]
    other = (row[:, None] == row) & (text[:, None] != text)
    return other | torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)


def _contrast(logits: Tensor, pairs: Tensor, low: int) -> Tensor:
    """The mean of the losses in both directions: each window among the texts, and each text among the windows."""
    logits = logits.masked_fill(~candidates(pairs), -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    losses = [F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def _mistaken(logits: Tensor, pairs: Tensor, low: int) -> Tensor:
    own = torch.arange(len(logits), device=logits.device)
    return (logits.masked_fill(~candidates(pairs), -torch.inf).argmax(-1) != own).double()


def _ids_of(config: DecisionConfig, softmax: int) -> int:
    return config.vocab_size if softmax == 0 else int(config.ranges[softmax - 1][2] - config.ranges[softmax - 1][1])


# Ids are predicted over a range of the vocabulary, or over some ids of one. Vectors are regressed, with the mean square over
# their dimensions (Chen et al. 2021). Pairs of windows and texts are told from each other within a row (Radford et al. 2021,
# fig. 3), so the loss does not depend on how rows are distributed. A chunk of actions is one target, whose loss is a mean.
TARGETS: dict[str, TargetKind] = {
    "target": TargetKind(
        heads=lambda config: [str(i) for i in range(len(config.ranges) + 1)],
        payload=lambda config, head: 1,
        collect=_ids,
        losses=lambda logits, ids, low: F.cross_entropy(logits, ids[:, 0].long() - low, reduction="none"),
        errors=lambda logits, ids, low: (logits.argmax(-1) + low != ids[:, 0]).double(),
        column=0,
    ),
    "allowed": TargetKind(
        heads=lambda config: [str(i) for i in range(len(config.ranges) + 1)],
        payload=lambda config, head: 1 + -(-_ids_of(config, int(head)) // 32),
        collect=_some_ids,
        losses=lambda logits, ids, low: F.cross_entropy(
            only_allowed(logits, ids), ids[:, 0].long() - low, reduction="none"
        ),
        errors=lambda logits, ids, low: (only_allowed(logits, ids).argmax(-1) + low != ids[:, 0]).double(),
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
    "pairs": TargetKind(
        heads=lambda config: ["match"] if config.pairs else [],
        payload=lambda config, head: 3,
        collect=_pairs,
        losses=_contrast,
        errors=_mistaken,
        column=0,
    ),
    "chunks": TargetKind(
        heads=lambda config: sorted(config.chunks),
        payload=lambda config, head: payload_size(config.chunks[head]),
        collect=_chunks,
        losses=_by_head,
        errors=_by_head,
        column=2,
    ),
}


def target_arrays(batch: TokenBatch, place: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of all targets of a batch. `place`: flat position -> compact place."""
    task, out = batch.task.reshape(-1), {}
    for kind, targets in TARGETS.items():
        for head, at, weight, payload in targets.collect(batch, place):
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
