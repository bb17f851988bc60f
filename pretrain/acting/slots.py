"""The slots of an action: what a model answers, and the rows of tokens that it answers in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.timestep import Element
from tiphys.pretrain.tokens.vector_codecs import Chunk


@dataclass(frozen=True)
class Slot:
    """One answer that the model gives: an id in [low, high), or, if `head` is set, the vector of that regression head, or the
    chunk of actions of a head of chunks.

    For a vector, low and high are 0. `field` is the action field that the answer belongs to. If not `shown`, later answers do
    not depend on this one: the token `mask` stays in its place.
    """

    field: str
    low: int
    high: int
    head: str = ""
    shown: bool = True


class Head(NamedTuple):
    """The beginning of a window: its tokens are the same wherever these three are the same.

    tokens   number of tokens, from the window's first on
    said     what it says: the texts of an instruction; None: the demonstration of the history
    number   number of the window's first step in its episode; 0 if the tokens do not depend on it
    """

    tokens: int
    said: tuple[str, ...] | None
    number: int


@dataclass(frozen=True)
class Acting:
    """Histories whose next action is still to be chosen, one row for each environment.

    batch  TokenBatch [R, L] without targets: everything up to the action, then the positions of the action. `answer` fills in
           the ids or vectors of those; everything else about them (segment, position, local, …) is already there
    open   int64 [R]: column of the action's first position. The model gives the answer to slot i at column open + i − 1, and
           the answer stands in column open + i
    slots  the answers that make up the action, in order
    start  int64 [R]: column of the first token that the model has not seen yet; 0 for a row that holds a whole window
    past   int64 [R]: number of tokens of the window before that column
    heads  for each row, the beginnings of its window that other windows may share, the longest last. Empty if `past` is not 0
    allowed  slot -> bool [R, its ids]: the answers that can be given. Slots that are not in it have no limits but their own
    """

    batch: TokenBatch
    open: np.ndarray
    slots: tuple[Slot, ...]
    start: np.ndarray
    past: np.ndarray
    heads: tuple[tuple[Head, ...], ...]
    allowed: Mapping[int, np.ndarray] = field(default_factory=dict)

    def _restricted(self, allowed: Mapping[int, np.ndarray]) -> Acting:
        return replace(self, allowed=allowed)

    def answer(self, slot: int, value: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Write the answers to a slot into these rows (None: all), so that the next slot's answer can depend on them.

        value  int [n] ids, or float [n, d] vectors; an element for each row
        """
        if not self.slots[slot].shown:
            return
        rows = np.arange(len(self.open)) if rows is None else rows
        column = self.open[rows] + slot
        if not self.slots[slot].head:
            self.batch.tokens[rows, column] = value
            return
        part = self.batch.embedded[f"vector:{self.slots[slot].head}"]
        value = value[:, : part.value.shape[1]]  # of a chunk, its token shows what is executed
        part.value[np.searchsorted(part.index, rows * self.batch.length + column)] = value

    def written(self, slot: int) -> np.ndarray:
        """The answers to a slot that stand in the batch: ids [R, 1] or vectors [R, d]."""
        rows = np.arange(len(self.open))
        column = self.open + slot
        if not self.slots[slot].head:
            return self.batch.tokens[rows, column][:, None]
        part = self.batch.embedded[f"vector:{self.slots[slot].head}"]
        found = part.value[np.searchsorted(part.index, rows * self.batch.length + column)]
        return found.reshape(len(rows), -1)


def name_of(element: Element) -> str:
    """The field of an element; `return` for a return."""
    return element.field or element.role


def slots_of(element: Element) -> list[Slot]:
    """The slots of an element, in order."""
    codec = element.codec
    assert codec is not None
    if element.head:
        return [Slot(name_of(element), 0, 0, element.head, element.shown)]
    return [Slot(name_of(element), low, high, shown=element.shown) for low, high in codec.choices()]


def limited(slots: Sequence[Slot], codec: Discrete, field: FieldSpec) -> list[Slot]:
    """The slots with only those values that a field of the environment has. Raises DataError if none is left."""
    if field.low is not None and field.high is not None:
        bounds = [np.broadcast_to(field.entries(b).reshape(-1), len(slots)) for b in (field.low, field.high)]
    elif field.values:
        bounds = [np.zeros(len(slots)), np.full(len(slots), field.values - 1)]
    else:
        return list(slots)
    least = np.broadcast_to(codec.low, len(slots))
    out = []
    for i, (slot, low, high) in enumerate(zip(slots, *bounds, strict=True)):
        first = slot.low - int(least[i])  # id of the value 0
        found = replace(slot, low=max(slot.low, first + int(low)), high=min(slot.high, first + int(high) + 1))
        if found.low >= found.high:
            raise DataError(
                f"field {slot.field!r}, entry {i}: the policy answers {least[i]} to {slot.high - first - 1}, but the environment "
                f"takes {int(low)} to {int(high)}"
            )
        out.append(found)
    return out


def any_value(element: Element) -> np.ndarray:
    """Some valid value, as a placeholder for the one that is still unknown."""
    codec = element.codec
    assert codec is not None
    if isinstance(codec, Chunk):
        return np.zeros(codec.shape, codec.dtype)
    if codec.embedder:
        return codec.decode(np.zeros((1, codec.tokens, *codec.embedder_spec().shape), np.float32))[0]
    return codec.decode(np.array([[low for low, _ in codec.choices()]]))[0]
