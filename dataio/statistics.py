"""Statistics of each small field of each task: moments, extremes, quantiles, the share of values outside the bounds, and how many
values are bad (NaN, infinities, discrete values that the field does not declare), with the episodes that have them.

They are computed from sketches that can be merged, so pieces of a dataset give the statistics of the whole. Moments are merged by
Chan et al. 1979. Quantiles come from a histogram with fixed cells: the upper 17 bits of a value as float32 (sign, exponent and 8
bits of the fraction), at most 0.4 % of the value wide. Counts, extremes, quantiles and the listed episodes do not depend on how
episodes are grouped; moments depend on it only by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, RowLayout

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
MOST_DIMENSIONS = 512  # a field with more elements is pooled: its statistics are over all its elements together
FIRST_BAD = 100  # most episodes with bad values that are listed for a field
_SHIFT = np.uint32(15)
_CELLS = 1 << 17
_BUFFER = 16 << 20  # bytes of rows that are collected before they are counted


@dataclass(frozen=True)
class FieldStatistics:
    """Statistics of one field over all steps of a task.

    Arrays are float64 of the field's shape, or of shape () for a pooled field (more than MOST_DIMENSIONS elements).

    count         steps that were counted (elements, for a pooled field); those with a value that is not finite are not counted
    std           standard deviation of the population
    quantiles     [len(QUANTILES), *shape], at the probabilities QUANTILES
    clipped       share of elements outside the field's bounds; 0 without bounds
    invalid       steps (elements, for a pooled field) with a NaN or an infinity; None: unknown (an old dataset)
    beyond        steps (elements) of a discrete field with a value outside its declared range, or not whole; None: unknown
    bad_episodes  episodes with such a step; None: unknown
    first_bad     ids of up to FIRST_BAD of them: the first in alphabetical order
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    quantiles: np.ndarray
    clipped: float = 0.0
    invalid: int | None = None
    beyond: int | None = None
    bad_episodes: int | None = None
    first_bad: tuple[str, ...] = ()

    def bad(self, beyond: bool = True) -> str:
        """How many values are bad, in words; empty if none is known to be. `beyond`: those beyond the declared range count."""
        parts = [f"{_steps(self.invalid)} with NaN or an infinity"] if self.invalid else []
        parts += [f"{_steps(self.beyond)} beyond the declared range"] if self.beyond and beyond else []
        where = f" in {self.bad_episodes} episode{'s' * (self.bad_episodes != 1)}" if self.bad_episodes else ""
        return " and ".join(parts) + where if parts else ""

    def to_dict(self) -> dict[str, Any]:
        arrays = {n: getattr(self, n).tolist() for n in _RESULTS}
        counts = {n: getattr(self, n) for n in _BAD}
        return {"count": self.count, **arrays, "clipped": self.clipped, **counts, "first_bad": list(self.first_bad)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldStatistics:
        arrays: dict[str, Any] = {n: np.asarray(data[n], np.float64) for n in _RESULTS}
        counts: dict[str, Any] = {n: None if data.get(n) is None else int(data[n]) for n in _BAD}
        first = tuple(map(str, data.get("first_bad", ())))
        return cls(int(data["count"]), **arrays, clipped=float(data["clipped"]), **counts, first_bad=first)


_RESULTS = ("mean", "std", "min", "max", "quantiles")
_BAD = ("invalid", "beyond", "bad_episodes")


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def total(counts: Iterable[int | None]) -> int | None:
    """The sum of counts; None if one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(n for n in known if n is not None)


def pooled(found: Sequence[FieldStatistics]) -> FieldStatistics:
    """Statistics of a field over several datasets. Quantiles are averages weighted by count; the rest is exact."""
    if len(found) == 1:
        return found[0]
    count = np.array([f.count for f in found], np.float64)
    share = count / max(count.sum(), 1)

    def mean(of: Callable[[FieldStatistics], Any]) -> Any:
        return sum(s * np.asarray(of(f)) for s, f in zip(share, found, strict=True))

    centre = mean(lambda f: f.mean)
    variance = mean(lambda f: np.square(f.std) + np.square(np.asarray(f.mean) - centre))
    some = [f for f in found if f.count] or list(found)
    return FieldStatistics(
        count=int(count.sum()),
        mean=centre,
        std=np.sqrt(variance),
        min=np.min([f.min for f in some], axis=0),
        max=np.max([f.max for f in some], axis=0),
        quantiles=mean(lambda f: f.quantiles),
        clipped=float(mean(lambda f: f.clipped)),
        invalid=total(f.invalid for f in found),
        beyond=total(f.beyond for f in found),
        bad_episodes=total(f.bad_episodes for f in found),
        first_bad=tuple(sorted({i for f in found for i in f.first_bad})[:FIRST_BAD]),
    )


@dataclass
class Sketch:
    """The mergeable summary of one field with D elements. `mean`, `square`, `min` and `max` are float64 [D]."""

    shape: tuple[int, ...]
    count: int = 0
    invalid: int | None = 0
    beyond: int | None = 0
    bad_episodes: int | None = 0
    first_bad: tuple[str, ...] = ()
    outside: int = 0  # elements outside the bounds
    elements: int = 0  # elements that were compared with bounds
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square: np.ndarray = field(default_factory=lambda: np.zeros(0))  # sum of squared differences from the mean
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
            self.invalid = total((self.invalid, int((~finite).sum())))
            values = values[finite]
        if not len(values):
            return
        mean = values.mean(axis=0)
        keys, counts = np.unique(_cells(values), return_counts=True)
        with np.errstate(over="ignore"):
            square = ((values - mean) ** 2).sum(axis=0)
        low, high = values.min(axis=0), values.max(axis=0)
        self._merge(len(values), mean, square, low, high, keys, counts)

    def merge(self, other: Sketch) -> None:
        """Add the counts of another sketch."""
        for name in _BAD:
            setattr(self, name, total((getattr(self, name), getattr(other, name))))
        self.first_bad = tuple(sorted({*self.first_bad, *other.first_bad})[:FIRST_BAD])
        self.outside += other.outside
        self.elements += other.elements
        if other.count:
            self._merge(other.count, other.mean, other.square, other.min, other.max, other.keys, other.counts)

    def add_bad(self, beyond: int, episodes: Iterable[str]) -> None:
        """Count values outside the declared range, and the episodes that have these or values that are not finite."""
        ids = set(episodes)
        self.beyond = total((self.beyond, beyond))
        self.bad_episodes = total((self.bad_episodes, len(ids)))
        self.first_bad = tuple(sorted({*self.first_bad, *ids})[:FIRST_BAD])

    def _merge(
        self, count: int, mean: np.ndarray, square: np.ndarray, low: Any, high: Any, keys: Any, counts: Any
    ) -> None:
        both = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / both)
        with np.errstate(over="ignore"):
            between = delta**2 * (self.count * count / both) if self.count else 0.0
            self.square = self.square + square + between
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
        self.keys, inverse = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        by_cell = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.keys), np.int64)
        np.add.at(self.counts, inverse, by_cell)
        self.count = both

    def check(self) -> None:
        """Raises DataError if the values, which come from a file, do not belong together."""
        dimensions = math.prod(self.shape)
        if min(self.shape, default=1) < 1 or dimensions > MOST_DIMENSIONS:
            raise DataError(f"a sketch has shape {self.shape[:8]}; at most {MOST_DIMENSIONS} elements are kept apart")
        if not 0 <= self.count < 1 << 62 or any(
            len(a) != dimensions for a in (self.mean, self.square, self.min, self.max)
        ):
            raise DataError("the count, the moments and the shape of a sketch do not agree")
        if self.count and not (self.min <= self.max).all():
            raise DataError("a sketch has a count, but no extremes")
        numbers = (self.outside, self.elements, *(getattr(self, name) or 0 for name in _BAD))
        if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
            raise DataError("a sketch counts values with something else than numbers")
        if not all(isinstance(episode, str) for episode in self.first_bad):
            raise DataError("a sketch names episodes by something else than their ids")
        keys, counts = self.keys, self.counts
        known = len(keys) == len(counts) and bool((keys[1:] > keys[:-1]).all() and (counts > 0).all())
        if not known or (len(keys) and int(keys[-1]) >= dimensions * _CELLS):
            raise DataError("the histogram of a sketch is not valid")
        if (np.bincount(keys // np.uint32(_CELLS), counts, dimensions) != self.count).any():
            raise DataError("the histogram and the count of a sketch do not agree")

    def result(self) -> FieldStatistics:
        """The statistics in the field's shape; zeros if nothing was counted."""

        def shaped(array: np.ndarray) -> np.ndarray:
            return np.nan_to_num(array.reshape((*array.shape[:-1], *self.shape)))  # sums of huge values overflow

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
            beyond=self.beyond,
            bad_episodes=self.bad_episodes,
            first_bad=self.first_bad,
        )

    def _quantiles(self) -> np.ndarray:
        """[len(QUANTILES), D], by linear interpolation within a cell."""
        out = np.zeros((len(QUANTILES), len(self.mean)))
        bounds = np.searchsorted(self.keys, np.arange(len(self.mean) + 1, dtype=np.int64) * _CELLS)
        for d, (a, b) in enumerate(pairwise(bounds)):
            upto = np.cumsum(self.counts[a:b])
            rank = np.asarray(QUANTILES) * (upto[-1] - 1)
            cell = np.minimum(np.searchsorted(upto, rank, side="right"), b - a - 1)
            low, high = _edges(self.keys[a:b][cell] % np.uint32(_CELLS))
            # the cells at both ends reach only to the minimum and the maximum
            low, high = np.maximum(low, self.min[d]), np.minimum(high, self.max[d])
            share = (rank - (upto[cell] - self.counts[a:b][cell]) + 0.5) / self.counts[a:b][cell]
            out[:, d] = np.clip(low + (high - low) * np.clip(share, 0, 1), self.min[d], self.max[d])
        return out


def _cells(values: np.ndarray) -> np.ndarray:
    """float64 [n, D] -> uint32 [n, D] keys: dimension · 2^17 + the cell's number. Cells are numbered in the order of values."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    # negative floats sort in reverse by their bits: flip all of them; positive ones come after them
    ordered = np.where(bits >> np.uint32(31) != 0, ~bits, bits | np.uint32(0x80000000))
    return (ordered >> _SHIFT) + np.arange(values.shape[1], dtype=np.uint32) * np.uint32(_CELLS)


def _edges(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest float32 of each cell."""
    low = cell.astype(np.uint32) << _SHIFT
    high = low | np.uint32((1 << int(_SHIFT)) - 1)

    def value(ordered: np.ndarray) -> np.ndarray:
        bits = np.where(ordered >> np.uint32(31) != 0, ordered & np.uint32(0x7FFFFFFF), ~ordered)
        with np.errstate(invalid="ignore"):
            out = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        return np.nan_to_num(out, nan=0.0, posinf=np.finfo(np.float64).max, neginf=np.finfo(np.float64).min)

    return value(low), value(high)


class Statistics:
    """The sketches of a dataset's small fields, by (task, field). Episodes are added one by one."""

    def __init__(self) -> None:
        self.sketches: dict[tuple[str, str], Sketch] = {}
        self._waiting: dict[str, tuple[RowLayout, list[tuple[str, np.ndarray]]]] = {}
        self._bytes = 0

    def add(self, layout: RowLayout, episode: str, rows: np.ndarray) -> None:
        """Count the rows of `steps.npy` of the episode with this id. Actions, rewards and flags are only counted in rows with an
        action."""
        self._waiting.setdefault(layout.task.name, (layout, []))[1].append((episode, rows))
        self._bytes += rows.nbytes
        if self._bytes >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Count the rows that have been collected so far."""
        for layout, parts in self._waiting.values():
            rows = np.concatenate([rows for _, rows in parts])
            ids = [episode for episode, _ in parts]
            owner = np.repeat(np.arange(len(parts)), [len(rows) for _, rows in parts])
            acted = np.flatnonzero(rows["_valid"])
            for spec in layout.small:
                some = acted if spec.role in ONLY_WITH_ACTION else slice(None)
                values = rows[spec.name][some]
                key = (layout.task.name, spec.name)
                if key not in self.sketches:
                    self.sketches[key] = Sketch(_kept_shape(spec))
                sketch = self.sketches[key]
                _count_outside(sketch, spec, values)
                _count_bad(sketch, spec, values, owner[some], ids)
                sketch.add(values.reshape(-1, len(sketch.mean)).astype(np.float64))
        self._waiting, self._bytes = {}, 0

    def merge(self, other: Statistics) -> None:
        """Add the counts of another object, which is flushed but otherwise not changed."""
        self.flush()
        other.flush()
        for key, sketch in other.sketches.items():
            mine = self.sketches.get(key)
            if mine is None or (mine.shape != sketch.shape and not mine.count):
                self.sketches[key] = mine = Sketch(sketch.shape)
            mine.merge(sketch)

    def result(self, tasks: Iterable[str]) -> dict[str, dict[str, FieldStatistics]]:
        """Task -> field -> statistics, for the given tasks."""
        self.flush()
        out: dict[str, dict[str, FieldStatistics]] = {name: {} for name in tasks}
        for (task, name), sketch in sorted(self.sketches.items()):
            if task in out:
                out[task][name] = sketch.result()
        return out

    def write(self, file: Path) -> None:
        """Write the sketches to a Parquet file with one row for each (task, field)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.flush()
        items = sorted(self.sketches.items())
        columns: dict[str, Any] = {
            "task": pa.array([k[0] for k, _ in items], pa.string()),
            "field": pa.array([k[1] for k, _ in items], pa.string()),
            "shape": pa.array([list(s.shape) for _, s in items], pa.list_(pa.int32())),
        }
        for name in (*_SCALARS, *_BAD):
            columns[name] = pa.array([getattr(s, name) for _, s in items], pa.int64())
        columns["first_bad"] = pa.array([list(s.first_bad) for _, s in items], pa.list_(pa.string()))
        for name, kind in _ARRAYS.items():
            columns[name] = pa.array([getattr(s, name) for _, s in items], pa.list_(pa.from_numpy_dtype(kind)))
        pq.write_table(pa.table(columns), file, compression="zstd")

    @classmethod
    def read(cls, source: Any) -> Statistics:
        """Read what `write` wrote, from a path or a file object. Raises ValueError or TypeError if it is damaged."""
        import pyarrow.parquet as pq

        out = cls()
        for row in pq.read_table(source).to_pylist():
            if not (isinstance(row["task"], str) and isinstance(row["field"], str)):
                raise ValueError(f"a row is of task {row['task']!r} and field {row['field']!r}, which are no names")
            arrays = {n: np.asarray(row[n], kind) for n, kind in _ARRAYS.items()}
            # An earlier version did not write all counts of bad values: these are unknown
            parts: dict[str, Any] = {n: int(row[n]) for n in _SCALARS} | {n: row.get(n) for n in _BAD} | arrays
            parts["first_bad"] = tuple(row.get("first_bad") or ())
            out.sketches[row["task"], row["field"]] = Sketch(tuple(row["shape"]), **parts)
        return out


_SCALARS = ("count", "outside", "elements")
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
    low, high = spec.entries(spec.low), spec.entries(spec.high)
    sketch.outside += int(((values < low) | (values > high)).sum())
    sketch.elements += values.size


def _count_bad(sketch: Sketch, spec: FieldSpec, values: np.ndarray, owner: np.ndarray, ids: Sequence[str]) -> None:
    """`owner` [n]: the episode of each step, as an index into `ids`. (`Sketch.add` counts the values that are not finite.)"""
    bad = ~np.isfinite(values) if values.dtype.kind == "f" else None
    beyond = 0
    if spec.modality == "discrete" and (wrong := _undeclared(spec, values)) is not None:
        if bad is not None:
            wrong &= ~bad
        beyond = int(wrong.reshape(-1, len(sketch.mean)).any(axis=1).sum())
        bad = wrong if bad is None else wrong | bad
    some = () if bad is None else np.unique(owner[bad.any(axis=tuple(range(1, bad.ndim)))])
    sketch.add_bad(beyond, (ids[i] for i in some))


def _undeclared(spec: FieldSpec, values: np.ndarray) -> np.ndarray | None:
    """Mask of the values of a discrete field that are outside its declared range or not whole; None if it declares none."""
    low, count = spec.value_range()
    if count is None:
        return None
    low, high = (spec.entries(tuple(bound)) for bound in (low, low + count - 1))
    wrong = (values < low) | (values > high)
    return wrong | (values != np.rint(values)) if values.dtype.kind == "f" else wrong
