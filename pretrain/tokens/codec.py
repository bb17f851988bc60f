"""Codec: values of a field <-> ids of the vocabulary, or the numbers that an embedder takes. Every codec can decode.

A codec is frozen, can be written as JSON (`to_dict`, `codec_from_dict`), and works on N steps at once. The codecs are those of
Reed et al. 2022, sec. 2.1 and app. B, and those of the compact scheme, in which a whole vector or a small grid is one token.
Values outside a codec's range are clamped, ±inf too. NaN, and discrete values that do not exist, raise `NoEncoding`, which says
at which of the N steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from tiphys.dataio.episode import BadValue, DataError
from tiphys.pretrain.tokens.batch import CONTINUOUS
from tiphys.pretrain.tokens.vocabulary import EmbedderSpec

MU, M = 100.0, 256.0  # mu-law: F(±M) = ±1
NAN = "NaN has no encoding"


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


def flat_numbers(x: np.ndarray, dtype: Any) -> np.ndarray:
    """[N, *shape] -> [N, numbers]; NaN raises NoEncoding."""
    x = np.asarray(x)
    flat = x.reshape(len(x), int(np.prod(x.shape[1:], dtype=np.int64))).astype(dtype or x.dtype, copy=False)
    if x.dtype.kind == "f" and len(x):
        bad = np.isnan(flat).any(axis=1)
        if bad.any():
            raise NoEncoding(int(bad.argmax()), NAN)
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


def counted_integers(x: np.ndarray, low: tuple[int, ...], values: tuple[int, ...]) -> np.ndarray:
    """int32 [N, numbers], counted from the lowest value. Raises NoEncoding if a value is not an integer or out of range."""
    flat = flat_numbers(x, None)
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
