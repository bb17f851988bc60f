"""TokenBatch: what one process trains on in one step, as flat NumPy arrays. Objectives make it, loader and model use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np

from tiphys.pretrain.tokens.instruction import Earlier, texts_before

# Modality of a position, which the router sees. Only padding has 0.
PADDING, TEXT, IMAGE, DISCRETE, CONTINUOUS, SEPARATOR, ACTION, RETURN, REWARD = range(9)
MODALITIES = ("padding", "text", "image", "discrete", "continuous", "separator", "action", "return", "reward")


@dataclass(frozen=True)
class Embedded:
    """Positions that hold values (patches, vectors, grids, tiles) instead of a vocabulary id, for one embedder.

    Parameters
    ----------
    index : ndarray, int64 [n]
        row · L + position, ascending.
    value : ndarray [n, …]
        What the embedder takes.
    place : ndarray, int32 [n, 2]
        Patches: row bin and column bin (of 128). Tiles of a grid: row and column. Shape [0, 2] for other embedders.
    """

    index: np.ndarray
    value: np.ndarray
    place: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))


@dataclass(frozen=True)
class Regression:
    """Targets that are vectors, for one regression head.

    Parameters
    ----------
    index : ndarray, int64 [n]
        row · L + position, ascending.
    value : ndarray, float32 [n, d]
        The vector to predict at the position.
    weight : ndarray, float32 [n]
        Loss weight of the vector.
    """

    index: np.ndarray
    value: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Windows that are told from the other windows of their row by their texts, and texts by their windows.

    Parameters
    ----------
    index : ndarray, int64 [n]
        row · L + position of the token that sums up the window, ascending.
    ahead : ndarray, int32 [n]
        How many positions behind it, in the same row, the token stands that sums up its text.
    text : ndarray, int32 [n]
        Number of the text in its row. Pairs of a row with equal texts have equal numbers.
    weight : ndarray, float32 [n]
        Loss weight of the pair.
    """

    index: np.ndarray
    ahead: np.ndarray
    text: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Allowed:
    """Targets that are normalised over some ids of their softmax only.

    Parameters
    ----------
    index : ndarray, int64 [n]
        row · L + position, ascending.
    bits : ndarray, int32 [n, ⌈ids / 32⌉]
        Bit b of word w says whether the id 32 · w + b of the softmax's range can be.
    """

    index: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class Chunks:
    """Targets that are chunks of S actions with E entries each, for one head.

    Parameters
    ----------
    index : ndarray, int64 [n]
        row · L + position, ascending.
    value : ndarray, float32 [n, S · E]
        The actions.
    count : ndarray, int32 [n]
        How many of the S actions there are; the others count for nothing.
    weight : ndarray, float32 [n]
        Loss weight of the chunk.
    noise, time : ndarray, float32 [n, draws, S · E] and [n, draws]
        What flow matching learns the chunk at; no draws for other losses. At time 1 all is noise.
    """

    index: np.ndarray
    value: np.ndarray
    count: np.ndarray
    weight: np.ndarray
    noise: np.ndarray
    time: np.ndarray


Sparse = Embedded | Regression | Pairs | Allowed | Chunks
SPARSE: dict[str, type[Sparse]] = {
    "embedded": Embedded,
    "regression": Regression,
    "pairs": Pairs,
    "allowed": Allowed,
    "chunks": Chunks,
}


def _arrays(part: Sparse, of: Callable[[np.ndarray], np.ndarray], index: np.ndarray) -> Sparse:
    """The part with `of(array)` of each array that has an element for each position, and with another index."""
    given = {f.name: getattr(part, f.name) for f in fields(part)}
    made = {name: of(a) if len(a) == len(part.index) else a for name, a in given.items()}
    return type(part)(**made | {"index": index})


@dataclass(frozen=True)
class TokenBatch:
    """R rows of L positions, all NumPy arrays.

    A position with ``segment == 0`` is padding: it is not attended to, not routed and not counted. Local positions and the
    bins of patches follow Reed et al. 2022, app. C.3.

    Parameters
    ----------
    step : int
        The training step.
    row : ndarray, int64 [R]
        Number of the row in the global batch; −1 for a filler row, which has no tokens.
    tokens : ndarray, int32 [R, L]
        Vocabulary id; ``Vocabulary.embedded`` at a position that holds an `Embedded` value.
    modality : ndarray, uint8 [R, L]
        PADDING … REWARD.
    segment : ndarray, int32 [R, L]
        1, 2, …: the window within its row. A prompt has the segment of the window that follows it.
    position : ndarray, int32 [R, L]
        0, 1, … within the segment, for the rotary embedding.
    local : ndarray, int32 [R, L]
        Position within the timestep, less than 512. All action tokens share one value.
    timestep : ndarray, int32 [R, L]
        Number of the step in its episode.
    task : ndarray, int32 [R, L]
        Number of the task in the run's list of tasks.
    causal : ndarray, bool [R, L]
        False: the segment of this position is attended to in both directions.
    target : ndarray, int32 [R, L]
        The id to predict *at* this position (already shifted by one); −1: none.
    softmax : ndarray, uint8 [R, L]
        What the target is normalised over: 0 is the whole vocabulary, i > 0 is the i-th range of the Vocabulary.
    weight : ndarray, float32 [R, L]
        Loss weight of the target; 0 without a target.
    embedded : mapping of str to Embedded
        Embedder name -> the values for it.
    regression : mapping of str to Regression
        Regression head -> its targets.
    pairs : mapping of str to Pairs
        Head -> the pairs that it tells from each other.
    allowed : mapping of str to Allowed
        Number of a softmax -> the ids that some of its targets are normalised over.
    chunks : mapping of str to Chunks
        Head -> the chunks of actions that it predicts.
    earlier : sequence of Earlier, or None
        For each row, the text before its first position, if the row does not begin with its window; None: all rows do.
    """

    DENSE: ClassVar[Mapping[str, Any]] = {
        "row": np.int64,
        "tokens": np.int32,
        "modality": np.uint8,
        "segment": np.int32,
        "position": np.int32,
        "local": np.int32,
        "timestep": np.int32,
        "task": np.int32,
        "causal": np.bool_,
        "target": np.int32,
        "softmax": np.uint8,
        "weight": np.float32,
    }  # the arrays that have an element for every row, or for every position of every row

    step: int
    row: np.ndarray
    tokens: np.ndarray
    modality: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    local: np.ndarray
    timestep: np.ndarray
    task: np.ndarray
    causal: np.ndarray
    target: np.ndarray
    softmax: np.ndarray
    weight: np.ndarray
    embedded: Mapping[str, Embedded] = field(default_factory=dict)
    regression: Mapping[str, Regression] = field(default_factory=dict)
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    allowed: Mapping[str, Allowed] = field(default_factory=dict)
    chunks: Mapping[str, Chunks] = field(default_factory=dict)
    earlier: Sequence[Earlier] | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def targets(self) -> int:
        """Number of targets: predicted tokens, regressed vectors, chunks and pairs. Each counts once, whatever its weight.

        The loss of a step is the weighted sum over the targets of the *global* batch, divided by their number.
        """
        counted: list[Sparse] = [*self.regression.values(), *self.pairs.values(), *self.chunks.values()]
        return int((self.target >= 0).sum()) + sum(len(part.index) for part in counted)

    @property
    def real_tokens(self) -> int:
        return int((self.segment > 0).sum())

    def select(self, rows: slice) -> TokenBatch:
        """The rows of a slice (with step 1) as a batch of their own. The dense arrays and the values are views."""
        low, high, _ = rows.indices(self.rows)
        length = self.length

        def taken(part: Sparse) -> Sparse:
            mine = slice(*np.searchsorted(part.index, (low * length, high * length)).tolist())
            return _arrays(part, lambda a: a[mine], part.index[mine] - low * length)

        dense: dict[str, Any] = {name: getattr(self, name)[low:high] for name in self.DENSE}
        earlier = None if self.earlier is None else self.earlier[low:high]
        return replace(self, **dense, **self._parts(taken), earlier=earlier)

    def part(self, rows: np.ndarray, start: int | np.ndarray, stop: int | np.ndarray) -> TokenBatch:
        """Positions [start, stop) of some rows, as a batch of their own. Its arrays are copies.

        Parameters
        ----------
        rows : ndarray, int [n]
            Rows of this batch, ascending.
        start, stop : int or ndarray, int [n]
            First position, and the position after the last, of all rows or of each. If they differ, the other positions of the
            part are padding.
        """
        low, high = int(np.min(start, initial=self.length)), int(np.max(stop, initial=0))
        width = max(high - low, 0)
        first, last, new_row = np.zeros((3, self.rows), np.int64)
        first[rows], last[rows], new_row[rows] = start, stop, np.arange(len(rows))
        dense: dict[str, Any] = {
            name: np.ascontiguousarray(array[rows] if array.ndim == 1 else array[rows, low : low + width])
            for name, array in ((name, getattr(self, name)) for name in self.DENSE)
        }
        columns = np.arange(low, low + width)
        outside = (columns < first[rows, None]) | (columns >= last[rows, None])
        dense["segment"][outside] = 0
        dense["modality"][outside] = PADDING

        def inside(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Mask of the values that are in the part, and their index in it."""
            row, column = np.divmod(index, self.length)
            kept = (column >= first[row]) & (column < last[row])
            return kept, new_row[row[kept]] * width + column[kept] - low

        def taken(part: Sparse) -> Sparse:
            kept, index = inside(part.index)
            return _arrays(part, lambda a: a[kept], index)

        earlier = texts_before(self, rows, np.broadcast_to(start, len(rows))) if self.embedded else []
        told = any(one.ids for one in earlier)
        return replace(self, **dense, **self._parts(taken), earlier=earlier if told else None)

    def _parts(self, of: Callable[[Sparse], Sparse]) -> dict[str, Any]:
        """`of(part)` of everything that only some positions have, by kind and name."""
        return {kind: {name: of(p) for name, p in getattr(self, kind).items()} for kind in SPARSE}

    def without_targets(self) -> TokenBatch:
        """The same batch with nothing to predict. All arrays but those of the targets are shared with this batch."""
        return replace(
            self,
            target=np.full_like(self.target, -1),
            softmax=np.zeros_like(self.softmax),
            weight=np.zeros_like(self.weight),
            regression={},
            pairs={},
            allowed={},
            chunks={},
        )

    def fill(self, rows: int) -> TokenBatch:
        """The same batch with filler rows (no tokens, no targets) appended until it has `rows` rows.

        Raises ValueError if the batch has more rows than that.
        """
        more = rows - self.rows
        if more < 0:
            raise ValueError(f"a batch of {self.rows} rows cannot be filled up to {rows}")
        if more == 0:
            return self
        dense: dict[str, Any] = {}
        for name in self.DENSE:
            array = getattr(self, name)
            empty = -1 if name in ("row", "target") else 0
            dense[name] = np.concatenate([array, np.full((more, *array.shape[1:]), empty, array.dtype)])
        earlier = None if self.earlier is None else [*self.earlier, *[Earlier()] * more]
        return replace(self, **dense, earlier=earlier)

    @classmethod
    def concatenate(cls, batches: Iterable[TokenBatch]) -> TokenBatch:
        """The rows of several batches of the same step and length, in order."""
        parts = list(batches)
        first, length = parts[0], parts[0].length
        offsets = np.cumsum([0] + [b.rows for b in parts[:-1]]) * length
        dense: dict[str, Any] = {n: np.concatenate([getattr(b, n) for b in parts]) for n in cls.DENSE}
        joined: dict[str, Any] = {kind: _joined([getattr(b, kind) for b in parts], offsets) for kind in SPARSE}
        texts = [one for b in parts for one in b.earlier or [Earlier()] * b.rows]
        earlier = texts if any(b.earlier for b in parts) else None
        return replace(first, **dense, **joined, earlier=earlier)

    @classmethod
    def empty(cls, step: int, length: int, rows: int = 0) -> TokenBatch:
        """A batch of `rows` filler rows."""
        dense: dict[str, Any] = {n: np.zeros((0, length) if n != "row" else (0,), d) for n, d in cls.DENSE.items()}
        return cls(step=step, **dense).fill(rows)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Flat name -> array, for shared memory: `tokens`, `embedded/<embedder>/value` and so on."""
        out: dict[str, np.ndarray] = {"step": np.array(self.step, np.int64)}
        out.update({n: getattr(self, n) for n in self.DENSE})
        for kind in SPARSE:
            for name, part in getattr(self, kind).items():
                out.update({f"{kind}/{name}/{f.name}": getattr(part, f.name) for f in fields(part)})
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TokenBatch:
        """The inverse of `to_arrays`; the arrays are used as they are, not copied."""
        parts: dict[str, dict[str, dict[str, np.ndarray]]] = {kind: {} for kind in SPARSE}
        dense: dict[str, Any] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if rest:
                part, key = rest.rsplit("/", 1)
                parts[kind].setdefault(part, {})[key] = array
            else:
                dense[name] = array
        dense["step"] = int(dense["step"])
        made: dict[str, Any] = {kind: {n: SPARSE[kind](**p) for n, p in some.items()} for kind, some in parts.items()}
        return cls(**dense, **made)


def _joined(given: Sequence[Mapping[str, Sparse]], offsets: np.ndarray) -> dict[str, Sparse]:
    """Parts of several batches by name; `offsets` are added to their indexes."""
    out = {}
    for name in sorted({n for parts in given for n in parts}):
        have = [(parts[name], offset) for parts, offset in zip(given, offsets, strict=True) if name in parts]
        kind = type(have[0][0])
        arrays = {f.name: np.concatenate([getattr(p, f.name) for p, _ in have]) for f in fields(kind)}
        out[name] = kind(**arrays | {"index": np.concatenate([p.index + offset for p, offset in have])})
    return out
