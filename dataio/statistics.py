"""Statistics of each field of each task: moments, extremes, quantiles, the share of actions outside their bounds.

Everything is gathered in a form that merges, so that pieces of a dataset that were written apart give the statistics of
the whole: the moments by Chan et al. 1979, and the quantiles by a histogram over fixed cells: the upper 17 bits of a
value as float32 (sign, exponent, 8 bits of the fraction), whose width is at most 0.4 % of the value. Counts, extremes and
quantiles do not depend on how episodes were grouped; moments only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import FieldSpec
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, Layout

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
MOST_DIMENSIONS = 512  # of a field; a larger one has statistics over all its elements together
_SHIFT = np.uint32(15)
_CELLS = 1 << 17
_BUFFER = 16 << 20  # bytes of rows that wait before they are counted


@dataclass(frozen=True)
class FieldStatistics:
    """Over all steps of a task. Arrays have the field's shape, or () for a field of more than 512 elements.

    count      steps counted (elements, for a pooled field); steps with a value that is not finite are left out
    quantiles  [len(QUANTILES), *shape], at the probabilities QUANTILES
    clipped    share of elements outside the field's bounds; 0 without bounds
    invalid    steps with NaN or an infinity
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    quantiles: np.ndarray
    clipped: float = 0.0
    invalid: int = 0

    def to_dict(self) -> dict[str, Any]:
        arrays = {n: getattr(self, n).tolist() for n in ("mean", "std", "min", "max", "quantiles")}
        return {"count": self.count, **arrays, "clipped": self.clipped, "invalid": self.invalid}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldStatistics:
        arrays = {n: np.asarray(data[n], np.float64) for n in ("mean", "std", "min", "max", "quantiles")}
        return cls(int(data["count"]), **arrays, clipped=float(data["clipped"]), invalid=int(data["invalid"]))


@dataclass
class Sketch:
    """What is gathered of one field: mergeable, in flat form over its D dimensions."""

    shape: tuple[int, ...]
    count: int = 0
    invalid: int = 0
    outside: int = 0  # elements beyond the bounds
    elements: int = 0  # elements compared with bounds
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square: np.ndarray = field(default_factory=lambda: np.zeros(0))  # sum of squared distances from the mean
    min: np.ndarray = field(default_factory=lambda: np.zeros(0))
    max: np.ndarray = field(default_factory=lambda: np.zeros(0))
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))  # dimension · 2^17 + cell, ascending
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        dimensions = int(np.prod(self.shape, dtype=np.int64))
        if not len(self.mean):
            self.mean, self.square = np.zeros(dimensions), np.zeros(dimensions)
            self.min, self.max = np.full(dimensions, np.inf), np.full(dimensions, -np.inf)

    def add(self, values: np.ndarray) -> None:
        """Count float64 values [n, D]."""
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            self.invalid += int((~finite).sum())
            values = values[finite]
        if not len(values):
            return
        mean = values.mean(axis=0)
        keys, counts = np.unique(_cells(values), return_counts=True)
        square = ((values - mean) ** 2).sum(axis=0)
        low, high = values.min(axis=0), values.max(axis=0)
        self._merge(len(values), mean, square, low, high, keys, counts)

    def merge(self, other: Sketch) -> None:
        """Count what the other one has counted."""
        self.invalid += other.invalid
        self.outside += other.outside
        self.elements += other.elements
        if other.count:
            self._merge(other.count, other.mean, other.square, other.min, other.max, other.keys, other.counts)

    def _merge(
        self, count: int, mean: np.ndarray, square: np.ndarray, low: Any, high: Any, keys: Any, counts: Any
    ) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.square = self.square + square + delta**2 * (self.count * count / total)
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
        self.keys, inverse = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        both = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.keys), np.int64)
        np.add.at(self.counts, inverse, both)
        self.count = total

    def result(self) -> FieldStatistics:
        def shaped(array: np.ndarray) -> np.ndarray:
            return array.reshape((*array.shape[:-1], *self.shape))

        known = self.count > 0
        zero = np.zeros(len(self.mean))
        return FieldStatistics(
            count=self.count,
            mean=shaped(self.mean),
            std=shaped(np.sqrt(self.square / max(self.count, 1))),
            min=shaped(self.min if known else zero),
            max=shaped(self.max if known else zero),
            quantiles=shaped(self._quantiles() if known else np.zeros((len(QUANTILES), len(zero)))),
            clipped=self.outside / max(self.elements, 1),
            invalid=self.invalid,
        )

    def _quantiles(self) -> np.ndarray:
        """[len(QUANTILES), D], each by linear interpolation within its cell."""
        out = np.zeros((len(QUANTILES), len(self.mean)))
        bounds = np.searchsorted(self.keys, np.arange(len(self.mean) + 1, dtype=np.int64) * _CELLS)
        for d, (a, b) in enumerate(pairwise(bounds)):
            upto = np.cumsum(self.counts[a:b])
            rank = np.asarray(QUANTILES) * (upto[-1] - 1)
            cell = np.minimum(np.searchsorted(upto, rank, side="right"), b - a - 1)
            low, high = _edges(self.keys[a:b][cell] % np.uint32(_CELLS))
            # a cell that the extremes cut is as wide as what they leave of it
            low, high = np.maximum(low, self.min[d]), np.minimum(high, self.max[d])
            share = (rank - (upto[cell] - self.counts[a:b][cell]) + 0.5) / self.counts[a:b][cell]
            out[:, d] = np.clip(low + (high - low) * np.clip(share, 0, 1), self.min[d], self.max[d])
        return out


def _cells(values: np.ndarray) -> np.ndarray:
    """[n, D] float64 -> uint32 keys: dimension · 2^17 + the cell's number, in the order of the values."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    # two's-complement order: negative numbers reversed below zero
    ordered = np.where(bits >> np.uint32(31) != 0, ~bits, bits | np.uint32(0x80000000))
    return (ordered >> _SHIFT) + np.arange(values.shape[1], dtype=np.uint32) * np.uint32(_CELLS)


def _edges(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest float32 of each cell."""
    low = cell.astype(np.uint32) << _SHIFT
    high = low | np.uint32((1 << int(_SHIFT)) - 1)

    def value(ordered: np.ndarray) -> np.ndarray:
        bits = np.where(ordered >> np.uint32(31) != 0, ordered & np.uint32(0x7FFFFFFF), ~ordered)
        with np.errstate(invalid="ignore"):
            out = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        return np.nan_to_num(out, nan=0.0, posinf=np.finfo(np.float64).max, neginf=np.finfo(np.float64).min)

    return value(low), value(high)


class Statistics:
    """Sketches by (task, field) for the small fields of a dataset, filled episode by episode."""

    def __init__(self) -> None:
        self.sketches: dict[tuple[str, str], Sketch] = {}
        self._waiting: dict[str, tuple[Layout, list[np.ndarray]]] = {}
        self._bytes = 0

    def add(self, layout: Layout, rows: np.ndarray) -> None:
        """Count an episode's rows of `steps.npy`. What only actions have is counted where there is an action."""
        self._waiting.setdefault(layout.task.name, (layout, []))[1].append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Count the rows that wait."""
        for layout, parts in self._waiting.values():
            rows = np.concatenate(parts)
            acted = rows["_valid"] != 0
            for spec in layout.small:
                values = rows[spec.name][acted] if spec.role in ONLY_WITH_ACTION else rows[spec.name]
                key = (layout.task.name, spec.name)
                if key not in self.sketches:
                    self.sketches[key] = Sketch(_kept_shape(spec))
                sketch = self.sketches[key]
                _count_outside(sketch, spec, values)
                sketch.add(values.reshape(-1, len(sketch.mean)).astype(np.float64))
        self._waiting, self._bytes = {}, 0

    def merge(self, other: Statistics) -> None:
        """Count what the other one has counted; the other one is left as it is, but for being flushed."""
        self.flush()
        other.flush()
        for key, sketch in other.sketches.items():
            mine = self.sketches.get(key)
            if mine is None or (mine.shape != sketch.shape and not mine.count):
                self.sketches[key] = mine = Sketch(sketch.shape)
            mine.merge(sketch)

    def result(self, tasks: Iterable[str]) -> dict[str, dict[str, FieldStatistics]]:
        """task -> field -> statistics."""
        self.flush()
        out: dict[str, dict[str, FieldStatistics]] = {name: {} for name in tasks}
        for (task, name), sketch in sorted(self.sketches.items()):
            if task in out:
                out[task][name] = sketch.result()
        return out

    def write(self, file: Path) -> None:
        """The sketches as a Parquet file of one row a field."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.flush()
        items = sorted(self.sketches.items())
        columns: dict[str, Any] = {
            "task": pa.array([k[0] for k, _ in items], pa.string()),
            "field": pa.array([k[1] for k, _ in items], pa.string()),
            "shape": pa.array([list(s.shape) for _, s in items], pa.list_(pa.int32())),
        }
        for name in ("count", "invalid", "outside", "elements"):
            columns[name] = pa.array([getattr(s, name) for _, s in items], pa.int64())
        for name, kind in _ARRAYS.items():
            columns[name] = pa.array([getattr(s, name) for _, s in items], pa.list_(pa.from_numpy_dtype(kind)))
        pq.write_table(pa.table(columns), file, compression="zstd")

    @classmethod
    def read(cls, source: Any) -> Statistics:
        """The inverse of `write`, from a path or a file object."""
        import pyarrow.parquet as pq

        out = cls()
        for row in pq.read_table(source).to_pylist():
            arrays = {n: np.asarray(row[n], kind) for n, kind in _ARRAYS.items()}
            scalars = {n: int(row[n]) for n in ("count", "invalid", "outside", "elements")}
            parts: dict[str, Any] = scalars | arrays
            out.sketches[row["task"], row["field"]] = Sketch(tuple(row["shape"]), **parts)
        return out


_ARRAYS: dict[str, Any] = {
    "mean": np.float64,
    "square": np.float64,
    "min": np.float64,
    "max": np.float64,
    "keys": np.uint32,
    "counts": np.int64,
}


def _kept_shape(spec: FieldSpec) -> tuple[int, ...]:
    return spec.shape if np.prod(spec.shape, dtype=np.int64) <= MOST_DIMENSIONS else ()


def _count_outside(sketch: Sketch, spec: FieldSpec, values: np.ndarray) -> None:
    if spec.low is None or spec.high is None or not values.size:
        return
    low, high = (_bound(b, spec.shape) for b in (spec.low, spec.high))
    sketch.outside += int(((values < low) | (values > high)).sum())
    sketch.elements += values.size


def _bound(bound: Sequence[float], shape: tuple[int, ...]) -> np.ndarray:
    """A bound as an array that broadcasts over a step: given for every element, or one for all."""
    array = np.asarray(bound, np.float64)
    return array.reshape(shape) if array.size == np.prod(shape, dtype=np.int64) else array
