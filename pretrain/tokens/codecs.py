"""Codecs: values of a field <-> ids of the vocabulary, or the numbers that an embedder takes. Every codec can decode.

A codec is frozen, can be written as JSON (`to_dict`, `from_dict`), and works on N steps at once. The codecs are those of Reed et
al. 2022, sec. 2.1 and app. B, and those of the compact scheme, in which a whole vector or a small grid is one token. Values
outside a codec's range are clamped, ±inf too. NaN, and discrete values that do not exist, raise `NoEncoding`, which says at which
of the N steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from tiphys.dataio.episode import BadValue, DataError
from tiphys.dataio.stored import stored
from tiphys.pretrain.tokens.batch import CONTINUOUS, DISCRETE, IMAGE
from tiphys.pretrain.tokens.images import PATCH, centre_crop, from_patches, intervals, patch_grid, resized, to_patches
from tiphys.pretrain.tokens.vocabulary import EmbedderSpec, Vocabulary

MU, M = 100.0, 256.0  # mu-law: F(±M) = ±1
_NAN = "NaN has no encoding"
_MOST_NUMBERS = 1 << 24  # of a value at one step
_FAR = 10.0  # standard deviations; values are clamped to it, so that no outlier dominates an embedder


class NoEncoding(BadValue):
    """A value that has no encoding. `at` is the index of its step among the steps that were encoded."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at, self.reason = at, reason


def mu_law(x: np.ndarray) -> np.ndarray:
    """F(x) = sgn(x)·log(|x|µ + 1)/log(Mµ + 1)."""
    return np.sign(x) * np.log1p(np.abs(x) * MU) / np.log1p(M * MU)


def inverse_mu_law(y: np.ndarray) -> np.ndarray:
    return np.sign(y) * np.expm1(np.abs(y) * np.log1p(M * MU)) / MU


def _flat(x: np.ndarray, dtype: Any) -> np.ndarray:
    """[N, *shape] -> [N, numbers]; NaN raises NoEncoding."""
    x = np.asarray(x)
    flat = x.reshape(len(x), int(np.prod(x.shape[1:], dtype=np.int64))).astype(dtype or x.dtype, copy=False)
    if x.dtype.kind == "f" and len(x):
        bad = np.isnan(flat).any(axis=1)
        if bad.any():
            raise NoEncoding(int(bad.argmax()), _NAN)
    return flat


@dataclass(frozen=True)
class Codec:
    """The encoding of one field.

    `encode` gives ids, int32 [N, tokens]. If `embedder` is set, it gives the values for that embedder, [N, tokens, …].
    """

    kind: ClassVar[str]
    modality: ClassVar[int] = CONTINUOUS
    spec: ClassVar[EmbedderSpec | None] = None
    embedder: str  # name of the embedder; empty: the codec gives ids
    shape: tuple[int, ...]  # of the field's value at one step

    def __post_init__(self) -> None:
        for f in fields(self):  # JSON gives lists
            value = getattr(self, f.name)
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(tuple(v) if isinstance(v, list) else v for v in value))

    @property
    def tokens(self) -> int:
        """Positions that the field takes at one step."""
        return int(np.prod(self.shape, dtype=np.int64))

    def encode(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def embedder_spec(self) -> EmbedderSpec:
        raise DataError(f"codec {self.kind!r} gives ids, so it has no embedder")

    def choices(self) -> tuple[tuple[int, int], ...]:
        """For each token of a step: [low, high) of the ids that it can be."""
        raise DataError(f"codec {self.kind!r} gives no ids")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


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
        integers = _integers(x, self.low, self.values)
        return integers + np.int32(self.first)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        values = np.asarray(tokens, np.int64) - self.first + np.asarray(self.low, np.int64)
        return values.reshape(len(values), *self.shape).astype(self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.first, self.first + int(n)) for n in np.broadcast_to(self.values, self.tokens))


def _integers(x: np.ndarray, low: tuple[int, ...], values: tuple[int, ...]) -> np.ndarray:
    """int32 [N, numbers], counted from the lowest value. Raises NoEncoding if a value is not an integer or out of range."""
    flat = _flat(x, None)
    if flat.dtype.kind == "f" and not np.array_equal(flat, np.rint(flat)):
        at = int((flat != np.rint(flat)).any(axis=1).argmax())
        raise NoEncoding(at, f"the field is discrete, but {flat[at].tolist()} are not all integers")
    least = np.broadcast_to(np.asarray(low, np.int64), flat.shape[1:])
    count = np.broadcast_to(np.asarray(values, np.int64), flat.shape[1:])
    wrong = (flat < least) | (flat >= least + count)
    if wrong.any():
        at, entry = np.argwhere(wrong)[0].tolist()
        raise NoEncoding(
            at,
            f"{flat[at, entry]} is not in {least[entry]} … {least[entry] + count[entry] - 1}, the range of the field",
        )
    return (flat.astype(np.int64) - least).astype(np.int32)


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
        flat = _flat(x, np.float64)
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


def as_type(x: np.ndarray, dtype: str) -> np.ndarray:
    """Values as the field's type: integers are rounded, and stay within the type."""
    if np.dtype(dtype).kind not in "iu":
        return x.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(x), limits.min, limits.max).astype(dtype)


def to_unit(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[low, high] -> [-1, 1]; 0 for entries with low = high."""
    span = high - low
    with np.errstate(invalid="ignore"):
        y = (x - low) / np.where(span > 0, span, 1) * 2 - 1
    return np.where(span > 0, y, 0.0)


def from_unit(y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low + (y + 1) / 2 * (high - low)


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
            flat = _flat(x, np.float64).astype(np.float32).astype(np.float64)
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
class Patches(Codec):
    """An image as 16×16 patches in raster order, after a centre crop and a resize.

    The field's range, black to white, becomes [-1, 1]. Values beyond it are clamped.
    """

    kind: ClassVar[str] = "patches"
    modality: ClassVar[int] = IMAGE
    crop: int = 0
    resize: int = 0
    channels_first: bool = False
    white: float = 255.0  # the value of a full channel
    black: float = 0.0  # the value of an empty channel

    @property
    def varies(self) -> bool:
        """The pictures differ in size from episode to episode (a side of `shape` is 0)."""
        return 0 in self.shape

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of the picture that is cut into patches."""
        shape = self.shape if len(self.shape) == 3 else (*self.shape, 1)
        height, width, channels = (*shape[1:], shape[0]) if self.channels_first else shape
        if self.crop:
            height, width = min(height, self.crop), min(width, self.crop)
        return (self.resize or height), (self.resize or width), channels

    @property
    def tokens(self) -> int:
        rows, columns = patch_grid(*self.size[:2])
        return rows * columns

    def pixels(self, x: np.ndarray) -> np.ndarray:
        """[N, *shape] -> [N, height, width, channels], the pictures as the patches show them.

        uint8 whose range is 0 … 255 stays as it is. All other pictures become uint16, with black 0 and white 65535.
        """
        x = np.asarray(x)
        if x.dtype.kind == "f" and np.isnan(x).any():
            raise NoEncoding(int(np.isnan(x.reshape(len(x), -1)).any(axis=1).argmax()), _NAN)
        if x.ndim == 3:
            x = x[..., None]
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        if x.dtype != np.uint8 or (self.black, self.white) != (0.0, 255.0):
            share = (x.astype(np.float64) - self.black) / (self.white - self.black)
            x = np.rint(np.clip(share, 0, 1) * 65535).astype(np.uint16)
        return resized(centre_crop(x, self.crop), self.resize)

    def encode(self, x: np.ndarray) -> np.ndarray:
        return to_patches(self.pixels(x))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [N, patches, 16, 16, C] -> uint8 [N, height, width, C]. Crop and resize are not undone."""
        return from_patches(tokens, *self.size[:2])

    def to_dict(self) -> dict[str, Any]:
        """A black of 0 is left out, as in policies of earlier versions."""
        return {k: v for k, v in super().to_dict().items() if k != "black" or v}

    @cached_property
    def spans(self) -> np.ndarray:
        return intervals(*self.size[:2])

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("patch", (PATCH, PATCH, self.size[2]))


@dataclass(frozen=True)
class Vector(Codec):
    """A whole array as one token, float32 [N, 1, 2·numbers]: first the standardised values, then the values after mu-law."""

    kind: ClassVar[str] = "vector"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return 1

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)

    def encode(self, x: np.ndarray) -> np.ndarray:
        flat = _flat(x, np.float64)
        mean, std = self._moments
        n = flat.shape[1]
        out = np.empty((len(flat), 1, 2 * n), np.float32)
        out[:, 0, :n] = np.clip((flat - mean) / std, -_FAR, _FAR)
        out[:, 0, n:] = np.clip(mu_law(flat), -1, 1)
        return out

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Exact within float32 up to 10 standard deviations; beyond that the value was clamped."""
        mean, std = self._moments
        n = tokens.shape[-1] // 2
        x = np.asarray(tokens, np.float64)[:, 0, :n] * std + mean
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("vector", (2 * int(np.prod(self.shape, dtype=np.int64)),))


@dataclass(frozen=True)
class Affine(Codec):
    """A whole array as one token: [low, high] is mapped to [-1, 1] and clamped to ± `limit`. For regressed actions and returns.

    A regression head learns these values, and its output is decoded from them.
    """

    kind: ClassVar[str] = "affine"
    low: tuple[float, ...] = (-1.0,)
    high: tuple[float, ...] = (1.0,)
    limit: float = 1.0
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return 1

    def encode(self, x: np.ndarray) -> np.ndarray:
        y = to_unit(_flat(x, np.float64), np.asarray(self.low, np.float64), np.asarray(self.high, np.float64))
        return np.clip(y, -self.limit, self.limit).astype(np.float32)[:, None]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        y = np.clip(np.asarray(tokens, np.float64)[:, 0], -self.limit, self.limit)
        x = from_unit(y, np.asarray(self.low, np.float64), np.asarray(self.high, np.float64))
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("vector", (int(np.prod(self.shape, dtype=np.int64)),))


@dataclass(frozen=True)
class Chunk(Codec):
    """The next actions as one token and as one target: [low, high] is mapped to [-1, 1] and not clamped.

    The token shows the first `steps` of them, those that are executed; the target is all `horizon`. Absent actions are 0.
    """

    kind: ClassVar[str] = "chunk"
    steps: int = 1
    horizon: int = 1
    low: tuple[float, ...] = (-1.0,)
    high: tuple[float, ...] = (1.0,)
    loss: str = "l2"  # l2 | l1 | flow
    width: int = 0  # of the head; these four only for `flow`
    depth: int = 0
    draws: int = 0
    euler: int = 0
    insulate: int = 0  # bins that train the hidden states in place of the head; 0: the head trains them
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("l2", "l1", "flow") or not 1 <= self.steps <= self.horizon <= 1 << 12:
            raise DataError(
                f"codec 'chunk': loss {self.loss!r}, steps {self.steps} and horizon {self.horizon} are not possible"
            )

    @property
    def tokens(self) -> int:
        return 1

    @property
    def entries(self) -> int:
        """Entries of one action."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def head(self) -> dict[str, Any]:
        """What the model needs to know of the head that predicts the chunks."""
        out = {"loss": self.loss, "steps": self.horizon, "entries": self.entries}
        if self.loss == "flow":
            out |= {n: getattr(self, n) for n in ("width", "depth", "draws", "euler")}
        return out | ({"insulate": self.insulate} if self.insulate else {})

    def to_dict(self) -> dict[str, Any]:
        """An `insulate` of 0 is left out, as in policies of earlier versions."""
        return {key: value for key, value in super().to_dict().items() if key != "insulate" or value}

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.low, np.float64), np.asarray(self.high, np.float64)

    def normalised(self, x: np.ndarray) -> np.ndarray:
        """[N, n, *shape] -> float32 [N, n, entries]."""
        flat = _flat(x, np.float64)
        return to_unit(flat.reshape(len(flat), -1, self.entries), *self._bounds).astype(np.float32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Up to `steps` actions [N, n, *shape] -> float32 [N, 1, steps · entries]."""
        out = np.zeros((len(x), self.steps, self.entries), np.float32)
        known = self.normalised(x)[:, : self.steps]
        out[:, : known.shape[1]] = known
        return out.reshape(len(x), 1, -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[N, 1, n · entries] -> [N, n, *shape], for any number n of actions."""
        y = np.asarray(tokens, np.float64).reshape(len(tokens), -1, self.entries)
        return as_type(from_unit(y, *self._bounds).reshape(*y.shape[:2], *self.shape), self.dtype)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("vector", (self.steps * self.entries,))


@dataclass(frozen=True)
class Grid(Codec):
    """A small grid of discrete values as one token, [N, 1, h, w, c]; values are counted from the lowest one."""

    kind: ClassVar[str] = "grid"
    modality: ClassVar[int] = DISCRETE
    values: tuple[int, ...] = (0,)
    low: tuple[int, ...] = (0,)
    dtype: str = "uint8"

    @property
    def tokens(self) -> int:
        return 1

    @property
    def cells(self) -> tuple[int, int, int]:
        height, width, channels = self.shape if len(self.shape) == 3 else (*self.shape, 1)
        return height, width, channels

    def encode(self, x: np.ndarray) -> np.ndarray:
        cells = _integers(x, self.low, self.values).reshape(len(x), 1, *self.cells)
        return cells.astype(np.uint8 if max(self.values) <= 256 else np.int32)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        flat = np.asarray(tokens, np.int64).reshape(len(tokens), -1) + np.asarray(self.low, np.int64)
        return flat.reshape(len(tokens), *self.shape).astype(self.dtype)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("grid", self.cells, max(self.values))


@dataclass(frozen=True)
class Tiles(Grid):
    """A small grid cut into equal tiles, one token each in raster order, [N, tiles, h, w, c]: its rows, or its cells.

    So attention can find the part of the grid that holds what a text names. `tile`: height and width of a tile, which divide
    those of the grid.
    """

    kind: ClassVar[str] = "tiles"
    tile: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.tile if len(self.tile) == 2 and min(self.tile) > 0 else (0, 0)
        if not all(sides) or self.cells[0] % sides[0] or self.cells[1] % sides[1]:
            raise DataError(f"codec 'tiles': tiles of {self.tile} do not cover a grid of {self.cells[:2]}")

    @property
    def _counts(self) -> tuple[int, int]:
        """Tiles below each other, and side by side."""
        return self.cells[0] // self.tile[0], self.cells[1] // self.tile[1]

    @property
    def tokens(self) -> int:
        return math.prod(self._counts)

    @cached_property
    def places(self) -> np.ndarray:
        """int32 [tiles, 2]: row and column of each tile."""
        return np.stack(np.divmod(np.arange(self.tokens), self._counts[1]), axis=1).astype(np.int32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        (rows, columns), (height, width), channels = self._counts, self.tile, self.cells[2]
        cells = super().encode(x).reshape(-1, rows, height, columns, width, channels)
        return cells.swapaxes(2, 3).reshape(-1, rows * columns, height, width, channels)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        (rows, columns), (height, width), channels = self._counts, self.tile, self.cells[2]
        cells = np.asarray(tokens).reshape(-1, rows, columns, height, width, channels).swapaxes(2, 3)
        return super().decode(cells.reshape(len(cells), -1))

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("tile", (*self.tile, self.cells[2]), max(self.values))


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
        flat = np.clip(np.rint(_flat(x, np.float64)), self.low, self.high)
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
        return np.sign(_flat(x, np.float64)).astype(np.int32) + np.int32(self.first + 1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        x = np.asarray(tokens, np.int64) - self.first - 1
        return as_type(x.reshape(len(x), *self.shape), self.dtype)

    def choices(self) -> tuple[tuple[int, int], ...]:
        return ((self.first, self.first + 3),) * self.tokens


@dataclass(frozen=True)
class Histogram(Codec):
    """A histogram as one token, float32 [N, 1, bins]: the share of the values in each bin, from 0 to 1, is left as it is.

    The shares of each entry sum to 1 (Furuta et al. 2022, sec. 4).
    """

    kind: ClassVar[str] = "histogram"

    @property
    def tokens(self) -> int:
        return 1

    def encode(self, x: np.ndarray) -> np.ndarray:
        return np.clip(_flat(x, np.float32), 0, 1)[:, None]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(tokens, np.float32).reshape(len(tokens), *self.shape)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("vector", (int(np.prod(self.shape, dtype=np.int64)),))


CODECS: dict[str, type[Codec]] = {
    c.kind: c
    for c in (Discrete, Bins, Quantiles, Patches, Vector, Affine, Chunk, Grid, Tiles, Integers, Sign, Histogram)
}


def codec_from_dict(values: Mapping[str, Any], where: str = "codec") -> Codec:
    """The inverse of `Codec.to_dict`. Raises DataError if it is not valid."""
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: it is not an object with keys")
    rest = dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in CODECS:
        raise DataError(
            f"codec {kind!r} is unknown; this version has {', '.join(CODECS)}. Update Tiphys to load this policy"
        )
    return stored(CODECS[kind], rest, where)


def check_codec(codec: Codec, size: int, vocabulary: Vocabulary, where: str) -> None:
    """Try a codec that comes from a file on one value.

    Raises DataError if it does not work, does not take `size` positions, or gives ids or needs an embedder that the vocabulary
    does not have.
    """
    sides = (codec.crop, codec.resize) if isinstance(codec, Patches) else ()
    shape = tuple(n or 1 for n in codec.shape) if sides else codec.shape
    numbers = math.prod(shape)
    if len(shape) > 8 or min(shape, default=1) < 1 or numbers > _MOST_NUMBERS or any(not 0 <= n <= 8192 for n in sides):
        raise DataError(f"{where}: a value of shape {codec.shape} has no size that is possible")
    try:
        value = np.broadcast_to(np.asarray(getattr(codec, "low", 0), np.float64), (1, numbers)).reshape(1, *shape)
        value = np.where(np.isfinite(value), value, 0).astype("uint8" if sides else "float64")
        found = codec.encode(value)
        codec.decode(found)
        if codec.tokens != size or found.shape[:2] != (1, size):
            raise DataError(f"{where}: it takes {codec.tokens} positions, not {size}")
        if codec.embedder:
            fits = vocabulary.embedders.get(codec.embedder)
            if fits is None or fits.shape != codec.embedder_spec().shape:
                raise DataError(f"{where}: the vocabulary has no embedder {codec.embedder!r} for its values")
        else:
            choices = codec.choices() if not isinstance(codec, Affine) else ()
            if any(not 0 <= low < high <= vocabulary.size for low, high in choices):
                raise DataError(f"{where}: it gives ids that the vocabulary does not have")
    except DataError:
        raise
    except Exception as error:  # NumPy refuses impossible shapes, types and numbers with errors of many classes
        raise DataError(f"{where}: the codec does not work: {error}") from None
