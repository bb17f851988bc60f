"""TokenBatch: what a rank trains on in one step, as flat NumPy arrays; the form between objectives, loader, model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

# Modalities of a position: what the router sees. 0 stands only on padding.
PADDING, TEXT, IMAGE, DISCRETE, CONTINUOUS, SEPARATOR, ACTION, RETURN, REWARD = range(9)
MODALITIES = ("padding", "text", "image", "discrete", "continuous", "separator", "action", "return", "reward")


@dataclass(frozen=True)
class Embedded:
    """Positions that carry values instead of a vocabulary id (patches, vectors, grids), for one embedder.

    index  int64 [n]   row · L + position, ascending
    value  [n, …]      what the embedder takes
    place  int32 [n,2] patches: row and column bin of 128; absent (shape [0, 2]) for other embedders
    """

    index: np.ndarray
    value: np.ndarray
    place: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))


@dataclass(frozen=True)
class Regression:
    """Targets that are vectors, for one head.

    index  int64 [n]       row · L + position, ascending
    value  float32 [n, d]
    weight float32 [n]
    """

    index: np.ndarray
    value: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class TokenBatch:
    """R rows of L positions, all NumPy; `segment == 0` is padding and is neither attended, routed nor counted.

    step      int: the training step t
    row       int64 [R]: the row's number in the global batch; −1: a filler row without any token
    tokens    int32 [R, L]: vocabulary id; `Vocabulary.embedded` where an Embedded value stands
    modality  uint8 [R, L]: PADDING … REWARD
    segment   int32 [R, L]: 1, 2, … the window within its row (a prompt shares the segment of the window that follows)
    position  int32 [R, L]: 0, 1, … within the segment (rotary)
    local     int32 [R, L]: position within the timestep, < 512 (Reed et al. 2022, app. C.3); actions share one value
    timestep  int32 [R, L]: the step's number in its episode
    task      int32 [R, L]: the task's number in the run's list of tasks
    causal    bool  [R, L]: False: this position's segment is attended in both directions
    target    int32 [R, L]: the id to be predicted *at* this position (already shifted); −1: none
    softmax   uint8 [R, L]: over what the target is normalised: 0 the whole vocabulary, i > 0 Vocabulary's i-th range
    weight    float32 [R, L]: weight of the target; 0 where there is none
    """

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

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def targets(self) -> int:
        """Number of target elements: tokens plus regressed vectors, each counted once, whatever its weight.

        The loss of a step is the weighted sum over targets divided by this number over the *global* batch.
        """
        return int((self.target >= 0).sum()) + sum(len(r.index) for r in self.regression.values())

    @property
    def real_tokens(self) -> int:
        return int((self.segment > 0).sum())

    def select(self, rows: slice) -> TokenBatch:
        """The rows of a slice (step 1) as a batch of their own."""
        lo, hi, _ = rows.indices(self.rows)
        length = self.length

        def part(index: np.ndarray) -> slice:
            a, b = np.searchsorted(index, (lo * length, hi * length))
            return slice(int(a), int(b))

        dense: dict[str, Any] = {n: getattr(self, n)[lo:hi] for n in _DENSE}
        embedded = {}
        for name, e in self.embedded.items():
            p = part(e.index)
            embedded[name] = Embedded(e.index[p] - lo * length, e.value[p], e.place[p] if len(e.place) else e.place)
        regression = {}
        for name, r in self.regression.items():
            p = part(r.index)
            regression[name] = Regression(r.index[p] - lo * length, r.value[p], r.weight[p])
        return replace(self, **dense, embedded=embedded, regression=regression)

    def fill(self, rows: int) -> TokenBatch:
        """The same batch with filler rows (no token, no target) appended until it has `rows` rows."""
        more = rows - self.rows
        if more < 0:
            raise ValueError(f"a batch of {self.rows} rows cannot be filled up to {rows}")
        if more == 0:
            return self
        dense: dict[str, Any] = {}
        for name in _DENSE:
            array = getattr(self, name)
            empty = -1 if name in ("row", "target") else 0
            dense[name] = np.concatenate([array, np.full((more, *array.shape[1:]), empty, array.dtype)])
        return replace(self, **dense)

    @classmethod
    def concatenate(cls, batches: Iterable[TokenBatch]) -> TokenBatch:
        """Rows of several batches of one step and length, in order."""
        parts = list(batches)
        first, length = parts[0], parts[0].length
        offsets = np.cumsum([0] + [b.rows for b in parts[:-1]]) * length
        dense: dict[str, Any] = {n: np.concatenate([getattr(b, n) for b in parts]) for n in _DENSE}
        embedded = {}
        for name in sorted({n for b in parts for n in b.embedded}):
            have = [(b.embedded[name], o) for b, o in zip(parts, offsets, strict=True) if name in b.embedded]
            embedded[name] = Embedded(
                np.concatenate([e.index + o for e, o in have]),
                np.concatenate([e.value for e, _ in have]),
                np.concatenate([e.place for e, _ in have]),
            )
        regression = {}
        for name in sorted({n for b in parts for n in b.regression}):
            had = [(b.regression[name], o) for b, o in zip(parts, offsets, strict=True) if name in b.regression]
            regression[name] = Regression(
                np.concatenate([r.index + o for r, o in had]),
                np.concatenate([r.value for r, _ in had]),
                np.concatenate([r.weight for r, _ in had]),
            )
        return replace(first, **dense, embedded=embedded, regression=regression)

    @classmethod
    def empty(cls, step: int, length: int, rows: int = 0) -> TokenBatch:
        """A batch of `rows` filler rows."""
        dense: dict[str, Any] = {n: np.zeros((0, length) if n != "row" else (0,), d) for n, d in _DENSE.items()}
        return cls(step=step, **dense).fill(rows)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Flat names -> arrays, for shared memory: `embedded/<embedder>/value` and so on."""
        out: dict[str, np.ndarray] = {"step": np.array(self.step, np.int64)}
        out.update({n: getattr(self, n) for n in _DENSE})
        for kind in ("embedded", "regression"):
            for name, part in getattr(self, kind).items():
                out.update({f"{kind}/{name}/{f.name}": getattr(part, f.name) for f in fields(part)})
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TokenBatch:
        """The inverse of `to_arrays`; the arrays are used as they are, not copied."""
        parts: dict[str, dict[str, dict[str, np.ndarray]]] = {"embedded": {}, "regression": {}}
        dense: dict[str, Any] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if rest:
                part, key = rest.rsplit("/", 1)
                parts[kind].setdefault(part, {})[key] = array
            else:
                dense[name] = array
        dense["step"] = int(dense["step"])
        return cls(
            **dense,
            embedded={n: Embedded(**p) for n, p in parts["embedded"].items()},
            regression={n: Regression(**p) for n, p in parts["regression"].items()},
        )


_DENSE: dict[str, Any] = {
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
}
