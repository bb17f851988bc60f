"""Statistics of each small field of each task: moments, extremes, quantiles, the share of values outside the bounds, and how many
values are bad (NaN, infinities, discrete values that the field does not declare), with the episodes that have them.

They are computed from sketches that can be merged, so pieces of a dataset give the statistics of the whole. Moments are merged by
Chan et al. 1979. Quantiles come from a histogram (`tiphys.dataio.histogram`). Counts, extremes, quantiles and the listed episodes
do not depend on how episodes are grouped; moments depend on it only by rounding.

Tasks with rewards also have statistics of RETURN_TO_GO, which is no field: the undiscounted sum of the rewards from a step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, RowLayout
from tiphys.dataio.histogram import Histogram

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
MOST_DIMENSIONS = 512  # a field with more elements is pooled: its statistics are over all its elements together
FIRST_BAD = 100  # most episodes with bad values that are listed for a field
RETURN_TO_GO = "_return_to_go"  # no field of a task can have this name
_BUFFER = 4 << 20  # bytes of rows that are collected before they are counted


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
    histogram     from which further quantiles follow; None: unknown, as dataset.json does not have it
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
    histogram: Histogram | None = field(default=None, repr=False, compare=False)

    def at(self, levels: Sequence[float] | np.ndarray) -> np.ndarray:
        """float64 [len(levels), elements]: quantiles at any levels; between those of QUANTILES if the histogram is unknown."""
        if self.histogram is not None:  # it rounds to float32
            return np.clip(self.histogram.quantiles(levels), self.min.reshape(-1), self.max.reshape(-1))
        known = np.concatenate([[0.0], QUANTILES, [1.0]])
        rows = [
            np.reshape(self.min, (1, -1)),
            np.reshape(self.quantiles, (len(QUANTILES), -1)),
            np.reshape(self.max, (1, -1)),
        ]
        values = np.concatenate(rows)
        return np.stack([np.interp(levels, known, values[:, d]) for d in range(values.shape[1])], axis=1)

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
    """Statistics of a field over several datasets. Quantiles without histograms are averages, weighted by count."""
    if len(found) == 1:
        return found[0]
    count = np.array([f.count for f in found], np.float64)
    share = count / max(count.sum(), 1)

    def mean(of: Callable[[FieldStatistics], Any]) -> Any:
        return sum(s * np.asarray(of(f)) for s, f in zip(share, found, strict=True))

    centre = mean(lambda f: f.mean)
    variance = mean(lambda f: np.square(f.std) + np.square(np.asarray(f.mean) - centre))
    some = [f for f in found if f.count] or list(found)
    histogram, quantiles = _joined(some), mean(lambda f: f.quantiles)
    if histogram is not None:
        quantiles = histogram.quantiles(QUANTILES).reshape(np.shape(quantiles))
    return FieldStatistics(
        count=int(count.sum()),
        mean=centre,
        std=np.sqrt(variance),
        min=np.min([f.min for f in some], axis=0),
        max=np.max([f.max for f in some], axis=0),
        quantiles=quantiles,
        clipped=float(mean(lambda f: f.clipped)),
        invalid=total(f.invalid for f in found),
        beyond=total(f.beyond for f in found),
        bad_episodes=total(f.bad_episodes for f in found),
        first_bad=tuple(sorted({i for f in found for i in f.first_bad})[:FIRST_BAD]),
        histogram=histogram,
    )


def _joined(found: Sequence[FieldStatistics]) -> Histogram | None:
    """The histogram of all of them; None if one is unknown."""
    known = [f.histogram for f in found if f.histogram is not None]
    if len(known) < len(found):
        return None
    out = Histogram(known[0].dimensions)
    for one in known:
        out.merge(one)
    return out


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
    cells: Histogram = field(default_factory=lambda: Histogram(0))

    def __post_init__(self) -> None:
        dimensions = int(np.prod(self.shape, dtype=np.int64))
        if not self.cells.dimensions:
            self.cells = Histogram(dimensions)
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
        with np.errstate(over="ignore"):
            square = ((values - mean) ** 2).sum(axis=0)
        low, high = values.min(axis=0), values.max(axis=0)
        self._merge(len(values), mean, square, low, high)
        self.cells.add(values)

    def merge(self, other: Sketch) -> None:
        """Add the counts of another sketch."""
        for name in _BAD:
            setattr(self, name, total((getattr(self, name), getattr(other, name))))
        self.first_bad = tuple(sorted({*self.first_bad, *other.first_bad})[:FIRST_BAD])
        self.outside += other.outside
        self.elements += other.elements
        if other.count:
            self._merge(other.count, other.mean, other.square, other.min, other.max)
            self.cells.merge(other.cells)

    def add_bad(self, beyond: int, episodes: Iterable[str]) -> None:
        """Count values outside the declared range, and the episodes that have these or values that are not finite."""
        ids = set(episodes)
        self.beyond = total((self.beyond, beyond))
        self.bad_episodes = total((self.bad_episodes, len(ids)))
        self.first_bad = tuple(sorted({*self.first_bad, *ids})[:FIRST_BAD])

    def _merge(self, count: int, mean: np.ndarray, square: np.ndarray, low: Any, high: Any) -> None:
        both = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / both)
        with np.errstate(over="ignore"):
            between = delta**2 * (self.count * count / both) if self.count else 0.0
            self.square = self.square + square + between
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
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
        if (self.square < 0).any():
            raise DataError("a sketch has a negative sum of squares")
        numbers = (self.outside, self.elements, *(getattr(self, name) or 0 for name in _BAD))
        if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
            raise DataError("a sketch counts values with something else than numbers")
        if not all(isinstance(episode, str) for episode in self.first_bad):
            raise DataError("a sketch names episodes by something else than their ids")
        if self.cells.dimensions != dimensions:
            raise DataError("the histogram and the shape of a sketch do not agree")
        self.cells.check(self.count)

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
            histogram=self.cells if known else None,
        )

    def _quantiles(self) -> np.ndarray:
        """[len(QUANTILES), D]; values that float32 rounds stay between the extremes."""
        return np.clip(self.cells.quantiles(QUANTILES), self.min, self.max)


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
                sketch.add(_doubles(values).reshape(-1, len(sketch.mean)))
            if any(spec.role == "reward" for spec in layout.small):
                sketch = self.sketches.setdefault((layout.task.name, RETURN_TO_GO), Sketch(()))
                togo = _doubles(rows["_return_to_go"][acted, None])
                sketch.add(togo[np.isfinite(togo[:, 0])])  # the rewards that are not finite are counted as such
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
        for name, kind in _CELLS.items():
            of = [getattr(s.cells, name.removeprefix("cell_")) for _, s in items]
            columns[name] = pa.array(of, pa.list_(pa.from_numpy_dtype(kind)))
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
            out.sketches[row["task"], row["field"]] = Sketch(tuple(row["shape"]), **parts, cells=_stored_cells(row))
        return out


_SCALARS = ("count", "outside", "elements")
_ARRAYS: dict[str, Any] = {
    "mean": np.float64,
    "square": np.float64,
    "min": np.float64,
    "max": np.float64,
}
# Columns of the histogram. Earlier versions have the columns `keys` and `counts` instead.
_CELLS: dict[str, Any] = {
    "cell_shift": np.uint8,
    "cell_keys": np.uint64,
    "cell_counts": np.int64,
    "cell_lows": np.float32,
    "cell_highs": np.float32,
    "cell_at_low": np.int64,
    "cell_at_high": np.int64,
}


def _stored_cells(row: Mapping[str, Any]) -> Histogram:
    dimensions = math.prod(row["shape"])
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"a sketch has shape {row['shape'][:8]}; at most {MOST_DIMENSIONS} elements are kept apart")
    if "cell_keys" not in row:
        extremes = (np.asarray(row[name], np.float64) for name in ("min", "max"))
        keys, counts = np.asarray(row["keys"], np.uint32), np.asarray(row["counts"], np.int64)
        return Histogram.of_version_1(dimensions, keys, counts, *extremes)
    cells = {name.removeprefix("cell_"): np.asarray(row[name], kind) for name, kind in _CELLS.items()}
    return Histogram(dimensions, **cells)


def _kept_shape(spec: FieldSpec) -> tuple[int, ...]:
    return spec.shape if np.prod(spec.shape, dtype=np.int64) <= MOST_DIMENSIONS else ()


def _doubles(values: np.ndarray) -> np.ndarray:
    """As float64. NumPy warns of a signalling NaN, which only damaged data hold; it is counted as any NaN."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


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
