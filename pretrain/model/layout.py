"""Layout: which ranges of the compact tokens attend to each other, worked out once a batch and shared by all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiphys.pretrain.model.inputs import from_bits, to_device

_PARTS = 8  # length classes an octave: a window is padded by less than 1/8


@dataclass(frozen=True)
class Group:
    """Windows of one length class: tokens [start, stop), n windows, each padded to `length`.

    slots   int64 [n · length]: the token (from `start`) in each slot, any token in a padding slot; None: no padding
    places  int64 [stop − start]: the slot of each token; None: no padding
    lengths int64 [n] on the device; None: no padding
    """

    start: int
    stop: int
    windows: int
    length: int
    causal: bool
    slots: Tensor | None = None
    places: Tensor | None = None
    lengths: Tensor | None = None


def length_class(lengths: np.ndarray) -> np.ndarray:
    """Lengths up to 8 stand alone; above, eight classes an octave."""
    octave = np.floor(np.log2(np.maximum(lengths, 1)))
    width = np.maximum(2.0**octave / _PARTS, 1)
    return np.ceil(lengths / width) * width


def group_windows(windows: np.ndarray, device: torch.device) -> list[Group]:
    """Groups of `windows` [W, 2] (length, causal), which are sorted by causal, then length."""
    length, causal = windows[:, 0].astype(np.int64), windows[:, 1].astype(bool)
    first = np.cumsum(length) - length
    kind = length_class(length) * 2 + causal
    heads = np.flatnonzero(np.diff(kind, prepend=-1))
    groups = []
    for a, b in zip(heads, [*heads[1:], len(length)], strict=True):
        sizes, start = length[a:b], int(first[a])
        widest, stop = int(sizes.max()), int(first[b - 1] + length[b - 1])
        group = Group(start, stop, int(b - a), widest, bool(causal[a]))
        if (sizes != widest).any():
            begin = (first[a:b] - start)[:, None]
            slots = np.minimum(begin + np.arange(widest), begin + sizes[:, None] - 1).reshape(-1)
            places = np.arange(stop - start) + np.repeat(np.arange(b - a) * widest - begin[:, 0], sizes)
            parts = [to_device(torch.from_numpy(x), device) for x in (slots, places, sizes)]
            group = Group(start, stop, int(b - a), widest, bool(causal[a]), *parts)
        groups.append(group)
    return groups


@dataclass
class Layout:
    """What every layer asks of a batch beside the hidden states.

    windows      int32 [W, 2] on the CPU (lengths, causal)
    attributes   int32 [T, 4]: position, modality, task, the router's task + 1
    scalars      int32 [3], bits of float32: normaliser, global number of real tokens, scale of the auxiliary gradient
    auxiliary    layer -> float32 [2], its balance and z-loss, detached
    seen         layers whose statistics have counted this batch: a recomputed forward must not count it twice

    What follows from these is worked out once. `torch.compile` traces all of it but the arithmetic on windows, in NumPy.
    """

    windows: Tensor
    attributes: Tensor
    scalars: Tensor
    auxiliary: dict[int, Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    _known: dict[Any, Any] = field(default_factory=dict)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @property
    def device(self) -> torch.device:
        return self.attributes.device

    @property
    def modality(self) -> Tensor:
        return self.attributes[:, 1]

    @property
    def task(self) -> Tensor:
        return self.attributes[:, 2]

    @property
    def route(self) -> Tensor:
        return self.attributes[:, 3]

    @property
    def divisors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normaliser, global number of tokens, auxiliary scale: float32 scalars on the device.

        A global batch without any target or token has sums of zero; they stay zero instead of 0 / 0.
        """
        return self._once("divisors", self._divisors)

    def _divisors(self) -> tuple[Tensor, ...]:
        numbers = from_bits(self.scalars)
        return numbers.where(numbers != 0, torch.ones_like(numbers)).unbind()

    @property
    def groups(self) -> list[Group]:
        return self._once("groups", lambda: group_windows(self.windows.numpy(), self.device))

    @property
    def real(self) -> Tensor:
        """bool [T]: False only for the stand-in of a batch without tokens."""
        return self._once("real", lambda: self.modality > 0)

    @property
    def cumulative(self) -> list[tuple[int, int, int, bool, Tensor]]:
        """For variable-length kernels: (start, stop, longest, causal, cumulative lengths int32 [n + 1]) by causality."""
        return self._once("cumulative", self._cumulative)

    @torch.compiler.disable
    def _cumulative(self) -> list[tuple[int, int, int, bool, Tensor]]:
        out, start = [], 0
        table = self.windows.numpy()
        for causal in (True, False):
            lengths = table[table[:, 1] == causal, 0]
            if len(lengths):
                ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                stop = start + int(ends[-1])
                out.append((start, stop, int(lengths.max()), causal, to_device(torch.from_numpy(ends), self.device)))
                start = stop
        return out

    def rotary(self, size: int, theta: float) -> Tensor:
        """Cosine and sine of position · frequency, float32 [T, 1, size / 2, 2] (Su et al. 2021)."""
        return self._once(("rotary", size, theta), lambda: self._rotary(size, theta))

    def _rotary(self, size: int, theta: float) -> Tensor:
        frequency = theta ** (-torch.arange(0, size, 2, device=self.device, dtype=torch.float32) / size)
        angle = self.attributes[:, :1].float() * frequency
        return torch.stack([angle.cos(), angle.sin()], -1)[:, None]

    def once(self, layer: int) -> bool:
        """True the first time that `layer` asks."""
        if layer in self.seen:
            return False
        self.seen.add(layer)
        return True
