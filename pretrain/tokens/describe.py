"""One row of a batch, decoded for people: the elements of its windows, where they stand, and what is predicted there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import Window
from tiphys.pretrain.tokens.batch import MODALITIES, TokenBatch
from tiphys.pretrain.tokens.codec import Codec, as_type
from tiphys.pretrain.tokens.draft import Placed
from tiphys.pretrain.tokens.frames import chunks
from tiphys.pretrain.tokens.images import PATCH
from tiphys.pretrain.tokens.picture_codecs import Patches
from tiphys.pretrain.tokens.sequence import Layouts, placements
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import TAIL
from tiphys.pretrain.tokens.vector_codecs import Chunk
from tiphys.pretrain.tokens.vocabulary import Vocabulary

_ALL = 8  # an array with more numbers is summarised by its shape and extremes


@dataclass(frozen=True)
class ElementView:
    """An element of a timestep, or the texts that stand once in a window.

    step       number of the step in its episode; None: it stands once in the window
    what       modality of its positions: text, image, discrete, continuous, separator, action, return
    field      name of its field; empty for a separator and a return
    first      its first position in the row
    last       its last position
    value      its decoded value, in the units of the dataset
    predicted  the decoded targets at these positions; empty: none
    weight     loss weight of the targets; None: there are none
    picture    uint8 [height, width, channels] of an image; None for everything else
    """

    step: int | None
    what: str
    field: str
    first: int
    last: int
    value: str
    predicted: str = ""
    weight: float | None = None
    picture: np.ndarray | None = None


@dataclass(frozen=True)
class WindowView:
    """A window of a row. `softmax` says what its targets are normalised over: vocabulary | range."""

    task: str
    episode: str
    start: int
    steps: int
    prompt: bool
    softmax: str
    elements: tuple[ElementView, ...]


def view_windows(
    batch: TokenBatch,
    row: int,
    windows: Sequence[Window],
    layouts: Layouts,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    seed: int = 0,
) -> list[WindowView]:
    """The windows of row `row` of a batch, decoded. `seed`: that of the batch, which was made for training.

    Values and targets are read from the batch. `windows` are those that the row was made from; with the layouts they say what
    stands where.
    """
    placed = placements(windows, layouts, vocabulary, text, (seed, batch.step, int(batch.row[row])))
    reader = _Reader(batch.select(slice(row, row + 1)), windows, layouts, placed, vocabulary, text)
    elements: list[list[ElementView]] = [[] for _ in windows]
    for one in placed:
        elements[one.window].append(reader.view(one))
    return [
        WindowView(
            layouts[w.entry][w.task].task,
            w.episode,
            w.start,
            w.steps,
            w.prompt,
            layouts[w.entry][w.task].softmax,
            tuple(views),
        )
        for w, views in zip(windows, elements, strict=True)
    ]


class _Reader:
    """Decodes the elements of a batch of one row."""

    def __init__(
        self,
        batch: TokenBatch,
        windows: Sequence[Window],
        layouts: Layouts,
        placed: Sequence[Placed],
        vocabulary: Vocabulary,
        text: TextTokenizer,
    ):
        self.batch, self.windows, self.layouts, self.vocabulary, self.text = batch, windows, layouts, vocabulary, text
        self.at = {p: one for one in placed for p in range(one.first, one.first + one.size)}
        self.tokens, self.target = batch.tokens[0], batch.target[0]
        # How many positions before the predicted one a target stands
        self.shift = np.zeros(len(self.tokens), np.int64)
        for p, one in self.at.items():
            self.shift[p] = layouts[windows[one.window].entry][windows[one.window].task].shift
        self.shift[self.tokens == vocabulary.special("summary")] = 0
        self.targets = self.tokens.copy()  # the tokens, each replaced by the target that predicts it
        where = np.flatnonzero(self.target >= 0)
        self.targets[where + self.shift[where]] = self.target[where]

    def view(self, one: Placed) -> ElementView:
        window = self.windows[one.window]
        hidden = one.element is not None and bool((self.tokens[one.first :][: one.size] == self.vocabulary.mask).all())
        value, picture = ("hidden", None) if hidden else self.value(one)
        predicted, weight = self.predicted(one)
        return ElementView(
            step=None if one.step is None else int(self.batch.timestep[0, one.first]),
            what=MODALITIES[self.batch.modality[0, one.first]],
            field=one.element.field if one.element else ", ".join(self.layouts[window.entry][window.task].preamble),
            first=one.first,
            last=one.first + one.size - 1,
            value=value,
            predicted=predicted,
            weight=weight,
            picture=picture,
        )

    def value(self, one: Placed) -> tuple[str, np.ndarray | None]:
        """The value of an element in words, and its picture."""
        codec = one.element.codec if one.element else None
        if one.element is not None and one.element.to and not isinstance(codec, Chunk):
            return self.framed(one, _codec(codec).decode(self.tokens[one.first : one.first + one.size][None])[0]), None
        if codec is None or not codec.embedder:
            return self.words(self.tokens, one, range(one.size)), None
        part = self.batch.embedded[codec.embedder]
        first, last = np.searchsorted(part.index, (one.first, one.first + one.size))
        decoded = codec.decode(part.value[first:last][None])[0]
        if isinstance(codec, Chunk) and one.step is not None:
            valid = np.asarray(self.windows[one.window].valid, bool)
            decoded = decoded[: chunks(np.zeros((len(valid), 1)), valid, np.array([one.step]), codec.steps)[1][0]]
        if isinstance(codec, Patches):
            return f"{one.size} {'patch' if one.size == 1 else 'patches'} of {PATCH}×{PATCH}", decoded
        return self.framed(one, decoded), None

    def framed(self, one: Placed, value: np.ndarray) -> str:
        """A value in words; of a relative action, its absolute value too."""
        if one.element is None or one.element.frame is None or one.step is None:
            return _numbers(value)
        window = self.windows[one.window]
        chunk = self.layouts[window.entry][window.task].chunk
        observed = one.step // chunk * chunk
        origin = one.element.frame.origin(np.asarray(window.fields[one.element.to])[observed : observed + 1])
        shape = _codec(one.element.codec).shape
        return (
            f"relative {_numbers(value)}, absolute {_numbers(as_type(value + origin.reshape(shape), str(value.dtype)))}"
        )

    def predicted(self, one: Placed) -> tuple[str, float | None]:
        """The targets at an element's positions in words, and their loss weight."""
        words, weight = [], None
        offsets: dict[int, list[int]] = {}  # first position of the element that is predicted -> offsets of its tokens
        for p in (p for p in range(one.first, one.first + one.size) if self.target[p] >= 0):
            of = p + int(self.shift[p])
            offsets.setdefault(self.at[of].first, []).append(of - self.at[of].first)
            weight = float(self.batch.weight[0, p])
        for first, some in offsets.items():
            words.append(self.words(self.targets, self.at[first], some))
        for part in self.batch.regression.values():
            for i in np.flatnonzero((part.index >= one.first) & (part.index < one.first + one.size)).tolist():
                at = int(part.index[i])
                element = self.at[at + int(self.shift[at])].element
                assert element is not None
                words.append(_numbers(_codec(element.codec).decode(part.value[i][None, None])[0]))
                weight = float(part.weight[i])
        for found in self.batch.chunks.values():
            for i in np.flatnonzero((found.index >= one.first) & (found.index < one.first + one.size)).tolist():
                placed = self.at[int(found.index[i]) + int(self.shift[found.index[i]])]
                codec = _codec(placed.element.codec if placed.element else None)
                assert placed.element is not None
                actions = codec.decode(found.value[i][None, None])[0][: int(found.count[i])]
                words.append(self.framed(placed, actions))
                weight = float(found.weight[i])
        return " ".join(words), weight

    def words(self, ids: np.ndarray, one: Placed, offsets: Sequence[int]) -> str:
        """Some tokens of an element whose tokens are ids."""
        mine = ids[one.first : one.first + one.size]
        if one.element is None or one.element.role == "text":
            return self.read(mine[list(offsets)])
        if one.element.role == "separator":
            return ""
        decoded = _codec(one.element.codec).decode(mine[None])[0]
        if one.element.to and len(offsets) == one.size:
            return self.framed(one, decoded)
        return _numbers(decoded if len(offsets) == one.size else np.ravel(decoded)[list(offsets)])

    def read(self, ids: np.ndarray) -> str:
        """Ids of a text, quoted; an end-of-text token is named."""
        special = {self.vocabulary.end_of_text: "end-of-text"}
        special |= {self.vocabulary.special(name): name for name in TAIL}
        special |= dict(zip(self.vocabulary.answers, ("does not fit", "fits"), strict=True))
        named = [special[i] for i in ids.tolist() if i in special]
        rest = ids[[i not in special for i in ids.tolist()]]
        return " ".join(([repr(self.text.decode(rest))] if len(rest) else []) + named)


def _codec(codec: Codec | None) -> Codec:
    assert codec is not None
    return codec


def _numbers(value: Any) -> str:
    """A few numbers as they are; many by their shape and extremes."""
    array = np.asarray(value)
    if array.size > _ALL:
        return f"{'×'.join(map(str, array.shape))}: {array.min():.3g} … {array.max():.3g}"
    return " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in array.ravel().tolist())
