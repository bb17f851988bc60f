"""Rotary frequencies (Su et al. 2021), and three ways to stretch them for windows longer than those of an earlier training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import number

# Numbers that each type has beside the base, with their least and greatest values
_NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "default": {},
    "linear": {"factor": (1e-3, 1e6)},
    "llama3": {
        "factor": (1e-3, 1e6),
        "original_length": (1, 1e9),
        "low_frequency": (1e-6, 1e6),
        "high_frequency": (1e-6, 1e6),
    },
    "yarn": {
        "factor": (1e-3, 1e6),
        "original_length": (1, 1e9),
        "beta_fast": (1e-6, 1e6),
        "beta_slow": (1e-6, 1e6),
        "attention_factor": (0, 1e3),
    },
}
TYPES = tuple(_NUMBERS)


@dataclass(frozen=True)
class Rope:
    """How positions turn the queries and keys of a head.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    type : str
        ``default``; ``linear``: all frequencies ÷ `factor` (Chen et al. 2023); ``llama3``: low ones only (Dubey et al. 2024);
        ``yarn`` (Peng et al. 2023).
    factor : float
        How many times longer the windows are than those of the earlier training.
    original_length : int
        Positions of the earlier training's windows.
    low_frequency, high_frequency : float
        ``llama3``: turns over `original_length` below which a frequency is divided, and above which it is kept.
    beta_fast, beta_slow : float
        ``yarn``: turns over `original_length` above which a frequency is kept, and below which it is divided.
    attention_factor : float
        ``yarn``: factor of queries and of keys; 0: 0.1 · ln `factor` + 1.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_length: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    @classmethod
    def of(cls, theta: float, values: Mapping[str, Any]) -> Rope:
        """From a config's base and its `rope`. Raises DataError if that is not what `values` returns."""
        kind = values.get("type", "default")
        if kind not in TYPES:
            raise DataError(f"config: rope has the type {kind!r}; allowed: {', '.join(TYPES)}")
        if unknown := sorted(set(values) - {"type", *_NUMBERS[kind]}):
            raise DataError(f"config: rope of type {kind} has no {unknown[0]!r}; allowed: {', '.join(_NUMBERS[kind])}")
        for name, (least, most) in _NUMBERS[kind].items():
            if name in values:
                number(values[name], f"config: rope, {name}", least, most)
        made = cls(theta=theta, **values)
        if kind == "llama3" and made.low_frequency >= made.high_frequency:
            raise DataError("config: rope, low_frequency is not below high_frequency")
        return made

    def values(self) -> dict[str, Any]:
        """What a config stores beside the base: the type and its numbers; empty for the default."""
        if self.type == "default":
            return {}
        return {"type": self.type, **{name: asdict(self)[name] for name in _NUMBERS[self.type]}}

    @property
    def scale(self) -> float:
        """Factor of the queries and of the keys."""
        if self.type != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)

    def frequencies(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """Radians per position of each pair of a head of `size` numbers: float32 [size / 2]."""
        plain = self.theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
        if self.type == "default":
            return plain
        if self.type == "linear":
            return plain / self.factor
        if self.type == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            kept = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        else:
            first, last = self._pair(self.beta_fast, size), self._pair(self.beta_slow, size)
            first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
            pairs = torch.arange(size // 2, device=device, dtype=torch.float32)
            kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
        return plain * kept + plain / self.factor * (1 - kept)

    def _pair(self, turns: float, size: int) -> float:
        """The pair, as a real number, that turns that often over `original_length`."""
        return size * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def recipe_rope(model: Any) -> Rope:
    """From the recipe's `model:` section: `rope`, with `rope_theta` as the base if `rope.theta` is 0."""
    given = {f.name: getattr(model.rope, f.name) for f in fields(Rope)}
    numbers = {name: given[name] for name in _NUMBERS[model.rope.type]}
    return Rope(**{**numbers, "theta": model.rope.theta or model.rope_theta, "type": model.rope.type})
