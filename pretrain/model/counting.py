"""Bytes of a forward and a backward pass, counted without computing: the layers run on the meta device, which stores no data.

Every storage that an operation makes is counted from its creation until nothing refers to it, as an allocator would. Three kinds
of operations are replaced, because on the meta device they would take another path than on a real one: fused attention keeps q,
k, v, its output and the logarithms of its sums; products of experts keep their two factors; a convolution copies those of its
tensors whose channels lie in another order than those of the others.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from tiphys.pretrain.model import attention
from tiphys.pretrain.model.embedding import Embedding, TokenTable
from tiphys.pretrain.model.heads import Head, Output
from tiphys.pretrain.model.inputs import scalars
from tiphys.pretrain.model.layers import gated
from tiphys.pretrain.model.moe import MixtureOfExperts
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.model.transformer import Block, build_layers

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

BLOCK = {"cpu": 1, "cuda": 512}  # bytes that an allocator rounds up to
META = torch.device("meta")


@dataclass(frozen=True)
class Pass:
    """Bytes of one micro-batch, without weights.

    inputs     tensors of the batch
    kept       activations and outputs that live between the forward and the backward pass
    forward    peak of the forward pass
    peak       peak of both passes, with the gradients that stay
    again      the same if gradients of an earlier micro-batch are there already, without those; 0: not counted
    gradients  all gradients of the parameters
    """

    inputs: int
    kept: int
    forward: int
    peak: int
    again: int
    gradients: int


NOTHING = Pass(0, 0, 0, 0, 0, 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages on the meta device that are made in its context and still live."""

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block = block
        self.live = self.peak = self._buffer = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def add_once(self, size: int) -> None:
        """Count a buffer that is made now and stays; further calls do nothing."""
        if not self._buffer:
            self._buffer = size
            self.live += size
            self.peak = max(self.peak, self.live)

    def exclude(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these tensors, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, partial(self._gone, storage._cdata, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        workspace = 0
        if func in _CONVOLUTIONS:
            found = _Convolution(func, args, kwargs)
            for copy in found.copies:
                self._see(copy)
            out, workspace = found.out, found.workspace if self.block == BLOCK["cpu"] else 0
        elif func in _NORMS:
            out = _in_order(func(*args, **(kwargs or {})), _order(args[0]))
        elif func is torch.ops.aten._grouped_mm.default:  # on the meta device it knows bfloat16 only
            out = _grouped(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor)
        self.peak = max(self.peak, self.live + workspace)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = _rounded(storage.nbytes(), self.block)
        self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.live -= size


# operation -> how many of its first arguments get one order of channels; the last two of them, input and weights, say which
_CONVOLUTIONS = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}


class _Convolution:
    """A convolution, or its backward pass, as libraries compute it: all 4-d tensors in one order of channels.

    copies     of the arguments in another order; they live while it runs
    workspace  bytes that oneDNN takes beside them on a CPU, at most: weights in its own layout and, if channels come first, the
               images too
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Any) -> None:
        given = args[: _CONVOLUTIONS[func]]
        *images, weights = given
        order = _order(*given[-2:])
        self.copies = [t.contiguous(memory_format=order) for t in given]
        self.out = _in_order(func(*args, **(kwargs or {})), order)
        self.workspace = 2 * weights.nbytes + (order == torch.contiguous_format) * sum(t.nbytes for t in images)
        self.workspace += _BF16_WORKSPACE * (weights.dtype == torch.bfloat16)


_BF16_WORKSPACE = 72 << 10  # bytes; measured with oneDNN of torch 2.13


_NORMS = {torch.ops.aten.native_group_norm.default, torch.ops.aten.native_group_norm_backward.default}


def _in_order(made: Any, order: torch.memory_format) -> Any:
    """The results of an operation, with this order of the channels in images."""
    if isinstance(made, Tensor):
        return torch.empty_like(made, memory_format=order) if made.dim() == 4 else made
    return tuple(_in_order(t, order) for t in made) if isinstance(made, tuple) else made


def _order(*tensors: Tensor) -> torch.memory_format:
    """Channels come last if they do so in one of these images."""
    return torch.channels_last if any(_channels_last(t) for t in tensors) else torch.contiguous_format


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _grouped(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """An empty result: rows [N, A] times [E, A, B] -> [N, B], or [A, N] times [N, B] -> [E, A, B], a product for each expert."""
    shape = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[1])
    return a.new_empty(shape)


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps and makes: q, k, v [n, H, S, d], the output, and float32 [n, H, S]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, heads, length, _ = q.shape
        out = q.new_empty(n, length, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(n, length, heads, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _GroupedProduct(torch.autograd.Function):
    """Each row of x [N, A] times the matrix of its expert, weights [E, A, B] -> [N, B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return x.new_empty(x.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weights)


class _AsOnADevice(TorchFunctionMode):
    """Replaces what would take another path on the meta device. `rows`: of all experts of a layer together."""

    def __init__(self, rows: int, device: str = "") -> None:
        super().__init__()
        self.rows, self.device = rows, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        if func is F.group_norm and self.device == "cpu":  # other devices copy images whose channels come last
            return _group_norm(*args, **(kwargs or {}))
        if func is Tensor.tolist and args[0].is_meta:  # rows of each expert
            each, more = divmod(self.rows, len(args[0]))
            return [each + (i < more) for i in range(len(args[0]))]
        return func(*args, **(kwargs or {}))


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    count, channels, *size = x.shape
    return torch.native_group_norm(x, weight, bias, count, channels, math.prod(size), groups, eps)[0]


class RankExperts(nn.Module):
    """The experts of one rank as `expert_parallel.ShardedExperts` computes them, without other ranks.

    imbalance  rows that arrive, as a multiple of the rows that this rank sends
    """

    def __init__(self, config: DecisionConfig, ranks: int, imbalance: float) -> None:
        super().__init__()
        count, size, inner = config.num_experts // ranks, config.hidden_size, config.moe_intermediate_size
        self.imbalance = min(imbalance, float(ranks))
        self.up = nn.Parameter(torch.empty(count, size, 2 * inner))
        self.down = nn.Parameter(torch.empty(count, inner, size))

    def prepare(self, counts: Tensor) -> Tensor:
        return counts

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        rows = _Exchange.apply(x, max(1, round(len(x) * self.imbalance)))
        order = torch.empty(len(rows), dtype=torch.int64, device=x.device)
        inverse = torch.empty_like(order)
        hidden = gated(_GroupedProduct.apply(rows.index_select(0, order), self.up))
        made = _GroupedProduct.apply(hidden, self.down).index_select(0, inverse)
        return _Exchange.apply(made, len(x))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty(rows, x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(ctx.rows, gradient.shape[1]), None


class Part(nn.Module):
    """Layers [first, last) of a model on the meta device: the whole model, or the stage of a pipeline.

    ranks, imbalance  if experts are divided: among how many ranks, and the rows that arrive (`RankExperts`)
    """

    def __init__(
        self, config: DecisionConfig, first: int = 0, last: int | None = None, *, ranks: int = 1, imbalance: float = 1.0
    ) -> None:
        super().__init__()
        self.config = config
        with META:
            built = build_layers(config)[first:last]
            self.parts = nn.ModuleDict({name.replace(".", "_"): kind(*given) for name, kind, given in built})
            if ranks > 1:
                for mixture in (m for m in self.modules() if isinstance(m, MixtureOfExperts)):
                    mixture.experts = RankExperts(config, ranks, imbalance)
        if config.tie_word_embeddings and {"token", "output"} <= self.parts.keys():
            self.parts["output"].weight = self.parts["token"].weight

    @staticmethod
    def canonical_name(name: str) -> str:
        """The name in the whole model of a parameter of this part."""
        return re.sub(r"^layers_(\d+)\.", r"layers.\1.", name.removeprefix("parts."))

    def forward(self, x: Any, inputs: Mapping[str, Tensor], layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """x [T, D] from the stage before, None for the first one -> the loss or [T, D], and the hidden states."""
        rows = len(inputs["attributes"]) * self.config.num_experts_per_tok

        def mode() -> tuple[Any, Any]:  # autograd leaves the modes of functions while it recomputes
            return nullcontext(), _AsOnADevice(rows)

        loss: Any = None
        sums: Any = None
        hidden: Any = None
        for layer in self.parts.values():
            if isinstance(layer, TokenTable):
                x = layer(inputs["tokens"])
            elif isinstance(layer, Embedding):
                x = layer(x, inputs)
            elif isinstance(layer, Block):
                again = self.config.checkpointing
                x = checkpoint(layer, x, layout, use_reentrant=False, context_fn=mode) if again else layer(x, layout)
            elif isinstance(layer, Head):
                hidden, loss, sums = layer(x, inputs, layout)
            elif isinstance(layer, Output):
                return layer(hidden, loss, sums, inputs, layout)[0], hidden
        assert x is not None
        return x, x


def count_pass(
    part: Part,
    inputs: Mapping[str, Tensor],
    *,
    device: str = "cpu",
    stay: bool = True,
    bucket: int = 0,
    again: bool = True,
) -> Pass:
    """Count the passes of one micro-batch.

    Parameters
    ----------
    part : Part
        In the dtype in which it is trained.
    inputs : mapping of str to Tensor
        From `inputs.to_tensors`, on any device.
    device : str
        `cpu` or `cuda`: where the passes are to run.
    stay : bool
        False: a gradient goes as soon as it is made, because it is copied to a bucket.
    bucket : int
        Bytes of a buffer that is made with the first gradient and stays.
    again : bool
        Also count a later micro-batch, which takes as long again.

    Returns
    -------
    Pass
    """
    meta = {name: t if name == "windows" else t.to(META) for name, t in inputs.items()}
    trained = [p for p in part.parameters() if p.requires_grad]
    block = BLOCK[device]
    counter = _Counter(part, meta, device)
    first = LiveBytes(block)
    hooks = [p.register_post_accumulate_grad_hook(_Gradient(first, bucket, stay)) for p in trained]
    kept, forward = counter.run(first)
    for hook in hooks:
        hook.remove()
    later = LiveBytes(block)
    if again:
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained] if not stay else []
        later.exclude([p.grad for p in trained if p.grad is not None])
        counter.run(later)
        for hook in hooks:
            hook.remove()
    part.zero_grad(set_to_none=True)
    return Pass(
        inputs=sum(_rounded(t.nbytes, block) for t in meta.values()),
        kept=kept,
        forward=forward,
        peak=first.peak,
        again=later.peak,
        gradients=sum(_rounded(p.nbytes, block) for p in trained),
    )


class _Counter:
    """Runs the passes of a part on the meta device."""

    def __init__(self, part: Part, inputs: Mapping[str, Tensor], device: str) -> None:
        self.part, self.inputs, self.device = part.train(), inputs, device
        self.tokens = len(inputs["attributes"])

    def run(self, mode: LiveBytes) -> tuple[int, int]:
        """(bytes that live between the passes, peak of the forward pass). The peak of both is that of `mode`."""
        config = self.part.config
        mode.exclude([*self.part.parameters(), *self.part.buffers(), *self.inputs.values()])
        for mixture in (m for m in self.part.modules() if isinstance(m, MixtureOfExperts)):
            mixture.counts = mixture.losses = None
        x = None
        with _as_on(self.device), _AsOnADevice(self.tokens * config.num_experts_per_tok, self.device), mode:
            if "token" not in self.part.parts:
                x = torch.empty(self.tokens, config.hidden_size, dtype=_dtype(self.part), device=META)
                x.requires_grad_()
            layout = TokenLayout(self.inputs["windows"], self.inputs["attributes"], scalars(1.0, 1.0, 1.0, META))
            out, hidden = self.part(x, self.inputs, layout)
            kept, forward = mode.live, mode.peak
            out.backward(torch.empty_like(out))
            del hidden  # the engine holds it until here
        return kept, forward


class _Gradient:
    """What happens when a gradient is there: the first one makes the bucket, and if it does not stay, it goes."""

    def __init__(self, mode: LiveBytes, bucket: int, stay: bool) -> None:
        self.mode, self.bucket, self.stay = mode, bucket, stay

    def __call__(self, parameter: Tensor) -> None:
        self.mode.add_once(self.bucket)
        if not self.stay:
            parameter.grad = None


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _rounded(size: int, block: int) -> int:
    return -(-size // block) * block


def _dtype(part: Part) -> torch.dtype:
    return next(part.parameters()).dtype


@contextmanager
def _as_on(device: str) -> Iterator[None]:
    """On CUDA, attention of every length is fused."""
    before: Callable[..., Any] | dict[torch.dtype, int] = attention.SHORT
    attention.SHORT = {} if device == "cuda" else attention.SHORT
    try:
        yield
    finally:
        attention.SHORT = before  # type: ignore[assignment]
