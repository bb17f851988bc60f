"""A batch while its windows are laid down token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tiphys.pretrain.tokens.augment import augmented, draws
from tiphys.pretrain.tokens.batch import SEPARATOR, TEXT, Allowed, Chunks, Embedded, Pairs, Regression, TokenBatch
from tiphys.pretrain.tokens.codec import NoEncoding
from tiphys.pretrain.tokens.flow import drawn
from tiphys.pretrain.tokens.group import Group, Piece
from tiphys.pretrain.tokens.hiding import Steps, hide
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.images import places, to_patches
from tiphys.pretrain.tokens.picture_codecs import Patches, Tiles
from tiphys.pretrain.tokens.timestep import ACTION_LOCAL, BOTH, PREFIX, Element, TimestepLayout
from tiphys.pretrain.tokens.vector_codecs import Chunk
from tiphys.pretrain.tokens.vocabulary import Vocabulary

Keys = tuple[int, int, np.ndarray, np.ndarray]  # seed, step, and of each window of a group its row and its slot
_READABLE = {"to_go": "return-to-go"}
# kinds whose targets are counted apart (`loss: factors`)
FACTORS = ("observation", "action", "reward", "return", "text")


@dataclass(frozen=True)
class Placed:
    """Where one element of a window stands in its row.

    window   index of the window in its row
    step     index of the step in its window; None for what stands once in a window
    element  the element of the layout; None for the texts that stand once in a window
    first    its first position in the row
    size     its number of positions, at least 1
    """

    window: int
    step: int | None
    element: Element | None
    first: int
    size: int


def _augmented(group: Group, element: Element, pictures: np.ndarray, keys: Keys) -> np.ndarray:
    """The pictures of an element, those of a window changed alike. A prompt and its window are changed apart."""
    camera, out = group.layout.elements.index(element), np.empty_like(pictures)
    chance = draws(*keys, camera)
    for number, (first, steps) in enumerate(zip(group.first.tolist(), group.steps.tolist(), strict=True)):
        out[first : first + steps] = augmented(pictures[first : first + steps], element.augment, chance[number])
    return out


@dataclass(frozen=True)
class Concealed:
    """For each kind of part, bool [N]: at which timesteps it is hidden, and at which it is learnt."""

    hidden: Mapping[str, np.ndarray]
    learnt: Mapping[str, np.ndarray]


def concealed(group: Group, keys: Keys) -> Concealed:
    """What the windows of a group hide: what they say themselves (while acting), else what the layout's schemes draw."""
    layout, parts = group.layout, group.layout.parts
    if any(w.hidden for w in group.windows):
        windows = list(zip(group.windows, group.steps.tolist(), strict=True))
        none = np.zeros(int(group.steps.max()), bool)
        return Concealed({p: np.concatenate([w.hidden.get(p, none)[:n] for w, n in windows]) for p in parts}, {})
    if not layout.hiding or not parts:
        return Concealed({}, {})
    owner = group.owner
    steps = Steps(group.within, group.steps[owner], group.acted[owner])
    hidden, learnt = hide(layout.hiding, steps, group.first, parts, keys)
    shown = np.array([w.prompt for w in group.windows])[owner]
    hidden[shown] = False
    return Concealed(dict(zip(parts, hidden.T, strict=True)), dict(zip(parts, learnt.T, strict=True)))


class Draft:
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
        self.tiles: dict[str, list[np.ndarray]] = {}
        self.vectors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.chunks: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.pairs: Pairs | None = None
        self.allowed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.prompt = np.zeros(self.cells + 1, bool)
        self.factor = np.zeros(self.cells + 1, np.uint8)  # 1 + index in FACTORS of targets that are counted by kind
        self.steps = np.zeros(
            self.cells + 1, np.int32
        )  # of the window that a cell belongs to, if targets are so counted

    def lay_windows(
        self,
        flat: list[Piece],
        size: np.ndarray,
        start: np.ndarray,
        row_of: np.ndarray,
    ) -> None:
        """Everything that does not depend on what a sequence shows: its segment, positions, task and mask."""
        if not flat:
            return
        layouts = [piece.layout for piece in flat]
        prompt = np.array([piece.window.prompt for piece in flat])
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
        dense["task"][cell] = np.repeat(np.array([t.number for t in layouts], np.int32), size)
        mask = np.array([t.mask for t in layouts])
        causal = (mask != BOTH) & ~((mask == PREFIX) & prompt)
        dense["causal"][cell] = np.repeat(causal, size)
        self.prompt[cell] = np.repeat(prompt, size)

    def lay(self, group: Group, start: np.ndarray, concealed: Concealed, keys: Keys | None) -> None:
        """Everything of a group's windows, which start at cells `start` [G]. `keys`: what pictures are changed by; None: not."""
        layout = group.layout
        body = start + group.head_size()
        tail = body + group.body_size()
        self._lay_head(group, start)
        if layout.width and group.steps.any():
            self._lay_body(group, group.cells(body, self.cells), concealed, keys)
        self._lay_tail(group, tail)

    def pair(self, groups: Sequence[Group], of: np.ndarray, row_of: np.ndarray, last: np.ndarray) -> None:
        """The pairs of all windows whose layouts contrast them with texts.

        `of`, `row_of`, `last` [sequences]: the whole window, the row and the last cell of each. The steps of a window come first,
        then its text.
        """
        texts: dict[int, bytes] = {}
        weight: dict[int, float] = {}
        for group in groups:
            if group.layout.loss == "pairs" and not group.layout.elements:
                for number, ids in zip(group.number.tolist(), group.heads, strict=True):
                    texts[number], weight[number] = ids.tobytes(), group.layout.weight
        numbers = np.array(sorted(texts), np.int64)
        if not len(numbers):
            return
        known: dict[int, dict[bytes, int]] = {}  # row -> its texts, numbered
        told = [(known.setdefault(int(row_of[n]), {}), texts[n]) for n in numbers.tolist()]
        at = last[numbers - 1]
        assert (of[numbers - 1] == of[numbers]).all()
        self.pairs = Pairs(
            at,
            (last[numbers] - at).astype(np.int32),
            np.array([mine.setdefault(text, len(mine)) for mine, text in told], np.int32),
            np.array([weight[n] for n in numbers.tolist()], np.float32),
        )

    def _lay_body(self, group: Group, cell: np.ndarray, concealed: Concealed, keys: Keys | None) -> None:
        """The timesteps; `cell` [N, W] is where each of their columns stands."""
        layout = group.layout
        self._lay_frame(group, cell)
        if layout.loss == "factors":
            self.steps[cell] = group.steps[group.owner][:, None]
        step_texts, own = iter(group.step_texts), ~group.swapped[group.owner]
        for number, (element, column) in enumerate(zip(layout.elements, layout.columns, strict=True)):
            at = cell[:, column : column + element.size]
            hidden = concealed.hidden.get(element.role)
            if not element.shown or hidden is None:
                hidden = np.full(len(at), not element.shown)
            learnt = concealed.learnt.get(element.role, np.True_) & (hidden | (layout.mask != BOTH)) & own
            if element.role == "text":
                self.dense["tokens"][at] = next(step_texts)
            elif element.role == "separator":
                self.dense["tokens"][at] = self.vocabulary.separator
            else:
                self._lay_values(group, element, at, hidden, learnt, keys)
            if element.predicted and not element.head:
                if element.available:
                    self._restrict(group, element, at[:, 0], np.broadcast_to(learnt, len(at)))
                self._predict(at[learnt].ravel(), layout, element.weight, element.role)
                if number == 0 and layout.predicts_end:  # the next step stands against the episode's end
                    self._against_all(at[learnt, 0])
            if hidden.any():
                self.dense["tokens"][at[hidden]] = self.vocabulary.mask

    def _lay_frame(self, group: Group, cell: np.ndarray) -> None:
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

    def _lay_head(self, group: Group, start: np.ndarray) -> None:
        size = group.head_size()
        if size.any():
            cell = self._lay_once(group, group.heads, start, size, 0)
            if group.layout.mask == PREFIX:
                self.dense["causal"][cell] = False
            if group.layout.predict_text:
                self._predict(cell[np.repeat(~group.swapped, size)], group.layout, 1.0, "text")

    def _lay_tail(self, group: Group, start: np.ndarray) -> None:
        """What stands once after the timesteps: texts, and special tokens, which come last."""
        size, layout = group.tail_size(), group.layout
        if not size.any():
            return
        cell = self._lay_once(group, group.tails, start, size, layout.width)
        ids = self.dense["tokens"][cell]
        special = np.zeros(len(cell), bool)
        for element in layout.tail:
            mine = ids == self.vocabulary.special(element.role)
            special |= mine
            if element.role == "summary":
                if element.predicted:
                    self._judge(cell[mine], ~group.swapped, layout, element)
            elif element.predicted:
                self._predict(cell[mine], layout, element.weight, element.role)
                self._against_all(cell[mine])
        self.dense["modality"][cell[special]] = SEPARATOR
        if layout.predict_text:
            self._predict(cell[~special], layout, 1.0, "text")

    def _judge(self, cell: np.ndarray, fits: np.ndarray, layout: TimestepLayout, element: Element) -> None:
        """Makes 1 the answer that is read at the summaries in `cell` whose texts fit, and 0 that at the others."""
        self.dense["target"][cell] = self.vocabulary.answers[0] + fits
        self.dense["weight"][cell] = layout.weight * element.weight
        self.dense["softmax"][cell] = self.vocabulary.softmax("discrete")

    def _lay_once(
        self, group: Group, ids: list[np.ndarray], start: np.ndarray, size: np.ndarray, local: int
    ) -> np.ndarray:
        """Ids that stand once in each window, from cells `start` [G] on. Their local positions begin at `local`."""
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        cell = np.repeat(start, size) + within
        dense = self.dense
        dense["tokens"][cell] = np.concatenate(ids)
        dense["modality"][cell] = TEXT
        dense["local"][cell] = np.minimum(within + local, ACTION_LOCAL - 1)
        row = [max(n - 1, 0) if local else 0 for n in group.acted.tolist()]
        step = [int(w.step[i]) if len(w.step) else 0 for w, i in zip(group.windows, row, strict=True)]
        dense["timestep"][cell] = np.repeat(step, size)
        return cell

    def _lay_values(
        self,
        group: Group,
        element: Element,
        at: np.ndarray,
        hidden: np.ndarray,
        learnt: np.ndarray,
        keys: Keys | None,
    ) -> None:
        """The values of an element in the cells `at` [N, size]. A value that is `hidden` [N] is not in the batch."""
        codec = element.codec
        assert codec is not None
        try:
            if isinstance(codec, Patches) and (codec.varies or (element.augment and keys is not None)):
                pictures = group.pictures(element.field, codec, element.constant)
                if element.augment and keys is not None:
                    pictures = _augmented(group, element, pictures, keys)
                encoded = to_patches(pictures)
            else:
                raw = self._chunks(group, element, at, learnt) if isinstance(codec, Chunk) else group.values(element)
                if element.rule and not np.isfinite(raw).all():  # a codec would clamp an infinity
                    at_step = int((~np.isfinite(raw)).reshape(len(raw), -1).any(axis=1).argmax())
                    raise NoEncoding(at_step, f"it is {raw[at_step].flat[0]}: a value from here on is NaN or infinite")
                encoded = codec.encode(raw)
        except NoEncoding as error:
            raise group.refuse(element.field or _READABLE.get(element.rule, element.rule), error) from None
        if not codec.embedder:
            self.dense["tokens"][at] = encoded
            return
        self.dense["tokens"][at] = self.vocabulary.embedded
        there = at.ravel() < self.cells
        cell, value = at.ravel(), encoded.reshape(-1, *encoded.shape[2:])
        seen = there & np.repeat(~hidden, element.size)
        if seen.any():
            self.values.setdefault(codec.embedder, []).append((cell[seen], value[seen]))
            if isinstance(codec, Patches):
                spans = np.broadcast_to(codec.spans, (len(at), *codec.spans.shape)).reshape(-1, 4)[seen]
                self.patches.setdefault(codec.embedder, []).append(spans)
            elif isinstance(codec, Tiles):
                self.tiles.setdefault(codec.embedder, []).append(np.tile(codec.places, (len(at), 1))[seen])
        if element.predicted and not element.horizon:
            kept = there & np.repeat(np.broadcast_to(learnt, len(at)), element.size)
            kept[kept] = self._can_be_target(cell[kept], group.layout)
            weight = np.full(int(kept.sum()), group.layout.weight * element.weight, np.float32)
            target = cell[kept] - group.layout.shift
            self.vectors.setdefault(element.head, []).append((target, value[kept], weight))
            self._count(target, group.layout, element.role)

    def _chunks(self, group: Group, element: Element, at: np.ndarray, learnt: np.ndarray) -> np.ndarray:
        """The actions that the tokens in cells `at` [N, 1] show, float64 [N, steps, *shape]. Makes the chunks targets."""
        codec, cell = element.codec, at[:, 0]
        assert isinstance(codec, Chunk)
        value, count = group.chunks(element)
        value = np.where(cell[:, None, None] < self.cells, value, 0.0)  # what is not shown is not looked at
        target, layout = codec.normalised(value), group.layout
        there = np.arange(codec.horizon) < count[:, None]
        target[~there] = 0
        if element.predicted:
            kept = np.broadcast_to(learnt, len(cell)) & (count > 0) & self._can_be_target(cell, layout)
            weight = np.full(int(kept.sum()), layout.weight * element.weight, np.float32)
            part = (
                cell[kept] - layout.shift,
                target[kept].reshape(-1, codec.horizon * codec.entries),
                count[kept],
                weight,
            )
            self.chunks.setdefault(element.head, []).append(part)
            self._count(part[0], layout, element.role)
        missing = np.asarray(codec.low) / 2 + np.asarray(codec.high) / 2  # becomes 0
        return np.where(there[..., None], value, missing)[:, : codec.steps]

    def _can_be_target(self, cell: np.ndarray, layout: TimestepLayout) -> np.ndarray:
        """Mask of the cells that are not the spare one, not in a prompt, and (if read at the cell before) have one in their
        segment."""
        return (cell < self.cells) & ~self.prompt[cell] & (self.dense["position"][cell] >= layout.shift)

    def _predict(self, cell: np.ndarray, layout: TimestepLayout, weight: float, role: str) -> None:
        """Makes the ids in `cell` targets, each at the cell where the layout reads it. `weight`: times that of the layout."""
        dense, vocabulary = self.dense, self.vocabulary
        cell = cell[self._can_be_target(cell, layout)]
        ids, at = dense["tokens"][cell], cell - layout.shift
        dense["target"][at] = ids
        dense["weight"][at] = layout.weight * weight
        if layout.softmax == "range":
            highs = np.array([high for _, _, high in vocabulary.ranges])
            dense["softmax"][at] = np.searchsorted(highs, ids, side="right") + 1
        self._count(at, layout, role)

    def _restrict(self, group: Group, element: Element, at: np.ndarray, learnt: np.ndarray) -> None:
        """Normalises the targets of a discrete action in cells `at` [N] over the values that can be taken."""
        codec, layout, vocabulary = element.codec, group.layout, self.vocabulary
        assert isinstance(codec, Discrete)
        can = group.gather(element.available).astype(bool)[:, : codec.values[0]]
        taken = self.dense["tokens"][at] - codec.choices()[0][0]
        wrong = learnt & (at < self.cells) & ~can[np.arange(len(at)), taken]
        if wrong.any():
            step = int(wrong.argmax())
            value = int(taken[step]) + codec.low[0]
            raise group.refuse(
                element.field,
                NoEncoding(step, f"its value is {value}, which field {element.available!r} says cannot be taken"),
            )
        kept = learnt & self._can_be_target(at, layout)
        number = vocabulary.softmax("discrete") if layout.softmax == "range" else 0
        low, high = vocabulary.range("discrete") if number else (0, vocabulary.size)
        bits = np.zeros((int(kept.sum()), -(-(high - low) // 32) * 32), np.uint8)
        first = codec.choices()[0][0] - low
        bits[:, first : first + can.shape[1]] = can[kept]
        packed = np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)
        self.allowed.setdefault(str(number), []).append((at[kept] - layout.shift, packed))

    def _against_all(self, cell: np.ndarray) -> None:
        """Normalises the targets of these cells, which are read at the cell before, over the whole vocabulary."""
        self.dense["softmax"][cell[self.dense["position"][cell] > 0] - 1] = 0

    def _count(self, at: np.ndarray, layout: TimestepLayout, role: str) -> None:
        """Notes the kind of part that the targets at cells `at` belong to, if their loss is a mean over that kind."""
        if layout.loss == "factors" and role in FACTORS:
            self.factor[at] = FACTORS.index(role) + 1

    def _balance(self) -> np.ndarray | None:
        """float64 [cells]: factors of the weights. Each window counts as much as it has steps, and each kind of part in it alike.

        Otherwise a window of which one part is learned would count a tenth of one of which ten are, and would learn nothing.
        """
        at = np.flatnonzero(self.factor[:-1])
        if not len(at):
            return None
        segment = self.dense["segment"][:-1].astype(np.int64)
        window = np.arange(self.cells) // self.length * (segment.max() + 1) + segment
        steps = np.zeros(int(window.max()) + 1, np.int64)
        np.maximum.at(steps, window, self.steps[:-1])
        key = window[at] * (len(FACTORS) + 1) + self.factor[at]
        kinds, kind, count = np.unique(key, return_inverse=True, return_counts=True)
        owner = kinds // (len(FACTORS) + 1)
        scale = np.ones(self.cells)
        scale[at] = (steps[owner] / (np.bincount(owner)[owner] * count))[kind]
        return scale

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
            elif name in self.tiles:
                place = np.concatenate(self.tiles[name])[order]
            embedded[name] = Embedded(cell, value, place)
        regression = {}
        for name in sorted(self.vectors):
            cell, value, weight = (np.concatenate(part) for part in zip(*self.vectors[name], strict=True))
            order = np.argsort(cell, kind="stable")
            regression[name] = Regression(cell[order], value[order], weight[order])
        chunks = {}
        for name in sorted(self.chunks):
            cell, value, count, weight = (np.concatenate(part) for part in zip(*self.chunks[name], strict=True))
            order = np.argsort(cell, kind="stable")
            cell, value = cell[order], value[order]
            noise, time = drawn(
                self.vocabulary.chunks[name],
                value.shape[1],
                seed,
                step,
                self.rows[cell // self.length],
                cell % self.length,
                training,
            )
            chunks[name] = Chunks(cell, value, count[order], weight[order], noise, time)
        if (scale := self._balance()) is not None:
            self.dense["weight"][:-1] *= scale
            regression = {
                n: replace(r, weight=(r.weight * scale[r.index]).astype(np.float32)) for n, r in regression.items()
            }
            chunks = {n: replace(c, weight=(c.weight * scale[c.index]).astype(np.float32)) for n, c in chunks.items()}
        shape = (len(self.rows), self.length)
        dense: dict[str, Any] = {name: array[:-1].reshape(shape) for name, array in self.dense.items()}
        allowed = {}
        for name in sorted(self.allowed):
            cell, bits = (np.concatenate(part) for part in zip(*self.allowed[name], strict=True))
            order = np.argsort(cell, kind="stable")
            allowed[name] = Allowed(cell[order], bits[order])
        pairs = {} if self.pairs is None else {"match": self.pairs}
        return TokenBatch(
            step=step,
            row=self.rows,
            embedded=embedded,
            regression=regression,
            pairs=pairs,
            allowed=allowed,
            chunks=chunks,
            **dense,
        )
