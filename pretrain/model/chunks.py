"""Heads that predict chunks of actions: their mean, their median, or draws by flow matching."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiphys.pretrain.model.bits import from_bits
from tiphys.pretrain.model.layers import Module

_FREQUENCIES = 32  # of the embedding of time
_PER_BLOCK = 3  # shift, scale and gate


def payload_size(head: Mapping[str, Any]) -> int:
    """Columns of a target: number of actions, actions, then the noise of every draw and the times."""
    size = head["steps"] * head["entries"]
    return 1 + size + head.get("draws", 0) * (size + 1)


def make_head(head: Mapping[str, Any], size: int, std: float) -> ChunkHead:
    """The head of a config's `chunks`, on hidden states of `size` numbers; `std` is that of its linear maps at the start."""
    return FlowHead(head, size, std) if head["loss"] == "flow" else MeanHead(head, size, std)


class ChunkHead(Module):
    """A head that predicts chunks of `steps` actions with `entries` numbers.

    With `insulate` bins it does not train the hidden states. A linear map does, which predicts the bin of each number by itself.
    That map is not used for acting (knowledge insulation, Driess et al. 2025).
    """

    def __init__(self, head: Mapping[str, Any], size: int, std: float) -> None:
        super().__init__()
        self.steps, self.entries = int(head["steps"]), int(head["entries"])
        self.kind, self.draws, self.euler = head["loss"], int(head.get("draws", 0)), int(head.get("euler", 0))
        self.bins = int(head.get("insulate", 0))
        if self.bins:
            self.bins_weight: nn.Parameter
            self.bins_bias: nn.Parameter
            self.declare("bins_weight", self.steps * self.entries * self.bins, size, std=std)
            self.declare("bins_bias", self.steps * self.entries * self.bins)

    def forward(self, hidden: Tensor, payload: Tensor) -> Tensor:
        """Normed hidden states [n, D], int32 payload [n, payload_size] -> the loss of each chunk, float32 [n]."""
        if not self.bins:
            return self.losses(hidden, payload)
        return self.losses(hidden.detach(), payload) + self.bin_losses(hidden, payload)

    def losses(self, hidden: Tensor, payload: Tensor) -> Tensor:
        """What the head itself learns: as `forward`."""
        raise NotImplementedError

    def bin_losses(self, hidden: Tensor, payload: Tensor) -> Tensor:
        """The mean cross-entropy of the bins of a chunk's numbers, which divide [-1, 1] evenly: as `forward`."""
        actions, mask, _, _ = self.unpack(payload)
        logits = F.linear(hidden, self.bins_weight, self.bins_bias).float().view(*actions.shape, self.bins)
        bins = ((actions + 1) * (self.bins / 2)).floor().clamp(0, self.bins - 1).to(torch.int64)
        each = F.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none").view(actions.shape)
        return (each * mask).sum(-1) / mask.sum(-1)

    def predict(self, hidden: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normed hidden states [n, D] -> chunks, float32 [n, steps · entries]. No module is called, so no hook runs."""
        raise NotImplementedError

    def errors(self, hidden: Tensor, payload: Tensor) -> Tensor:
        """The mean |error| over the actions that there are, float64 [n]. The first noise of the payload is used."""
        actions, mask, noise, _ = self.unpack(payload)
        found = self.predict(hidden, noise[:, 0] if self.draws else None)
        return ((found - actions).abs() * mask).sum(-1).double() / mask.sum(-1)

    def unpack(self, payload: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions [n, N], mask of those that there are [n, N], noise [n, draws, N] and times [n, draws]; all float32."""
        size = self.steps * self.entries
        values = from_bits(payload[:, 1:])
        there = torch.arange(self.steps, device=payload.device) < payload[:, :1]
        mask = there.float().repeat_interleave(self.entries, dim=1)
        noise = values[:, size : size + self.draws * size].reshape(len(values), self.draws, size)
        return values[:, :size], mask, noise, values[:, size + self.draws * size :]

    def empty(self, device: torch.device) -> Tensor:
        """A payload of one chunk without meaning."""
        columns = 1 + self.steps * self.entries * (1 + self.draws) + self.draws
        payload = torch.zeros(1, columns, dtype=torch.int32, device=device)
        payload[:, 0] = 1
        return payload


class MeanHead(ChunkHead):
    """A linear map. `l2` learns the mean of the chunks that may follow, `l1` the median of each number."""

    def __init__(self, head: Mapping[str, Any], size: int, std: float) -> None:
        super().__init__(head, size, std)
        self.weight: nn.Parameter
        self.bias: nn.Parameter
        self.declare("weight", self.steps * self.entries, size, std=std)
        self.declare("bias", self.steps * self.entries)

    def losses(self, hidden: Tensor, payload: Tensor) -> Tensor:
        actions, mask, _, _ = self.unpack(payload)
        error = self.predict(hidden) - actions
        error = error.abs() if self.kind == "l1" else error.square()
        return (error * mask).sum(-1) / mask.sum(-1)

    def predict(self, hidden: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.linear(hidden, self.weight, self.bias).float()


class FlowHead(ChunkHead):
    """Flow matching (Lipman et al. 2023) with residual adaLN-zero blocks (Peebles and Xie 2023).

    At time t, a chunk a is t · noise + (1 − t) · a, and the head learns the velocity noise − a. It draws a chunk by following the
    velocity from noise at time 1 to time 0, in `euler` equal steps. The condition, hidden state and time, only scales, shifts and
    gates what the blocks do; with a plain MLP instead, two modes are not told apart.

    All parameters belong to this module, so it can be computed without hooks.
    """

    def __init__(self, head: Mapping[str, Any], size: int, std: float) -> None:
        super().__init__(head, size, std)
        self.out_weight: nn.Parameter
        width, numbers = int(head["width"]), self.steps * self.entries
        self.width, self.depth = width, int(head["depth"])
        self._matrix("inputs", width, numbers, numbers**-0.5)
        self._matrix("condition", width, size, size**-0.5)
        self._matrix("time", width, 2 * _FREQUENCIES, (2 * _FREQUENCIES) ** -0.5)
        for i in range(self.depth):
            self._matrix(f"up{i}", 2 * width, width, width**-0.5)
            self._matrix(f"down{i}", width, 2 * width, (2 * width) ** -0.5)
        self._matrix("adapt", (_PER_BLOCK * self.depth + 2) * width, width, 0.0)
        self._matrix("out", numbers, width, 0.0)

    def _matrix(self, name: str, outputs: int, inputs: int, std: float) -> None:
        self.declare(f"{name}_weight", outputs, inputs, std=std)
        self.declare(f"{name}_bias", outputs)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

    def losses(self, hidden: Tensor, payload: Tensor) -> Tensor:
        actions, mask, noise, time = self.unpack(payload)
        t, a = time[..., None], actions[:, None]
        error = self.velocity(hidden, t * noise + (1 - t) * a, time) - (noise - a)
        return (error.square() * mask[:, None]).sum(-1).mean(-1) / mask.sum(-1)

    def velocity(self, hidden: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Hidden states [n, D], noisy chunks [n, draws, N], times [n, draws] -> velocities, float32 [n, draws, N]."""
        dtype = self.out_weight.dtype
        angle = time[..., None] * torch.exp(
            torch.arange(_FREQUENCIES, device=time.device) * (math.log(1000.0) / (_FREQUENCIES - 1))
        )
        waves = torch.cat([angle.sin(), angle.cos()], -1).to(dtype)
        condition = F.silu(self._linear("condition", hidden.to(dtype))[:, None] + self._linear("time", waves))
        parts = self._linear("adapt", condition).chunk(_PER_BLOCK * self.depth + 2, -1)
        h = self._linear("inputs", x.to(dtype))
        for i in range(self.depth):
            shift, scale, gate = parts[_PER_BLOCK * i : _PER_BLOCK * (i + 1)]
            y = F.layer_norm(h, (self.width,)) * (1 + scale) + shift
            h = h + gate * self._linear(f"down{i}", F.silu(self._linear(f"up{i}", y)))
        shift, scale = parts[-2:]
        return self._linear("out", F.layer_norm(h, (self.width,)) * (1 + scale) + shift).float()

    def predict(self, hidden: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        x = noise[:, None].float()
        for step in range(self.euler):
            time = torch.full(x.shape[:2], 1 - step / self.euler, device=x.device)
            x = x - self.velocity(hidden, x, time) / self.euler
        return x[:, 0]
