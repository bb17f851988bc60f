"""Open-loop error: how far predicted actions are from the recorded ones, given the recorded past; on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tiphys.pretrain.model.bits import from_bits
from tiphys.pretrain.model.targets import IDS, TARGETS, Targets, targets_of
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.vector_codecs import Affine

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel, DecisionOutput
    from tiphys.pretrain.tokens.sequence import Layouts
    from tiphys.pretrain.tokens.timestep import TimestepLayout

COLUMNS = (
    4  # predicted tokens and pairs, wrong ones among them, vectors and chunks, and the sum of the vectors' mean |error|
)


@dataclass(frozen=True)
class _Entry:
    """One element of an action that is predicted as an id.

    field   its number in `NativeErrors.fields`
    low     the first id that it can have
    values  float64 [ids]: what each id stands for; None: a discrete value, which is right or wrong
    ids     number of ids
    """

    field: int
    low: int
    ids: int
    values: Tensor | None


@dataclass(frozen=True)
class _Head:
    """A regressed field of a task: half of the range of each element, float64 [d]."""

    field: int
    scale: Tensor


class NativeErrors:
    """Errors of actions in the units of the data, by task and field.

    The error of a continuous field is the mean |difference| over its elements; of a discrete one, the share of elements that are
    wrong. As in acting, an element's most probable id is taken among those that it can have.

    Ids are known by their order, so only layouts that predict the whole action at every step, and no other ids but texts, are
    measured: those with other predicted parts, or with hiding, are left out.

    Parameters
    ----------
    layouts : Layouts
        `Objectives.layouts`.

    Attributes
    ----------
    fields : list of (int, str)
        (number of the task, field) of each field that is measured.
    """

    def __init__(self, layouts: Layouts) -> None:
        self.fields: list[tuple[int, str]] = []
        self._entries: dict[int, list[_Entry]] = {}
        self._heads: dict[tuple[int, str], _Head] = {}
        seen: dict[int, Any] = {}
        for by_task in layouts:
            for number, layout in by_task.items():
                actions = (_measurable(layout), [e for e in layout.elements if e.role == "action"])
                if number not in seen and actions[0]:
                    self._add(number, layout)
                elif number in seen and seen[number] != actions:
                    self._forget(number)  # objectives that encode its actions differently
                seen.setdefault(number, actions)

    def _add(self, task: int, layout: TimestepLayout) -> None:
        entries: list[_Entry] = []
        for element in layout.elements:
            if element.role != "action" or not element.predicted:
                continue
            codec, number = element.codec, len(self.fields)
            assert codec is not None
            self.fields.append((task, element.field))
            if isinstance(codec, Affine):
                scale = (np.asarray(codec.high, np.float64) - np.asarray(codec.low, np.float64)) / 2
                numbers = int(np.prod(codec.shape, dtype=np.int64))
                self._heads[task, element.head] = _Head(number, torch.tensor(np.broadcast_to(scale, (numbers,))))
                continue
            choices = codec.choices()
            ids = np.arange(max(high - low for low, high in choices))
            values = None
            if not isinstance(codec, Discrete):
                first = np.array([low for low, _ in choices])
                decoded = codec.decode(np.minimum(ids[:, None] + first, np.array([high for _, high in choices]) - 1))
                values = torch.from_numpy(decoded.reshape(len(ids), -1).astype(np.float64))
            for i, (low, high) in enumerate(choices):
                entries.append(_Entry(number, low, high - low, None if values is None else values[: high - low, i]))
        if entries:
            self._entries[task] = entries

    def _forget(self, task: int) -> None:
        self._entries.pop(task, None)
        for key in [key for key in self._heads if key[0] == task]:
            del self._heads[key]

    def measure(self, sums: Tensor, kind: str, head: str, guess: Tensor, targets: Targets, low: int) -> None:
        """Add to `sums` [fields, 2], Σ error and number of elements, the errors of one tensor of targets.

        guess  logits [n, ids from `low` on], or regressed vectors [n, d]
        """
        for task in targets.task.unique().tolist():
            mine = targets.task == task
            if kind == "regression":
                self._vectors(sums, self._heads.get((task, head)), guess[mine], targets.payload[mine])
            elif kind == "target" and task in self._entries:
                self._ids(sums, self._entries[task], guess[mine], targets.payload[mine, 0].long(), low)

    def _vectors(self, sums: Tensor, head: _Head | None, guess: Tensor, payload: Tensor) -> None:
        if head is None:
            return
        error = (guess.clamp(-1, 1) - from_bits(payload)).abs().double() * head.scale.to(guess.device)
        sums[head.field] += torch.stack([error.sum(), error.new_tensor(error.numel())])

    def _ids(self, sums: Tensor, entries: Sequence[_Entry], logits: Tensor, ids: Tensor, low: int) -> None:
        entries = [e for e in entries if low <= e.low and e.low + e.ids <= low + logits.shape[1]]  # of this softmax
        if not entries:
            return
        mine = (ids >= min(e.low for e in entries)) & (ids < max(e.low + e.ids for e in entries))
        logits, ids = logits[mine], ids[mine]  # without texts
        parts = [(e, ids[i :: len(entries)] - e.low, logits[i :: len(entries)]) for i, e in enumerate(entries)]
        if len(ids) % len(entries) or any(((known < 0) | (known >= e.ids)).any() for e, known, _ in parts):
            return  # actions that are not whole
        for entry, known, scores in parts:
            found = scores[:, entry.low - low : entry.low - low + entry.ids].argmax(-1)
            if entry.values is None:
                error = (found != known).double()
            else:
                values = entry.values.to(found.device)
                error = (values[found] - values[known]).abs()
            sums[entry.field] += torch.stack([error.sum(), error.new_tensor(error.numel())])


def _measurable(layout: TimestepLayout) -> bool:
    predicted = [e for e in layout.elements if e.predicted and e.role != "text"]
    if any(e.horizon or e.to for e in predicted):  # their values are those of a frame
        return False
    return bool(predicted) and all(e.role == "action" for e in predicted) and not layout.hiding and not layout.future


def action_errors(
    model: DecisionModel, output: DecisionOutput, inputs: Mapping[str, Tensor], native: NativeErrors | None = None
) -> tuple[Tensor, Tensor]:
    """Errors by task, float64 [tasks, 4] (see COLUMNS), and by field, [fields, 2] (Σ error and number of elements).

    A token is wrong if another id of its softmax has a higher probability.
    """
    device = output.hidden.device
    sums = torch.zeros(max(1, len(model.config.tasks)), COLUMNS, dtype=torch.float64, device=device)
    by_field = torch.zeros(len(native.fields) if native else 0, 2, dtype=torch.float64, device=device)
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
        elif kind == "chunks":
            _add(sums, targets.task, TARGETS[kind].column, model.head.chunk_head(head).errors(hidden, targets.payload))
            continue
        else:
            layer = model.head.regressions[model.head.names[head]]
            guess = F.linear(hidden, layer.weight, layer.bias).float()  # type: ignore[arg-type]
        _add(sums, targets.task, TARGETS[kind].column, TARGETS[kind].errors(guess, targets.payload, low))
        if native is not None:
            native.measure(by_field, kind, head, guess, targets, low)
    return sums, by_field


def _add(sums: Tensor, task: Tensor, column: int, errors: Tensor) -> None:
    sums[:, column].index_add_(0, task, torch.ones_like(errors))
    sums[:, column + 1].index_add_(0, task, errors)
