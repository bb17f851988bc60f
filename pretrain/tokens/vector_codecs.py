"""Codecs that give all numbers of a field as one token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.codec import Codec, as_type, flat_numbers, from_unit, mu_law, to_unit
from tiphys.pretrain.tokens.vocabulary import EmbedderSpec

_FAR = 10.0  # standard deviations; values are clamped to it, so that no outlier dominates an embedder


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
        flat = flat_numbers(x, np.float64)
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
        y = to_unit(flat_numbers(x, np.float64), np.asarray(self.low, np.float64), np.asarray(self.high, np.float64))
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
        flat = flat_numbers(x, np.float64)
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
class Histogram(Codec):
    """A histogram as one token, float32 [N, 1, bins]: the share of the values in each bin, from 0 to 1, is left as it is.

    The shares of each entry sum to 1 (Furuta et al. 2022, sec. 4).
    """

    kind: ClassVar[str] = "histogram"

    @property
    def tokens(self) -> int:
        return 1

    def encode(self, x: np.ndarray) -> np.ndarray:
        return np.clip(flat_numbers(x, np.float32), 0, 1)[:, None]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(tokens, np.float32).reshape(len(tokens), *self.shape)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("vector", (int(np.prod(self.shape, dtype=np.int64)),))
