"""Windows -> TokenBatch. Positions, segments and targets are laid out only here, for training and for acting.

This runs in the loader, so all windows of one task are laid out together: no Python code runs for each token, little for each
window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import BadValue, DataError, Window
from tiphys.pretrain.tokens.batch import TEXT, Embedded, Regression, TokenBatch
from tiphys.pretrain.tokens.codecs import NoEncoding, Patches
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.images import places, to_patches
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import ACTION_LOCAL, Element, TimestepLayout
from tiphys.pretrain.tokens.vocabulary import Vocabulary

Layouts = Sequence[Mapping[int, TimestepLayout]]  # mixture entry -> task -> its layout
_READABLE = {"to_go": "return-to-go"}
_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Placed:
    """Where one element of a window stands in its row.

    window   index of the window in its row
    step     index of the step in its window; None for the preamble, which stands once in a window
    element  the element of the layout; None for the preamble
    first    its first position in the row
    size     its number of positions, at least 1
    """

    window: int
    step: int | None
    element: Element | None
    first: int
    size: int


@dataclass
class _Group:
    """Windows of one mixture entry and task: G windows, N timesteps in all, W columns in a timestep."""

    layout: TimestepLayout
    windows: list[Window]
    number: np.ndarray  # [G] index of each window in the batch
    steps: np.ndarray  # [G] number of timesteps of each window
    preambles: list[np.ndarray]  # G arrays of ids
    step_texts: list[np.ndarray]  # the ids of each element that is a text of a step, in order: int32 [N, element.size]
    present: np.ndarray | None  # bool [N, W]: the columns that a timestep has; None: all

    @property
    def owner(self) -> np.ndarray:
        """[N] the window in the group that each timestep belongs to."""
        return np.repeat(np.arange(len(self.steps)), self.steps)

    @property
    def first(self) -> np.ndarray:
        """[G] the first timestep of each window."""
        return np.cumsum(self.steps) - self.steps

    def body_size(self) -> np.ndarray:
        """[G] positions that the timesteps of each window take."""
        if self.present is None:
            return self.steps * self.layout.width
        ends = np.concatenate([[0], np.cumsum(self.present.sum(axis=1))])
        return ends[self.first + self.steps] - ends[self.first]

    def preamble_size(self) -> np.ndarray:
        """[G] positions that the preamble of each window takes."""
        return np.array([len(ids) for ids in self.preambles], np.int64)

    def starts(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([G], [G]): first cells of the preambles and of the timesteps of windows that start at cells `start`."""
        if self.layout.text_last:
            return start + self.body_size(), start
        return start, start + self.preamble_size()

    def cells(self, body: np.ndarray, absent: int) -> np.ndarray:
        """int64 [N, W]: the cell of each column, if the timesteps of each window start at cell `body`; `absent` if missing."""
        width, owner = self.layout.width, self.owner
        if self.present is None:
            within = np.arange(len(owner)) - self.first[owner]
            return (body[owner] + within * width)[:, None] + np.arange(width)
        rank = np.cumsum(self.present).reshape(self.present.shape) - 1
        before = np.concatenate([[0], np.cumsum(self.present.sum(axis=1))])[self.first]
        return np.where(self.present, (body - before)[owner][:, None] + rank, absent)

    def step_numbers(self) -> np.ndarray:
        """[N] the number of each timestep in its episode."""
        return np.concatenate([w.step[:n] for w, n in zip(self.windows, self.steps.tolist(), strict=True)])

    def gather(self, field: str, constant: bool = False) -> np.ndarray:
        """[N, *shape]: the values of a field, window after window. `constant`: its one value, repeated for each timestep."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = _field(window, field)
            if constant:
                rows = np.broadcast_to(rows, (n, *np.shape(rows)))
            parts.append(rows[:n])
            if len(parts[-1]) < n:
                raise DataError(
                    f"episode {window.episode!r}: field {field!r} has {len(rows)} values from step {window.start} on, "
                    f"but the window needs {n}"
                )
        return np.concatenate(parts)

    def derived(self, element: Element) -> np.ndarray:
        """[N, *shape]: the values of an element's source."""
        windows = zip(self.windows, self.steps.tolist(), strict=True)
        return np.concatenate([derived(w, n, element.rule, element.options) for w, n in windows])

    def pictures(self, field: str, codec: Patches, constant: bool) -> np.ndarray:
        """uint8 or uint16 [N, height, width, C]: pictures whose original sizes differ between windows."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = _field(window, field)
            parts.append(np.repeat(codec.pixels(rows[None]), n, axis=0) if constant else codec.pixels(rows[:n]))
        return np.concatenate(parts)

    def refuse(self, field: str, error: NoEncoding) -> BadValue:
        """The error of a value, with its episode and step."""
        owner = int(self.owner[error.at])
        window = self.windows[owner]
        step = int(window.step[error.at - int(self.first[owner])])
        return BadValue(
            f"task {self.layout.task!r}, field {field!r}, episode {window.episode!r}, step {step}: {error.reason}"
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
    layouts: Layouts,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    length: int | None = None,
    seed: int = 0,
    training: bool = True,
) -> TokenBatch:
    """The TokenBatch of rows [R] of the global batch, each with its windows in order.

    The target of a predicted position stands at the position before it, in the same segment. A prompt has no targets.
    `length` None: the rows are as long as the longest. Raises DataError if a window lacks a field or has a value without
    encoding, or if a row needs more than `length` positions.
    """
    flat = [w for row in windows for w in row]
    row_of = np.repeat(np.arange(len(windows)), [len(row) for row in windows])
    groups = _groups(flat, layouts, vocabulary, text)
    size = _sizes(groups, len(flat))
    used = np.bincount(row_of, size, minlength=len(windows)).astype(np.int64)
    length = int(used.max(initial=1)) if length is None else length
    if (used > length).any():
        at = int(used.argmax())
        raise DataError(f"row {int(rows[at])} of the batch has {int(used[at])} tokens, but a row holds {length}")
    start = row_of * length + np.cumsum(size) - size - (np.cumsum(used) - used)[row_of]
    draft = _Draft(np.asarray(rows, np.int64), length, vocabulary)
    draft.lay_windows(flat, size, start, row_of, np.array([layouts[w.entry][w.task].number for w in flat], np.int32))
    for group in groups:
        draft.lay(group, start[group.number])
    return draft.finish(step, seed, training)


def placements(
    windows: Sequence[Window], layouts: Layouts, vocabulary: Vocabulary, text: TextTokenizer
) -> list[Placed]:
    """Where `assemble` puts every element of the windows of one row, by position."""
    groups = _groups(windows, layouts, vocabulary, text)
    size = _sizes(groups, len(windows))
    start = np.cumsum(size) - size
    found = []
    for group in groups:
        preamble, body = group.starts(start[group.number])
        for window, first, n in zip(group.number.tolist(), preamble.tolist(), group.preamble_size().tolist()):
            if n:
                found.append(Placed(window, None, None, first, n))
        cells = group.cells(body, -1)
        for owner, step, row in zip(group.owner, np.arange(len(cells)) - group.first[group.owner], cells):
            for element, column in zip(group.layout.elements, group.layout.columns, strict=True):
                at = row[column : column + element.size]
                at = at[at >= 0]
                if len(at):
                    found.append(Placed(int(group.number[owner]), int(step), element, int(at[0]), len(at)))
    return sorted(found, key=lambda placed: placed.first)


def _groups(flat: Sequence[Window], layouts: Layouts, vocabulary: Vocabulary, text: TextTokenizer) -> list[_Group]:
    members: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(flat):
        members.setdefault((window.entry, window.task), []).append(number)
    return [
        _measure(layouts[entry][task], [flat[i] for i in numbers], numbers, vocabulary, text)
        for (entry, task), numbers in members.items()
    ]


def _sizes(groups: Sequence[_Group], windows: int) -> np.ndarray:
    """[windows] positions that each window takes."""
    size = np.zeros(windows, np.int64)
    for group in groups:
        size[group.number] = group.preamble_size() + group.body_size()
    return size


def _measure(
    layout: TimestepLayout, windows: list[Window], numbers: list[int], vocabulary: Vocabulary, text: TextTokenizer
) -> _Group:
    """A group with everything that decides how many positions its windows take."""
    # There is nothing to learn from a last row without an action. For a caption such a row is the only one.
    steps = [w.steps - (layout.has_actions and not w.valid[w.steps - 1]) for w in windows]
    preambles = [_NO_IDS] * len(windows)
    for field in layout.preamble:
        texts = ["" if w.prompt else _field(w, field) for w in windows]  # the plan counts a prompt without its text
        found = text.encode(texts, layout.text_limit)
        preambles = [np.concatenate([ids, more]) for ids, more in zip(preambles, found, strict=True)]
    if layout.text_last:
        end = np.array([vocabulary.end_of_text], np.int32)
        preambles = [np.concatenate([ids, end]) for ids in preambles]
    group = _Group(layout, windows, np.array(numbers), np.array(steps, np.int64), preambles, [], None)
    if layout.varies:
        _find_present(group, text)
    return group


def _find_present(group: _Group, text: TextTokenizer) -> None:
    """Fills in `step_texts` and `present`."""
    layout, owner = group.layout, group.owner
    present = np.ones((len(owner), layout.width), bool)
    # Chunks and strides count from the same step, so that a stride shows the field at every start of a window alike
    phase = np.array([w.start % layout.chunk for w in group.windows], np.int64)
    numbers = group.step_numbers() - phase[owner]
    observed = (np.arange(len(owner)) - group.first[owner]) % layout.chunk == 0
    for element, column in zip(layout.elements, layout.columns, strict=True):
        span = slice(column, column + element.size)
        if element.role != "action":
            present[:, span] &= (observed & (numbers % element.stride == 0))[:, None]
        if element.role == "text":
            found = text.encode([str(t) for t in group.gather(element.field)], element.size)
            present[:, span] &= np.arange(element.size) < np.array([len(f) for f in found])[:, None]
            group.step_texts.append(_padded(found, element.size))
    group.present = present


def _padded(texts: list[np.ndarray], width: int) -> np.ndarray:
    """int32 [N, width] of N arrays of ids."""
    out = np.zeros((len(texts), width), np.int32)
    sizes = np.array([len(t) for t in texts])
    out[np.arange(width) < sizes[:, None]] = np.concatenate([*texts, _NO_IDS])
    return out


class _Draft:
    """A batch that is being laid out: flat arrays of rows · length cells, and one spare cell for columns that are absent."""

    def __init__(self, rows: np.ndarray, length: int, vocabulary: Vocabulary):
        self.rows, self.length, self.vocabulary = rows, length, vocabulary
        self.cells = len(rows) * length
        self.dense = {
            name: np.zeros(self.cells + 1, dtype) for name, dtype in TokenBatch.DENSE.items() if name != "row"
        }
        self.dense["target"] -= 1
        self.values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.patches: dict[str, list[np.ndarray]] = {}
        self.vectors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.prompt = np.zeros(self.cells + 1, bool)

    def lay_windows(
        self, flat: list[Window], size: np.ndarray, start: np.ndarray, row_of: np.ndarray, task: np.ndarray
    ) -> None:
        """Everything that does not depend on a window's layout: its segment, positions and task."""
        if not flat:
            return
        prompt = np.array([w.prompt for w in flat])
        opens = np.ones(len(flat), bool)  # False: the window is in the segment of the prompt before it
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
        layout, size = group.layout, group.preamble_size()
        preamble, body = group.starts(start)
        if size.any():
            self._lay_preamble(group, preamble, size)
        if not layout.width or not group.steps.any():
            return
        cell = group.cells(body, self.cells)
        self._lay_frame(group, cell)
        step_texts = iter(group.step_texts)
        for element, column in zip(layout.elements, layout.columns, strict=True):
            at = cell[:, column : column + element.size]
            if element.role == "text":
                self.dense["tokens"][at] = next(step_texts)
            elif element.role == "separator":
                self.dense["tokens"][at] = self.vocabulary.separator
            else:
                self._lay_values(group, element, at)
            if element.predicted and not element.head:
                self._predict(at.ravel(), layout, element.weight)
            if not element.shown:
                self.dense["tokens"][at] = self.vocabulary.mask

    def _lay_frame(self, group: _Group, cell: np.ndarray) -> None:
        """Modality, local position and step number of the timesteps."""
        layout, dense = group.layout, self.dense
        dense["modality"][cell] = layout.modality
        local, columns = layout.local, layout.text_columns
        if columns:  # the element after a text continues from the end of the text
            lacking = columns - group.present[:, :columns].sum(axis=1)  # type: ignore[index]
            after = (np.arange(layout.width) >= columns) & (local != ACTION_LOCAL)
            local = local - lacking[:, None] * after
        dense["local"][cell] = local
        dense["timestep"][cell] = group.step_numbers()[:, None]

    def _lay_preamble(self, group: _Group, start: np.ndarray, size: np.ndarray) -> None:
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        cell = np.repeat(start, size) + within
        dense, layout = self.dense, group.layout
        dense["tokens"][cell] = np.concatenate(group.preambles)
        dense["modality"][cell] = TEXT
        before = layout.width if layout.text_last else 0
        dense["local"][cell] = np.minimum(within + before, ACTION_LOCAL - 1)
        dense["timestep"][cell] = np.repeat([int(w.step[0]) if len(w.step) else 0 for w in group.windows], size)
        if layout.predict_text:
            self._predict(cell, layout, 1.0)

    def _lay_values(self, group: _Group, element: Element, at: np.ndarray) -> None:
        codec = element.codec
        assert codec is not None
        raw = group.derived(element) if element.rule else None
        try:
            if raw is not None and not np.isfinite(raw).all():  # a codec would clamp an infinity
                at_step = int((~np.isfinite(raw)).reshape(len(raw), -1).any(axis=1).argmax())
                raise NoEncoding(at_step, f"it is {raw[at_step].flat[0]}: a value from here on is NaN or infinite")
            if isinstance(codec, Patches) and codec.varies:
                encoded = to_patches(group.pictures(element.field, codec, element.constant))
            else:
                encoded = codec.encode(group.gather(element.field, element.constant) if raw is None else raw)
        except NoEncoding as error:
            raise group.refuse(element.field or _READABLE.get(element.rule, element.rule), error) from None
        if not codec.embedder:
            self.dense["tokens"][at] = encoded
            return
        self.dense["tokens"][at] = self.vocabulary.embedded
        there = at.ravel() < self.cells
        cell, value = at.ravel()[there], encoded.reshape(-1, *encoded.shape[2:])[there]
        if element.shown:
            self.values.setdefault(codec.embedder, []).append((cell, value))
        if element.shown and isinstance(codec, Patches):
            spans = np.broadcast_to(codec.spans, (len(at), *codec.spans.shape)).reshape(-1, 4)[there]
            self.patches.setdefault(codec.embedder, []).append(spans)
        if element.predicted:
            kept = self._can_be_target(cell)
            weight = np.full(len(cell), group.layout.weight * element.weight, np.float32)
            self.vectors.setdefault(element.head, []).append((cell[kept] - 1, value[kept], weight[kept]))

    def _can_be_target(self, cell: np.ndarray) -> np.ndarray:
        """Mask of the cells that are not the spare one, not in a prompt, and not the first of their segment."""
        return (cell < self.cells) & ~self.prompt[cell] & (self.dense["position"][cell] > 0)

    def _predict(self, cell: np.ndarray, layout: TimestepLayout, weight: float) -> None:
        """Makes the ids in `cell` targets, each at the cell before. `weight`: times that of the layout."""
        dense, vocabulary = self.dense, self.vocabulary
        cell = cell[self._can_be_target(cell)]
        ids = dense["tokens"][cell]
        dense["target"][cell - 1] = ids
        dense["weight"][cell - 1] = layout.weight * weight
        if layout.softmax == "range":
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
