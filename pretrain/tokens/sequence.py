"""Windows -> TokenBatch: the one place where positions, segments and targets are laid out, in training and in acting.

Windows of one task are laid out at once, because this runs in the loader: no Python runs by token, little by window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.tokens.batch import TEXT, Embedded, Regression, TokenBatch
from tiphys.pretrain.tokens.codecs import BadValue, Patches
from tiphys.pretrain.tokens.images import places, to_patches
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import ACTION_LOCAL, Element, Timestep
from tiphys.pretrain.tokens.vocabulary import Vocabulary

Schemes = Sequence[Mapping[int, Timestep]]  # line of the mixture -> task -> its timestep
_NOTHING = np.zeros(0, np.int32)


@dataclass
class _Group:
    """Windows of one line and task: G windows, N timesteps in all, W columns a timestep."""

    timestep: Timestep
    windows: list[Window]
    number: np.ndarray  # [G] each window's number in the batch
    steps: np.ndarray  # [G] timesteps of each
    texts: list[np.ndarray]  # G preambles
    spoken: list[np.ndarray]  # texts by step: N for each such element, in order
    keep: np.ndarray | None  # bool [N, W]: columns that are there; None: all

    @property
    def owner(self) -> np.ndarray:
        """[N] the window in the group that each timestep belongs to."""
        return np.repeat(np.arange(len(self.steps)), self.steps)

    @property
    def first(self) -> np.ndarray:
        """[G] each window's first timestep."""
        return np.cumsum(self.steps) - self.steps

    def body(self) -> np.ndarray:
        """[G] positions of each window's timesteps."""
        if self.keep is None:
            return self.steps * self.timestep.width
        ends = np.concatenate([[0], np.cumsum(self.keep.sum(axis=1))])
        return ends[self.first + self.steps] - ends[self.first]

    def preamble(self) -> np.ndarray:
        return np.array([len(t) for t in self.texts], np.int64)

    def gather(self, field: str, constant: bool = False) -> np.ndarray:
        """[N, *shape]: a field's rows, window after window; `constant`: its one value, once a timestep."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = _field(window, field)
            if constant:
                rows = np.broadcast_to(rows, (n, *np.shape(rows)))
            parts.append(rows[:n])
            if len(parts[-1]) < n:
                raise DataError(
                    f"episode {window.episode!r}: field {field!r} has {len(rows)} rows from step {window.start}, not {n}"
                )
        return np.concatenate(parts)

    def pictures(self, field: str, codec: Patches, constant: bool) -> np.ndarray:
        """uint8 [N, height, width, C] of pictures whose sizes differ between windows."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = _field(window, field)
            parts.append(np.repeat(codec.pixels(rows[None]), n, axis=0) if constant else codec.pixels(rows[:n]))
        return np.concatenate(parts)

    def refuse(self, field: str, error: BadValue) -> DataError:
        """The error of a value, with the episode and the step it stands in."""
        owner = int(self.owner[error.at])
        window = self.windows[owner]
        step = int(window.step[error.at - int(self.first[owner])])
        return DataError(
            f"task {self.timestep.task!r}, field {field!r}, episode {window.episode!r}, step {step}: {error.reason}"
        )


def _field(window: Window, field: str) -> Any:
    try:
        return window.fields[field]
    except KeyError:
        has = ", ".join(sorted(window.fields))
        raise DataError(f"episode {window.episode!r} has no field {field!r}; its window has {has}") from None


def assemble(
    step: int,
    rows: np.ndarray,
    windows: Sequence[Sequence[Window]],
    schemes: Schemes,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    length: int | None = None,
    seed: int = 0,
    training: bool = True,
) -> TokenBatch:
    """The TokenBatch of rows [R] of the global batch, each with its windows in order; length None: as long as the longest.

    The target of a predicted position stands at the position before it, within its segment; a prompt has none.
    Raises DataError where a window lacks a field, has a value without encoding, or a row exceeds `length`.
    """
    flat = [w for row in windows for w in row]
    row_of = np.repeat(np.arange(len(windows)), [len(row) for row in windows])
    groups = _group(flat, schemes, vocabulary, text)
    size = np.zeros(len(flat), np.int64)
    for group in groups:
        size[group.number] = group.preamble() + group.body()
    used = np.bincount(row_of, size, minlength=len(windows)).astype(np.int64)
    length = int(used.max(initial=1)) if length is None else length
    if (used > length).any():
        at = int(used.argmax())
        raise DataError(f"row {int(rows[at])} of the batch has {int(used[at])} tokens, more than the {length} of a row")
    start = row_of * length + np.cumsum(size) - size - (np.cumsum(used) - used)[row_of]
    draft = _Draft(np.asarray(rows, np.int64), length, vocabulary)
    draft.spans(flat, size, start, row_of, np.array([schemes[w.entry][w.task].number for w in flat], np.int32))
    for group in groups:
        draft.lay(group, start[group.number])
    return draft.finish(step, seed, training)


def _group(flat: list[Window], schemes: Schemes, vocabulary: Vocabulary, text: TextTokenizer) -> list[_Group]:
    members: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(flat):
        members.setdefault((window.entry, window.task), []).append(number)
    return [
        _measure(schemes[entry][task], [flat[i] for i in numbers], numbers, vocabulary, text)
        for (entry, task), numbers in members.items()
    ]


def _measure(
    timestep: Timestep, windows: list[Window], numbers: list[int], vocabulary: Vocabulary, text: TextTokenizer
) -> _Group:
    """A group with everything that decides how many positions its windows take."""
    # A last row without an action is nothing to learn from, but it is all that a caption has.
    steps = [w.steps - (timestep.acts and not w.valid[w.steps - 1]) for w in windows]
    texts = [_NOTHING] * len(windows)
    for field in timestep.preamble:
        said = ["" if w.prompt else _field(w, field) for w in windows]  # a prompt is planned without its text
        texts = [np.concatenate([t, f]) for t, f in zip(texts, text.encode(said, timestep.text), strict=True)]
    if timestep.ends:
        end = np.array([vocabulary.end_of_text], np.int32)
        texts = [np.concatenate([t, end]) for t in texts]
    group = _Group(timestep, windows, np.array(numbers), np.array(steps, np.int64), texts, [], None)
    if timestep.varies:
        _thin(group, text)
    return group


def _thin(group: _Group, text: TextTokenizer) -> None:
    """Fills in `spoken` and `keep`."""
    timestep, owner = group.timestep, group.owner
    keep = np.ones((len(owner), timestep.width), bool)
    numbers = np.concatenate([w.step[:n] for w, n in zip(group.windows, group.steps.tolist(), strict=True)])
    answered = (np.arange(len(owner)) - group.first[owner]) % timestep.chunk == 0
    for element, column in zip(timestep.elements, timestep.columns, strict=True):
        span = slice(column, column + element.size)
        if element.role != "action":
            keep[:, span] &= (answered & (numbers % element.stride == 0))[:, None]
        if element.role == "text":
            found = text.encode([str(t) for t in group.gather(element.field)], element.size)
            keep[:, span] &= np.arange(element.size) < np.array([len(f) for f in found])[:, None]
            group.spoken.append(_padded(found, element.size))
    group.keep = keep


def _padded(texts: list[np.ndarray], width: int) -> np.ndarray:
    """int32 [N, width] of ragged ids."""
    out = np.zeros((len(texts), width), np.int32)
    sizes = np.array([len(t) for t in texts])
    out[np.arange(width) < sizes[:, None]] = np.concatenate([*texts, _NOTHING])
    return out


class _Draft:
    """A batch being laid out: flat arrays of rows · length cells and one more, where columns go that a timestep lacks."""

    def __init__(self, rows: np.ndarray, length: int, vocabulary: Vocabulary):
        self.rows, self.length, self.vocabulary = rows, length, vocabulary
        self.cells = len(rows) * length
        kinds: dict[str, Any] = {"modality": np.uint8, "causal": bool, "softmax": np.uint8, "weight": np.float32}
        names = ("tokens", "segment", "position", "local", "timestep", "task", "target")
        kinds |= dict.fromkeys(names, np.int32)
        self.dense = {name: np.zeros(self.cells + 1, kind) for name, kind in kinds.items()}
        self.dense["target"] -= 1
        self.values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.patches: dict[str, list[np.ndarray]] = {}
        self.vectors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.prompt = np.zeros(self.cells + 1, bool)

    def spans(
        self, flat: list[Window], size: np.ndarray, start: np.ndarray, row_of: np.ndarray, task: np.ndarray
    ) -> None:
        """What is one for a whole window: its segment, positions and task."""
        if not flat:
            return
        prompt = np.array([w.prompt for w in flat])
        opens = np.ones(len(flat), bool)  # a window shares the segment of the prompt before it
        opens[1:] = (row_of[1:] != row_of[:-1]) | ~prompt[:-1]
        opener = np.maximum.accumulate(np.where(opens, np.arange(len(flat)), 0))
        number = np.cumsum(opens)
        head = np.searchsorted(row_of, row_of)  # each row's first window
        segment = number - number[head] + 1
        cell = np.arange(size.sum()) + np.repeat(start - (np.cumsum(size) - size), size)
        dense = self.dense
        dense["segment"][cell] = np.repeat(segment, size)
        dense["position"][cell] = cell - np.repeat(start[opener], size)
        dense["task"][cell] = np.repeat(task, size)
        dense["causal"][cell] = True
        self.prompt[cell] = np.repeat(prompt, size)

    def lay(self, group: _Group, start: np.ndarray) -> None:
        """Everything of a group's windows, which start at cells `start` [G]."""
        timestep, preamble = group.timestep, group.preamble()
        body = start if timestep.ends else start + preamble
        if preamble.any():
            self._lay_preamble(group, start + group.body() if timestep.ends else start, preamble)
        if not timestep.width or not group.steps.any():
            return
        cell = self._cells(group, body)
        self._lay_frame(group, cell)
        spoken = iter(group.spoken)
        for element, column in zip(timestep.elements, timestep.columns, strict=True):
            at = cell[:, column : column + element.size]
            if element.role == "text":
                self.dense["tokens"][at] = next(spoken)
            elif element.role == "separator":
                self.dense["tokens"][at] = self.vocabulary.separator
            else:
                self._lay_values(group, element, at)
            if element.predicted and not element.head:
                self._predict(at.ravel(), timestep)

    def _cells(self, group: _Group, body: np.ndarray) -> np.ndarray:
        """int64 [N, width]: the cell of each column of each timestep; the spare cell where it is absent."""
        width, owner = group.timestep.width, group.owner
        if group.keep is None:
            within = np.arange(len(owner)) - group.first[owner]
            return (body[owner] + within * width)[:, None] + np.arange(width)
        rank = np.cumsum(group.keep).reshape(group.keep.shape) - 1
        before = np.concatenate([[0], np.cumsum(group.keep.sum(axis=1))])[group.first]
        return np.where(group.keep, (body - before)[owner][:, None] + rank, self.cells)

    def _lay_frame(self, group: _Group, cell: np.ndarray) -> None:
        timestep, dense = group.timestep, self.dense
        dense["modality"][cell] = timestep.modality
        local = timestep.local
        if timestep.spoken:  # what follows a text counts on from its end
            lacking = timestep.spoken - group.keep[:, : timestep.spoken].sum(axis=1)  # type: ignore[index]
            behind = (np.arange(timestep.width) >= timestep.spoken) & (local != ACTION_LOCAL)
            local = local - lacking[:, None] * behind
        dense["local"][cell] = local
        numbers = np.concatenate([w.step[:n] for w, n in zip(group.windows, group.steps.tolist(), strict=True)])
        dense["timestep"][cell] = numbers[:, None]

    def _lay_preamble(self, group: _Group, start: np.ndarray, size: np.ndarray) -> None:
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        cell = np.repeat(start, size) + within
        dense, timestep = self.dense, group.timestep
        dense["tokens"][cell] = np.concatenate(group.texts)
        dense["modality"][cell] = TEXT
        shown = timestep.width if timestep.ends else 0
        dense["local"][cell] = np.minimum(within + shown, ACTION_LOCAL - 1)
        dense["timestep"][cell] = np.repeat([int(w.step[0]) if len(w.step) else 0 for w in group.windows], size)
        if timestep.said:
            self._predict(cell, timestep)

    def _lay_values(self, group: _Group, element: Element, at: np.ndarray) -> None:
        codec = element.codec
        assert codec is not None
        if element.role == "return":
            raw = np.concatenate(
                [w.returns_to_go[:n] for w, n in zip(group.windows, group.steps.tolist(), strict=True)]
            )
        else:
            raw = None
        try:
            if isinstance(codec, Patches) and codec.varies:
                encoded = to_patches(group.pictures(element.field, codec, element.constant))
            else:
                encoded = codec.encode(group.gather(element.field, element.constant) if raw is None else raw)
        except BadValue as error:
            raise group.refuse(element.field or "return-to-go", error) from None
        if not codec.embedder:
            self.dense["tokens"][at] = encoded
            return
        self.dense["tokens"][at] = self.vocabulary.embedded
        there = at.ravel() < self.cells
        cell, value = at.ravel()[there], encoded.reshape(-1, *encoded.shape[2:])[there]
        self.values.setdefault(codec.embedder, []).append((cell, value))
        if isinstance(codec, Patches):
            spans = np.broadcast_to(codec.spans, (len(at), *codec.spans.shape)).reshape(-1, 4)[there]
            self.patches.setdefault(codec.embedder, []).append(spans)
        if element.predicted:
            learnt = self._learnt(cell)
            weight = np.full(len(cell), group.timestep.weight, np.float32)
            self.vectors.setdefault(element.head, []).append((cell[learnt] - 1, value[learnt], weight[learnt]))

    def _learnt(self, cell: np.ndarray) -> np.ndarray:
        """bool: cells that are there, not in a prompt, and have one before them in their segment."""
        return (cell < self.cells) & ~self.prompt[cell] & (self.dense["position"][cell] > 0)

    def _predict(self, cell: np.ndarray, timestep: Timestep) -> None:
        """Targets for the ids that stand in `cell`, each at the cell before."""
        dense, vocabulary = self.dense, self.vocabulary
        cell = cell[self._learnt(cell)]
        ids = dense["tokens"][cell]
        dense["target"][cell - 1] = ids
        dense["weight"][cell - 1] = timestep.weight
        if timestep.softmax == "range":
            highs = np.array([high for _, _, high in vocabulary.ranges])
            dense["softmax"][cell - 1] = np.searchsorted(highs, ids, side="right") + 1

    def finish(self, step: int, seed: int, training: bool) -> TokenBatch:
        embedded = {}
        for name in sorted(self.values):
            cell, value = (np.concatenate(part) for part in zip(*self.values[name], strict=True))
            order = np.argsort(cell, kind="stable")
            cell, value = cell[order], value[order]
            place = np.zeros((0, 2), np.int32)
            if name in self.patches:
                spans = np.concatenate(self.patches[name])[order]
                place = places(spans, seed, step, self.rows[cell // self.length], cell % self.length, training)
            embedded[name] = Embedded(cell, value, place)
        regression = {}
        for name in sorted(self.vectors):
            cell, value, weight = (np.concatenate(part) for part in zip(*self.vectors[name], strict=True))
            order = np.argsort(cell, kind="stable")
            regression[name] = Regression(cell[order], value[order], weight[order])
        shape = (len(self.rows), self.length)
        dense = {name: array[:-1].reshape(shape) for name, array in self.dense.items()}
        return TokenBatch(step=step, row=self.rows, embedded=embedded, regression=regression, **dense)
