"""The small parts: parameters with a declared initial distribution, RMSNorm, linear map, table, gated MLP."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig


@dataclass(frozen=True)
class Start:
    """Initial values of a parameter: `fill` + `std` · normal.

    With `first`, the parameter is part of a stack of `whole` slices: its slice [i] is drawn as number first + i.
    """

    std: float = 0.0
    fill: float = 0.0
    first: int | None = None
    whole: int | None = None


class Source(Protocol):
    """Values that parameters begin with instead of drawn ones (`tiphys.pretrain.pretrained`)."""

    def covers(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it has every value of the parameter `name` of the whole model."""
        ...

    def copy(self, name: str, target: Tensor, first: int = 0, whole: int | None = None) -> None:
        """Write what it has into `target`, which holds the rows from `first` on of a parameter with `whole` rows (None: all)."""
        ...


class Module(nn.Module):
    """A module that declares the initial value of its own parameters, so that `initialise` can draw any of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, Start] = {}

    def declare(
        self,
        name: str,
        *shape: int,
        std: float = 0.0,
        fill: float = 0.0,
        first: int | None = None,
        whole: int | None = None,
    ) -> None:
        """Register a parameter; `initialise` draws its values."""
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
        self.starts[name] = Start(std, fill, first, whole)


def initialise(
    module: nn.Module,
    seed: int,
    canonical: Callable[[str], str] = lambda name: name,
    source: Source | None = None,
) -> None:
    """Take the values of every parameter from `source`; draw what it lacks from the seed and the canonical name alone.

    A pipeline stage or an expert rank therefore starts with exactly the weights that the whole model has there.
    `canonical` maps the names of this module's parameters to those of the whole model (`pipeline.canonical_name`).
    """
    for local, parameter, start in declared(module):
        if parameter.is_meta:
            continue
        address = canonical(local)
        whole = (start.whole or len(parameter), *parameter.shape[1:])
        if source is None or not source.covers(address, whole):
            _draw(parameter, seed, address, start)
        if source is not None:
            source.copy(address, parameter, start.first or 0, whole[0])
    copy_buffers(module, canonical, source)


def declared(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Start]]:
    """(name, parameter, initial values) of each declared parameter; tied weights come once, under the first name."""
    done = set()
    for prefix, part in module.named_modules():
        for name, start in part.starts.items() if isinstance(part, Module) else ():
            parameter = getattr(part, name)
            if parameter is not None and id(parameter) not in done:
                done.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter, start


@torch.no_grad()
def initial_range(
    address: str, shape: tuple[int, ...], start: Start, seed: int, source: Source | None, at: int, numel: int
) -> Tensor:
    """The elements [at, at + numel) of a flattened parameter of the whole model, as `initialise` fills them: float32 [numel].

    Only the rows that hold these elements are read from `source`, and only their slices of a stack are drawn.
    """
    width = math.prod(shape[1:])
    first, last = at // width, -(-(at + numel) // width)
    rows = torch.empty(last - first, *shape[1:])
    if source is None or not source.covers(address, shape):
        if start.first is None:
            whole = torch.empty(shape)
            _draw(whole, seed, address, start)
            rows.copy_(whole[first:last])
        else:
            _draw(rows, seed, address, replace(start, first=first))
    if source is not None:
        source.copy(address, rows, first, shape[0])
    return rows.view(-1)[at - first * width :][:numel]


@torch.no_grad()
def copy_buffers(module: nn.Module, canonical: Callable[[str], str], source: Source | None) -> None:
    """Take the values of every saved buffer from `source`, if it has them."""
    if source is not None:
        saved = module.state_dict(keep_vars=True).keys()
        for name, buffer in module.named_buffers():
            if name in saved and not buffer.is_meta:
                source.copy(canonical(name), buffer)


@torch.no_grad()
def _draw(parameter: Tensor, seed: int, address: str, start: Start) -> None:
    if start.first is None:
        _fill(parameter, seed, address, start)
        return
    for i, slice_ in enumerate(parameter):
        _fill(slice_, seed, f"{address}[{start.first + i}]", start)


def _fill(target: Tensor, seed: int, address: str, start: Start) -> None:
    if start.std == 0:
        target.fill_(start.fill)
        return
    values = named_generator(seed, address).standard_normal(target.numel(), dtype=np.float32)
    target.copy_(torch.from_numpy(values).view(target.shape).mul_(start.std).add_(start.fill))


def named_generator(seed: int, address: str) -> np.random.Generator:
    """The random numbers of a seed and a name."""
    digest = hashlib.blake2b(f"{seed}/{address}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


@torch.compiler.assume_constant_result
def cuda_capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device: (8, 0) is Ampere, (9, 0) Hopper."""
    return torch.cuda.get_device_capability(index)


def only_acts() -> bool:
    """Whether this forward pass serves a policy that acts: then nobody reads its losses, and no parameter needs a gradient."""
    return (
        not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    )  # the compiler does not know the second


class Norm(Module):
    """RMSNorm (Zhang and Sennrich 2019) with the mean square in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight: nn.Parameter
        self.declare("weight", size, fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).to(x.dtype) * self.weight


class Linear(Module):
    """x Wᵀ + b with W [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None
        self.declare("weight", outputs, inputs, std=std)
        if bias:
            self.declare("bias", outputs)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Table(Module):
    """A learned embedding [count, size]; indices outside [0, count) are clamped."""

    def __init__(self, count: int, size: int, *, std: float) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.declare("weight", count, size, std=std)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index.clamp(0, self.weight_rows - 1), self.weight)

    @property
    def weight_rows(self) -> int:
        return int(
            getattr(self.weight, "ds_shape", self.weight.shape)[0]
        )  # under ZeRO-3 the shape is empty between uses


class Mlp(Module):
    """SwiGLU (Shazeer 2020): (silu(x G) · x U) D, with G and U in one matrix."""

    def __init__(self, config: DecisionConfig, inner: int) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, 2 * inner, std=config.initializer_range)
        self.down = Linear(inner, config.hidden_size, std=config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.up(x)))


def gated(x: Tensor) -> Tensor:
    """x [N, 2F] = gate and up, side by side -> silu(gate) · up [N, F]."""
    if torch.compiler.is_compiling():  # the compiler fuses this by itself
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return _Gated.apply(x)


class _Gated(torch.autograd.Function):
    """Keeps only x for the backward pass, and writes both halves of the gradient in place instead of concatenating them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        of_gate, of_up = out.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out
