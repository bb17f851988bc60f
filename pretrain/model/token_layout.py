"""TokenLayout: which ranges of a batch's tokens attend to each other. Computed once for each batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiphys.pretrain.model.bits import from_bits
from tiphys.pretrain.model.inputs import to_device
from tiphys.pretrain.model.rope import Rope

_PARTS = 8  # length classes in each octave: a window is padded by less than 1/8 of its length


@dataclass(frozen=True)
class Group:
    """Windows of one length class: n windows in the tokens [start, stop), each padded to `length` slots.

    slots    int64 [n · length]: the token in each slot, counted from `start`; a padding slot holds any token of its window
    places   int64 [stop − start]: the slot of each token
    lengths  int64 [n]: the length of each window, on the device
    prefix   int64 [n]: for causal windows, how many of the first positions see each other, on the device; None: none

    The first three are None if no window needs padding.
    """

    start: int
    stop: int
    windows: int
    length: int
    causal: bool
    slots: Tensor | None = None
    places: Tensor | None = None
    lengths: Tensor | None = None
    prefix: Tensor | None = None


def length_class(lengths: np.ndarray) -> np.ndarray:
    """Round lengths up to their class. Each length up to 16 is its own class; above, every octave has eight classes."""
    octave = np.floor(np.log2(np.maximum(lengths, 1)))
    width = np.maximum(2.0**octave / _PARTS, 1)
    return np.ceil(lengths / width) * width


def group_windows(windows: np.ndarray, device: torch.device) -> list[Group]:
    """Groups of `windows` [W, 3] (length, causal, prefix), which must be sorted as `inputs.to_tensors` does."""
    length, causal = windows[:, 0].astype(np.int64), windows[:, 1].astype(bool)
    first = np.cumsum(length) - length
    kind = length_class(length) * 4 + causal * 2 + (windows[:, 2] > 0)
    heads = np.flatnonzero(np.diff(kind, prepend=-1))
    groups = []
    for a, b in zip(heads, [*heads[1:], len(length)], strict=True):
        sizes, start = length[a:b], int(first[a])
        widest, stop = int(sizes.max()), int(first[b - 1] + length[b - 1])
        parts: list[Tensor | None] = [None, None, None]
        if (sizes != widest).any():
            begin = (first[a:b] - start)[:, None]
            slots = np.minimum(begin + np.arange(widest), begin + sizes[:, None] - 1).reshape(-1)
            places = np.arange(stop - start) + np.repeat(np.arange(b - a) * widest - begin[:, 0], sizes)
            parts = [to_device(torch.from_numpy(x), device) for x in (slots, places, sizes)]
        ahead = windows[a:b, 2].astype(np.int64)
        prefix = to_device(torch.from_numpy(ahead), device) if ahead.any() else None
        groups.append(Group(start, stop, int(b - a), widest, bool(causal[a]), parts[0], parts[1], parts[2], prefix))
    return groups


@dataclass
class TokenLayout:
    """What every layer needs to know of a batch, besides the hidden states.

    windows      int32 [W, 3] on the CPU: length of each window, whether it is causal, and the length of its prefix
    attributes   int32 [T, 4]: position, modality, task, and the task + 1 as the router sees it (0: hidden)
    scalars      int32 [3], the bits of float32: normaliser, real tokens of the global batch, scale of the auxiliary gradient
    auxiliary    layer -> float32 [2], its balance loss and z-loss, detached
    seen         layers that have counted this batch; a forward pass that is recomputed must not count it again

    Everything that follows from these is computed once. `torch.compile` traces all of it except the NumPy arithmetic on
    windows.
    """

    windows: Tensor
    attributes: Tensor
    scalars: Tensor
    auxiliary: dict[int, Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    _known: dict[Any, Any] = field(default_factory=dict)

    def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
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
        """Normaliser, real tokens of the global batch, auxiliary scale: float32 scalars on the device.

        Zeros become ones: in a global batch without targets or tokens the sums are zero, and 0 / 0 would be NaN.
        """
        return self._cached("divisors", self._divisors)

    def _divisors(self) -> tuple[Tensor, ...]:
        numbers = from_bits(self.scalars)
        return numbers.where(numbers != 0, torch.ones_like(numbers)).unbind()

    @property
    def groups(self) -> list[Group]:
        return self._cached("groups", lambda: group_windows(self.windows.numpy(), self.device))

    @property
    def real(self) -> Tensor:
        """bool [T]: False only for the placeholder token of a batch without tokens."""
        return self._cached("real", lambda: self.modality > 0)

    @property
    def cumulative(self) -> list[tuple[int, int, int, bool, Tensor]]:
        """For the variable-length kernel: (start, stop, longest, causal, cumulative lengths int32 [n + 1]), causal first."""
        return self._cached("cumulative", self._cumulative)

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
        self._known["prefixes"] = self._prefixes()  # both leave a compiled graph, so they do it together
        return out

    @property
    def prefixes(self) -> tuple[Tensor, int, Tensor] | None:
        """For the variable-length kernel: the tokens of all prefixes, int64 [p]; the longest; cumulative lengths, int32 [n + 1].

        None if no window has a prefix.
        """
        return self._cached("prefixes", self._prefixes)

    @torch.compiler.disable
    def _prefixes(self) -> tuple[Tensor, int, Tensor] | None:
        table = self.windows.numpy().astype(np.int64)
        mine = table[:, 2] > 0
        if not mine.any():
            return None
        size, first = table[mine, 2], (np.cumsum(table[:, 0]) - table[:, 0])[mine]
        ends = np.concatenate([[0], np.cumsum(size)])
        tokens = np.arange(ends[-1]) + np.repeat(first - ends[:-1], size)
        parts = [to_device(torch.from_numpy(x), self.device) for x in (tokens, ends.astype(np.int32))]
        return parts[0], int(size.max()), parts[1]

    def rotary(self, size: int, rope: Rope) -> Tensor:
        """Rotary angles (Su et al. 2021): cosine and sine of position · frequency, float32 [T, 1, size / 2, 2]."""
        return self._cached(("rotary", size, rope), lambda: self._rotary(size, rope))

    def _rotary(self, size: int, rope: Rope) -> Tensor:
        angle = self.attributes[:, :1].float() * rope.frequencies(size, self.device)
        turn = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        return turn if rope.scale == 1 else turn * rope.scale

    def first_pass(self, layer: int) -> bool:
        """True at the first call for `layer`, False at later ones (when its forward pass is recomputed)."""
        if layer in self.seen:
            return False
        self.seen.add(layer)
        return True
