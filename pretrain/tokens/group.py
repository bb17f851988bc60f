"""Group: sequences of one layout, measured: how many positions they take, and which columns each step has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tiphys.dataio.episode import BadValue, DataError, Window
from tiphys.pretrain.tokens.clips import unclipped
from tiphys.pretrain.tokens.codec import NoEncoding
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.frames import Frame, chunks
from tiphys.pretrain.tokens.picture_codecs import Patches
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout
from tiphys.pretrain.tokens.views import VIEWS
from tiphys.pretrain.tokens.vocabulary import Vocabulary

Layouts = Sequence[Mapping[int, TimestepLayout]]  # mixture entry -> task -> its layout
_NO_IDS = np.zeros(0, np.int32)


@dataclass
class Group:
    """G windows of one layout: N timesteps in all, W columns in a timestep. A window here is one sequence of a planned one.

    number      [G] index of each window among the sequences of the batch
    steps       [G] timesteps of each window
    acted       [G] those of them that have an action; the others, which come last, show only their observations
    heads       G arrays of ids: what stands once, before the timesteps
    tails       G arrays of ids: what stands once, after them
    step_texts  the ids of each element that is a text of a step, in order: int32 [N, element.size]
    present     bool [N, W]: the columns that a timestep has; None: all
    swapped     bool [G]: the windows whose texts are those of another window
    """

    layout: TimestepLayout
    windows: list[Window]
    number: np.ndarray
    steps: np.ndarray
    acted: np.ndarray
    heads: list[np.ndarray]
    tails: list[np.ndarray]
    step_texts: list[np.ndarray] = field(default_factory=list)
    present: np.ndarray | None = None
    swapped: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        if not len(self.swapped):
            self.swapped = np.zeros(len(self.windows), bool)

    @property
    def owner(self) -> np.ndarray:
        """[N] the window in the group that each timestep belongs to."""
        return np.repeat(np.arange(len(self.steps)), self.steps)

    @property
    def first(self) -> np.ndarray:
        """[G] the first timestep of each window."""
        return np.cumsum(self.steps) - self.steps

    @property
    def within(self) -> np.ndarray:
        """[N] 0, 1, …: the number of each timestep in its window."""
        return np.arange(int(self.steps.sum())) - np.repeat(self.first, self.steps)

    @property
    def partial(self) -> np.ndarray:
        """bool [N]: the timesteps that show only their observations."""
        return self.within >= np.repeat(self.acted, self.steps)

    def body_size(self) -> np.ndarray:
        """[G] positions that the timesteps of each window take."""
        if self.present is None:
            return self.steps * self.layout.width
        ends = np.concatenate([[0], np.cumsum(self.present.sum(axis=1))])
        return ends[self.first + self.steps] - ends[self.first]

    def head_size(self) -> np.ndarray:
        """[G] positions before the timesteps of each window."""
        return np.array([len(ids) for ids in self.heads], np.int64)

    def tail_size(self) -> np.ndarray:
        """[G] positions after the timesteps of each window."""
        return np.array([len(ids) for ids in self.tails], np.int64)

    def cells(self, body: np.ndarray, absent: int) -> np.ndarray:
        """int64 [N, W]: the cell of each column, if the timesteps of each window start at cell `body`; `absent` if missing."""
        width, owner = self.layout.width, self.owner
        if self.present is None:
            return (body[owner] + self.within * width)[:, None] + np.arange(width)
        rank = np.cumsum(self.present).reshape(self.present.shape) - 1
        before = np.concatenate([[0], np.cumsum(self.present.sum(axis=1))])[self.first]
        return np.where(self.present, (body - before)[owner][:, None] + rank, absent)

    def shown_steps(self) -> np.ndarray:
        """[N] the step of its window that each timestep shows, from 0 on."""
        turned = np.array([w.prompt and self.layout.prompt_reverse for w in self.windows])[self.owner]
        return np.where(turned, self.steps[self.owner] - 1 - self.within, self.within)

    def step_numbers(self) -> np.ndarray:
        """[N] the number of each timestep in its episode."""
        return np.concatenate([w.step[:n] for w, n in zip(self.windows, self.steps.tolist(), strict=True)])

    def gather(self, name: str, constant: bool = False) -> np.ndarray:
        """[N, *shape]: the values of a field, window after window. `constant`: its one value, repeated for each timestep."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = field_of(window, name)
            if constant:
                rows = np.broadcast_to(rows, (n, *np.shape(rows)))
            parts.append(rows[:n])
            if len(parts[-1]) < n:
                raise DataError(
                    f"episode {window.episode!r}: field {name!r} has {len(rows)} values from step {window.start} on, "
                    f"but the window needs {n}"
                )
        return np.concatenate(parts)

    def values(self, element: Element) -> np.ndarray:
        """[N, *shape]: the values of an element. One that a partial timestep does not show is that of the step before."""
        first = self.first
        if element.rule:
            windows = zip(self.windows, self.acted.tolist(), strict=True)
            found = np.concatenate([derived(w, n, element.rule, element.options) for w, n in windows])
            first = np.cumsum(self.acted) - self.acted
        else:
            found = self.gather(element.field, element.constant)
            if element.frame is not None:
                origin = self.origin(element.frame)
                found = np.asarray(found, np.float64) - origin.reshape(len(origin), *np.shape(found)[1:])
        if element.role == "observation" or (self.steps == self.acted).all():
            return found
        return found[np.repeat(first, self.steps) + np.minimum(self.within, np.repeat(self.acted - 1, self.steps))]

    def origin(self, frame: Frame) -> np.ndarray:
        """float64 [N, entries]: what is subtracted from the action of each timestep, of the last observed step."""
        owner = self.owner
        observed = self.first[owner] + self.within // self.layout.chunk * self.layout.chunk
        return frame.origin(self.gather(frame.to))[observed]

    def chunks(self, element: Element) -> tuple[np.ndarray, np.ndarray]:
        """The actions from each timestep on, float64 [N, horizon, entries], in their frame; and how many there are, int32 [N]."""
        values, counts = [], []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = field_of(window, element.field)
            found, count = chunks(rows, np.asarray(window.valid, bool), np.arange(n), element.horizon)
            values.append(found)
            counts.append(count)
        value, number = np.concatenate(values), np.concatenate(counts)
        if element.frame is not None:
            value = value - self.origin(element.frame)[:, None]
        return value, number

    def pictures(self, name: str, codec: Patches, constant: bool) -> np.ndarray:
        """uint8 or uint16 [N, height, width, C]: pictures whose original sizes differ between windows."""
        parts = []
        for window, n in zip(self.windows, self.steps.tolist(), strict=True):
            rows = field_of(window, name)
            parts.append(np.repeat(codec.pixels(rows[None]), n, axis=0) if constant else codec.pixels(rows[:n]))
        return np.concatenate(parts)

    def refuse(self, name: str, error: NoEncoding) -> BadValue:
        """The error of a value, with its episode and step."""
        owner = int(self.owner[error.at])
        window = self.windows[owner]
        step = int(window.step[error.at - int(self.first[owner])])
        return BadValue(
            f"task {self.layout.task!r}, field {name!r}, episode {window.episode!r}, step {step}: {error.reason}"
        )


def field_of(window: Window, name: str) -> Any:
    try:
        return window.fields[name]
    except KeyError:
        has = ", ".join(sorted(window.fields))
        raise DataError(f"episode {window.episode!r} has no field {name!r}; its window has {has}") from None


@dataclass(frozen=True)
class Piece:
    """One sequence of a window.

    window  what it shows
    layout  how
    of      number of the whole window in the batch
    """

    window: Window
    layout: TimestepLayout
    of: int


def split(flat: Sequence[Window], layouts: Layouts) -> list[Piece]:
    """The sequences of all windows, in order."""
    pieces = []
    for number, window in enumerate(flat):
        layout = layouts[window.entry][window.task]
        whole = unclipped(layout, window) if layout.clipped else window
        shown = VIEWS[layout.views].split(layout, whole)
        pieces += [Piece(one, of, number) for one, of in zip(shown, layout.sequences, strict=True)]
    return pieces


def make_groups(pieces: Sequence[Piece], vocabulary: Vocabulary, text: TextTokenizer) -> list[Group]:
    """The sequences of a batch by layout."""
    members: dict[int, list[int]] = {}
    for number, piece in enumerate(pieces):
        members.setdefault(id(piece.layout), []).append(number)
    return [
        _measure(pieces[numbers[0]].layout, [pieces[i].window for i in numbers], numbers, vocabulary, text)
        for numbers in members.values()
    ]


def sizes(groups: Sequence[Group], windows: int) -> np.ndarray:
    """[windows] positions that each window takes."""
    size = np.zeros(windows, np.int64)
    for group in groups:
        size[group.number] = group.head_size() + group.body_size() + group.tail_size()
    return size


def _measure(
    layout: TimestepLayout, windows: list[Window], numbers: list[int], vocabulary: Vocabulary, text: TextTokenizer
) -> Group:
    """A group with everything that decides how many positions its windows take."""
    if layout.prompt_reverse:
        windows = [_reversed(layout, w) if w.prompt else w for w in windows]
    # There is nothing to learn from a last row without an action. For a caption such a row is the only one.
    acted = np.array(
        [0 if layout.document else w.steps - (layout.has_actions and not w.valid[w.steps - 1]) for w in windows],
        np.int64,
    )
    beyond = [
        0 if w.prompt or not n else min(layout.future, max(len(w.step) - n, 0)) for w, n in zip(windows, acted.tolist())
    ]
    texts = [_NO_IDS] * len(windows)
    for name in layout.preamble:
        given = ["" if w.prompt else field_of(w, name) for w in windows]  # the plan counts a prompt without its text
        found = text.encode(given, 0 if layout.document else layout.text_limit)
        texts = [np.concatenate([ids, more]) for ids, more in zip(texts, found, strict=True)]
    tails = [_tail(layout, w, vocabulary) for w in windows]
    heads = [_NO_IDS] * len(windows) if layout.text_last else texts
    if layout.text_last:
        end = np.array([vocabulary.end_of_text], np.int32)
        tails = [np.concatenate([ids, end, tail]) for ids, tail in zip(texts, tails, strict=True)]
    if layout.document:
        tails = [_shown(ids, window) for ids, window in zip(tails, windows, strict=True)]
    group = Group(layout, windows, np.array(numbers), acted + np.array(beyond, np.int64), acted, heads, tails)
    parts = layout.prompt_parts and any(w.prompt for w in windows)
    if layout.varies or any(beyond) or parts:
        _find_present(group, text)
    return group


def _shown(ids: np.ndarray, window: Window) -> np.ndarray:
    """The tokens of a document that a window shows. Raises DataError if it has fewer than were planned."""
    stop = window.start + window.steps + 1
    if stop > len(ids):
        raise DataError(
            f"episode {window.episode!r}: its text has {len(ids) - 1} tokens, but the window needs those up to {stop - 1}; plan "
            "and dataset do not belong together"
        )
    return ids[window.start : stop]


def _reversed(layout: TimestepLayout, window: Window) -> Window:
    """A window whose steps stand in reverse order. What rules compute from its future stays with its step."""
    steps = window.steps - (not window.valid[window.steps - 1])
    once = {e.field for e in layout.elements if e.constant} | set(layout.preamble)
    rules = {e.rule: derived(window, steps, e.rule, e.options) for e in layout.elements if e.rule}
    return replace(
        window,
        steps=steps,
        fields={name: v if name in once else v[:steps][::-1] for name, v in window.fields.items()},
        step=window.step[:steps][::-1],
        returns_to_go=window.returns_to_go[:steps][::-1],
        valid=window.valid[:steps][::-1],
        given={rule: values[::-1] for rule, values in rules.items()},
    )


def _tail(layout: TimestepLayout, window: Window, vocabulary: Vocabulary) -> np.ndarray:
    """The ids of the tail: `summary` always stands there, `end` only where the episode ends with the window's last step."""
    if window.prompt or not layout.tail:
        return _NO_IDS
    last = window.steps - 1
    ids = []
    for element in layout.tail:
        ends = window.start + window.steps >= window.episode_steps
        if element.role == "end" and element.field:
            ends = ends and bool(np.any(field_of(window, element.field)[last]))
        if element.role != "end" or ends:
            ids.append(vocabulary.special(element.role))
    return np.array(ids, np.int32)


def _find_present(group: Group, text: TextTokenizer) -> None:
    """Fills in `step_texts` and `present`."""
    layout, owner = group.layout, group.owner
    present = np.ones((len(owner), layout.width), bool)
    # Chunks and strides count from the same step, so that a stride shows the field at every start of a window alike
    phase = np.array([w.start % layout.chunk for w in group.windows], np.int64)
    numbers = group.step_numbers() - phase[owner]
    observed = group.within % layout.chunk == 0
    whole, unprompted = ~group.partial, ~np.array([w.prompt for w in group.windows])[owner]
    for element, column in zip(layout.elements, layout.columns, strict=True):
        span = slice(column, column + element.size)
        if element.role != "action" or element.horizon:
            present[:, span] &= (observed & (numbers % element.stride == 0))[:, None]
        if element.role != "observation":
            present[:, span] &= whole[:, None]
        if layout.prompt_parts and element.role not in layout.prompt_parts:
            present[:, span] &= unprompted[:, None]
        if element.role == "text":
            found = text.encode([str(t) for t in group.gather(element.field)], element.size)
            present[:, span] &= np.arange(element.size) < np.array([len(f) for f in found])[:, None]
            group.step_texts.append(_padded(found, element.size))
    group.present = present


def _padded(texts: list[np.ndarray], width: int) -> np.ndarray:
    """int32 [N, width] of N arrays of ids."""
    out = np.zeros((len(texts), width), np.int32)
    lengths = np.array([len(t) for t in texts])
    out[np.arange(width) < lengths[:, None]] = np.concatenate([*texts, _NO_IDS])
    return out
