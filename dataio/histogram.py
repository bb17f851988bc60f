"""A histogram of several dimensions from which quantiles follow, and which can be merged.

A cell holds the values of a dimension whose float32 have the same upper bits, in the order of the values. A dimension with few
distinct values has a cell for each of them, so its quantiles are exact. With more than MOST_CELLS cells, cells are joined by
dropping their lowest bits, at most down to the upper 17 bits (sign, exponent and 8 bits of the fraction: 0.4 % of the value).
Each cell keeps its smallest and its largest value and how often they occur, so that a round value that occurs often (0, 1, −0.5)
stays a quantile exactly, whatever is near it.

How many bits a dimension drops depends on its set of values alone, so the histogram does not depend on how they are grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tiphys.dataio.episode import DataError

MOST_CELLS = 4096  # of a dimension, unless they are as wide as they may be
MOST_SHIFT = 15  # most bits that are dropped
CELLS = ("keys", "counts", "lows", "highs", "at_low", "at_high")  # arrays with an element for each cell
_OLD_CELLS = 1 << 17
_LOW = np.uint64(0xFFFFFFFF)


@dataclass
class Histogram:
    """The values of D dimensions, counted in cells.

    Attributes
    ----------
    dimensions : int
        D.
    shift : uint8 [D]
        Lowest bits that the keys of a dimension lack.
    keys : uint64 [cells]
        dimension · 2^32 + the upper bits of the value, ascending.
    counts : int64 [cells]
        Number of values in each cell.
    lows, highs : float32 [cells]
        Its smallest and its largest value.
    at_low, at_high : int64 [cells]
        How often these two occur; 0: unknown.
    """

    dimensions: int
    shift: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    highs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    at_low: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    at_high: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.shift):
            self.shift = np.zeros(self.dimensions, np.uint8)

    def add(self, values: np.ndarray) -> None:
        """Count finite float64 values [n, D]."""
        keys = np.sort(_keys(values).reshape(-1))
        found = Histogram(self.dimensions, self.shift.copy())
        found.keys = keys
        found.counts = found.at_low = found.at_high = np.ones(len(keys), np.int64)
        found.lows = found.highs = _values(keys)
        found._join()
        self.merge(found)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram of as many dimensions."""
        self.shift = np.maximum(self.shift, other.shift)
        order = np.argsort(np.concatenate([self.keys, other.keys]), kind="stable")
        for name in CELLS:
            both = np.concatenate([getattr(self, name), getattr(other, name)])
            setattr(self, name, both[order])
        self._join()

    def _join(self) -> None:
        """Join the cells of equal keys. Drop bits of a dimension until it has few cells, or no more may be dropped."""
        while True:
            self._collapse()
            cells = np.bincount((self.keys >> np.uint64(32)).astype(np.int64), minlength=self.dimensions)
            many = (cells > MOST_CELLS) & (self.shift < MOST_SHIFT)
            if not many.any():
                return
            self.shift = self.shift + many.astype(np.uint8)

    def _collapse(self) -> None:
        if not len(self.keys):
            return
        mask = ~((np.uint64(1) << self.shift.astype(np.uint64)) - np.uint64(1))
        self.keys = self.keys & mask[(self.keys >> np.uint64(32)).astype(np.int64)]
        first = np.flatnonzero(np.append(True, self.keys[1:] != self.keys[:-1]))
        if len(first) == len(self.keys):
            return
        sizes = np.diff(np.append(first, len(self.keys)))
        for end, at, extreme in (("lows", "at_low", np.minimum), ("highs", "at_high", np.maximum)):
            values, found = getattr(self, end), extreme.reduceat(getattr(self, end), first)
            mine = np.where(values == np.repeat(found, sizes), getattr(self, at), 0)
            setattr(self, end, found)
            setattr(self, at, np.add.reduceat(mine, first))
        self.counts, self.keys = np.add.reduceat(self.counts, first), self.keys[first]

    def quantiles(self, levels: Sequence[float] | np.ndarray) -> np.ndarray:
        """float64 [len(levels), D], as numpy.quantile computes them; within a cell, values are taken to be equally spaced."""
        levels = np.asarray(levels, np.float64)
        out = np.zeros((len(levels), self.dimensions))
        starts = np.arange(self.dimensions + 1, dtype=np.uint64) << np.uint64(32)
        bounds = np.searchsorted(self.keys, starts)
        for d, (a, b) in enumerate(pairwise(bounds)):
            if a == b:
                continue
            upto = np.cumsum(self.counts[a:b])
            place = levels * (upto[-1] - 1)
            rank = np.floor(place).astype(np.int64)
            low, high = (self._at(a, upto, np.minimum(r, upto[-1] - 1)) for r in (rank, rank + 1))
            share = place - rank
            # not low + (high − low) · share, which overflows for the largest floats
            out[:, d] = np.where(low == high, low, low * (1 - share) + high * share)
        return out

    def _at(self, first: int, upto: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The values of these ranks, of the dimension whose cells begin at `first`."""
        cell = np.searchsorted(upto, rank, side="right")
        count, at_low, at_high = (a[first + cell] for a in (self.counts, self.at_low, self.at_high))
        low, high = (a[first + cell].astype(np.float64) for a in (self.lows, self.highs))
        within = rank - (upto[cell] - count) - at_low  # −1: the last that equals low
        share = np.clip((within + 1) / np.maximum(count - at_low - at_high + 1, 1), 0, 1)
        return np.asarray(np.where(low == high, low, low * (1 - share) + high * share))

    def check(self, count: int) -> None:
        """Raises DataError if the values, which come from a file, do not belong together, or a dimension has not `count`."""
        sizes = {len(getattr(self, name)) for name in CELLS}
        known = len(sizes) == 1 and len(self.shift) == self.dimensions and bool((self.shift <= MOST_SHIFT).all())
        known = known and bool((self.keys[1:] > self.keys[:-1]).all() and (self.counts > 0).all())
        if not known or (len(self.keys) and int(self.keys[-1]) >> 32 >= self.dimensions):
            raise DataError("the histogram of a sketch is not valid")
        if not (np.isfinite(self.lows).all() and np.isfinite(self.highs).all() and (self.lows <= self.highs).all()):
            raise DataError("the cells of a sketch have no valid ends")
        if any(((at < 0) | (at > self.counts)).any() for at in (self.at_low, self.at_high)):
            raise DataError("the cells of a sketch count their ends more often than their values")
        if (np.bincount((self.keys >> np.uint64(32)).astype(np.int64), self.counts, self.dimensions) != count).any():
            raise DataError("the histogram and the count of a sketch do not agree")

    @classmethod
    def of_version_1(
        cls, dimensions: int, keys: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> Histogram:
        """From what earlier versions stored: keys dimension · 2^17 + cell, and the extremes [D] of each dimension."""
        keys = np.asarray(keys, np.uint64)
        dimension, cell = keys // np.uint64(_OLD_CELLS), keys % np.uint64(_OLD_CELLS)
        if len(keys) and int(dimension[-1]) >= dimensions:
            raise DataError("the histogram of a sketch is not valid")
        first = (dimension << np.uint64(32)) | (cell << np.uint64(MOST_SHIFT))
        ends = [_values(first), _values(first | np.uint64((1 << MOST_SHIFT) - 1))]
        at = dimension.astype(np.int64)
        lows, highs = (np.clip(end, low[at], high[at]).astype(np.float32) for end in ends)
        unknown = np.zeros(len(keys), np.int64)
        return cls(
            dimensions, np.full(dimensions, MOST_SHIFT, np.uint8), first, counts, lows, highs, unknown, unknown.copy()
        )


def _keys(values: np.ndarray) -> np.ndarray:
    """float64 [n, D] -> uint64 [n, D]. Keys of a dimension have the order of the values."""
    limit = np.finfo(np.float32).max
    bits = (np.clip(values, -limit, limit).astype(np.float32) + np.float32(0)).view(np.uint32)  # −0 becomes 0
    # negative floats sort in reverse by their bits: flip all of them; positive ones come after them
    ordered = np.where(bits >> np.uint32(31) != 0, ~bits, bits | np.uint32(0x80000000))
    return ordered.astype(np.uint64) | (np.arange(values.shape[1], dtype=np.uint64) << np.uint64(32))


def _values(keys: np.ndarray) -> np.ndarray:
    """The float32 that keys were made of; the largest float for what is none."""
    ordered = (keys & _LOW).astype(np.uint32)
    bits = np.where(ordered >> np.uint32(31) != 0, ordered & np.uint32(0x7FFFFFFF), ~ordered).astype(np.uint32)
    largest = float(np.finfo(np.float32).max)
    return np.nan_to_num(bits.view(np.float32), nan=0.0, posinf=largest, neginf=-largest)
