"""Codecs that give an id of the vocabulary for each number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.batch import DISCRETE
from tiphys.pretrain.tokens.codec import (
    Codec,
    as_type,
    counted_integers,
    flat_numbers,
    from_unit,
    inverse_mu_law,
    mu_law,
    to_unit,
)


@dataclass(frozen=True)
class Discrete(Codec):
    """Integers low … low + values − 1, one token each, in raster order."""

    kind: ClassVar[str] = "discrete"
    modality: ClassVar[int] = DISCRETE
    first: int  # id of the lowest value
    values: tuple[int, ...]  # number of values, broadcast over the entries
    low: tuple[int, ...] = (0,)  # lowest value, broadcast over the entries
    dtype: str = "int64"

    def encode(self, x: np.ndarray) -> np.ndarray:
        integers = counted_integers(x, self.low, self.values)
        return integers + np.int32(self.first)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        values = np.asarray(tokens, np.int64) - self.first + np.asarray(self.low, np.int64)
        return values.reshape(len(values), *self.shape).astype(self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.first, self.first + int(n)) for n in np.broadcast_to(self.values, self.tokens))


@dataclass(frozen=True)
class Bins(Codec):
    """Uniform bins of [-1, 1], of which the last includes 1.

    Values are mapped to [-1, 1] first: with `companded` by mu-law, else by the affine map of [low, high].
    """

    kind: ClassVar[str] = "bins"
    first: int
    bins: int
    low: tuple[float, ...] = (-1.0,)
    high: tuple[float, ...] = (1.0,)
    companded: bool = False  # mu-law instead of the affine map
    dtype: str = "float32"

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.low, np.float64), np.asarray(self.high, np.float64)

    def encode(self, x: np.ndarray) -> np.ndarray:
        flat = flat_numbers(x, np.float64)
        y = mu_law(flat) if self.companded else to_unit(flat, *self._bounds)
        bins = np.clip(np.floor((y + 1) * (self.bins / 2)), 0, self.bins - 1)
        return bins.astype(np.int32) + np.int32(self.first)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The middle of each id's bin."""
        y = (np.asarray(tokens, np.float64) - self.first + 0.5) * (2 / self.bins) - 1
        x = inverse_mu_law(y) if self.companded else from_unit(y, *self._bounds)
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return ((self.first, self.first + self.bins),) * self.tokens


@dataclass(frozen=True)
class Quantiles(Codec):
    """Bins whose edges are quantiles of the data; each entry of the field has its own edges (Janner et al. 2021, sec. 3.1).

    A value that is several quantiles at once has a bin of its own, which decodes to it; see `merged`.
    """

    kind: ClassVar[str] = "quantiles"
    first: int
    edges: tuple[tuple[float, ...], ...]  # [numbers][bins + 1], ascending; entries may have different numbers of bins
    dtype: str = "float32"

    @staticmethod
    def merged(edges: np.ndarray) -> tuple[float, ...]:
        """Ascending edges in which a value that occurs several times becomes a bin that holds it alone."""
        values, counts = np.unique(np.asarray(edges, np.float64), return_counts=True)
        closed = np.nextafter(values[counts > 1], np.inf)
        return tuple(np.unique(np.concatenate([values, closed])).tolist())

    @cached_property
    def _edges(self) -> list[np.ndarray]:
        return [np.asarray(row, np.float64) for row in self.edges]

    def encode(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # edges are float32 numbers
            flat = flat_numbers(x, np.float64).astype(np.float32).astype(np.float64)
        columns = [np.searchsorted(row[1:-1], flat[:, d], side="right") for d, row in enumerate(self._edges)]
        return (np.stack(columns, axis=1) if columns else np.zeros(flat.shape)).astype(np.int32) + np.int32(self.first)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        bins = np.asarray(tokens, np.int64) - self.first
        found = np.zeros(bins.shape)
        for d, row in enumerate(self._edges):
            low = np.clip(bins[:, d], 0, len(row) - 2)
            found[:, d] = (row[low] + row[low + 1]) / 2
        return as_type(found.reshape(len(bins), *self.shape), self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.first, self.first + len(row) - 1) for row in self._edges)


@dataclass(frozen=True)
class Integers(Codec):
    """Numbers rounded to integers and clamped to low … high, one id each (the returns of Lee et al. 2022, sec. 3.2)."""

    kind: ClassVar[str] = "integers"
    modality: ClassVar[int] = DISCRETE
    first: int  # id of the integer `low`
    low: int
    high: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise DataError(f"codec 'integers': low {self.low} is above high {self.high}")

    @property
    def values(self) -> tuple[int]:
        """The number of integers."""
        return (self.high - self.low + 1,)

    def encode(self, x: np.ndarray) -> np.ndarray:
        flat = np.clip(np.rint(flat_numbers(x, np.float64)), self.low, self.high)
        return (flat - self.low).astype(np.int32) + np.int32(self.first)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        x = np.asarray(tokens, np.int64) - self.first + self.low
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return ((self.first, self.first + self.values[0]),) * self.tokens


@dataclass(frozen=True)
class Sign(Codec):
    """The sign of each number, as one of three ids for -1, 0 and 1 (rewards clipped to their sign: Mnih et al. 2015)."""

    kind: ClassVar[str] = "sign"
    modality: ClassVar[int] = DISCRETE
    values: ClassVar[tuple[int]] = (3,)
    first: int  # id of -1
    dtype: str = "float32"

    def encode(self, x: np.ndarray) -> np.ndarray:
        return np.sign(flat_numbers(x, np.float64)).astype(np.int32) + np.int32(self.first + 1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        x = np.asarray(tokens, np.int64) - self.first - 1
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return ((self.first, self.first + 3),) * self.tokens
