"""Attention within packed windows: no L × L mask, and padding only inside a length class."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiphys.pretrain.model.layers import Linear, Module, Norm, cuda_capability
from tiphys.pretrain.model.rope import Rope
from tiphys.pretrain.model.token_layout import Group, TokenLayout

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.key_value_cache import Extension

# Up to this window length, plain matrix products are faster than the fused kernel (forward and backward, one CPU thread,
# head size 64). At length 1024 the fused kernel is 2.5 times (bfloat16) to 3.7 times (float32) faster.
SHORT = {torch.float32: 12, torch.bfloat16: 128}

# The kernel's arguments depend on the PyTorch release: 2.10 has `is_causal`, 2.11 `window_size`, 2.12 also `enable_gqa`.
try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # a published policy also runs with an older PyTorch
    VARLEN = frozenset()


class Attention(Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions (Su et al. 2021), within the windows of a layout."""

    def __init__(self, config: DecisionConfig, number: int) -> None:
        super().__init__()
        self.number, self.rope = number, Rope.of(config.theta, config.rope)
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_size
        together = (self.heads + 2 * self.kv_heads) * self.size
        self.qkv = Linear(config.hidden_size, together, std=config.initializer_range, bias=config.qkv_bias)
        self.q_norm = Norm(self.size, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = Norm(self.size, config.norm_epsilon) if config.qk_norm else None
        self.out = Linear(self.heads * self.size, config.hidden_size, std=config.residual_std)

    def forward(self, x: Tensor, layout: TokenLayout, cache: Extension | None = None) -> Tensor:
        """x [T, D] -> [T, D]."""
        qkv = self.qkv(x).view(x.shape[0], self.heads + 2 * self.kv_heads, self.size)
        rotated, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:  # of each head (Henry et al. 2020)
            q, k = rotated.split([self.heads, self.kv_heads], 1)
            rotated = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        q, k = rotate(rotated, layout.rotary(self.size, self.rope)).split([self.heads, self.kv_heads], 1)
        if cache is not None:
            mixed = cache.attend(self.number, q, k, v, layout)
        elif _has_varlen(q):
            mixed = varlen_attention(q, k, v, layout)
        else:
            mixed = grouped_attention(q, k, v, layout)
        return self.out(mixed.reshape(x.shape[0], -1))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate neighbouring pairs of each head: x [T, H, d], turn float32 [T, 1, d / 2, 2] -> [T, H, d]. Computed in float32.

    On a CPU one complex product takes a third of the time of real products. The compiler does not know complex products.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cosine, sine) = pairs.unbind(-1), turn.unbind(-1)
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(turn)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@torch.compiler.disable  # length classes differ from batch to batch
def grouped_attention(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """q [T, H, d], k and v [T, K, d] -> [T, H, d]. Length classes are computed one after another."""
    parts = []
    for group in layout.groups:
        tokens = slice(group.start, group.stop)
        padded = (_pad(t[tokens], group) for t in (q, k, v))
        lengths = None if group.causal else group.lengths
        mixed = attend(*padded, causal=group.causal, lengths=lengths, prefix=group.prefix)
        mixed = mixed.reshape(-1, *q.shape[1:])
        parts.append(mixed if group.places is None else mixed.index_select(0, group.places))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pad(x: Tensor, group: Group) -> Tensor:
    """Tokens of a group [t, H, d] -> [n, length, H, d]. A padding slot repeats its window's last token."""
    if group.slots is not None:
        x = _Spread.apply(x, group.slots, group.places)
    return x.view(group.windows, group.length, *x.shape[1:])


class _Spread(torch.autograd.Function):
    """x[slots]. Padding slots have no gradient, so the backward pass is a gather too, instead of an atomic sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    lengths: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Softmax(q kᵀ / √d) v over windows of equal length: q [n, S, H, d], k, v [n, Z, K, d] -> [n, S, H, d].

    With `causal`, the queries are the last S of the Z positions. `lengths` [n] hides the keys after a window's end; a causal
    mask already hides them from every real query. `prefix` [n]: the first keys of a causal window, which all queries see.
    """
    n, s, heads, size = q.shape
    z, kv_heads = k.shape[1:3]
    mask = None
    if causal and s > 1:
        mask = torch.ones(s, z, dtype=torch.bool, device=q.device).tril(z - s)
    if prefix is not None and mask is not None:
        mask = mask | (torch.arange(z, device=q.device) < prefix[:, None, None])
        mask = mask[:, None]
    if lengths is not None:
        mask = (torch.arange(z, device=q.device) < lengths[:, None])[:, None, None, :]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda or z > SHORT.get(q.dtype, 0):
        plain_causal = causal and s == z and s > 1 and prefix is None
        share = {"enable_gqa": True} if heads != kv_heads else {}
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if plain_causal else mask, is_causal=plain_causal, **share
        )
        return out.transpose(1, 2)
    # Query heads that share keys become additional queries, so that keys are never copied.
    q = q.reshape(n, kv_heads, heads // kv_heads, s, size)
    scores = (q * size**-0.5) @ k.unsqueeze(2).transpose(-1, -2)  # [n, K, H / K, S, Z]
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask.unsqueeze(1)), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v.unsqueeze(2)).reshape(n, heads, s, size).transpose(1, 2)


def _has_varlen(q: Tensor) -> bool:
    """Whether PyTorch's variable-length flash kernel takes these heads."""
    return (
        q.is_cuda
        and bool(VARLEN)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and cuda_capability(q.device.index) >= (8, 0)
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """Like `grouped_attention`, with the variable-length flash kernel: one call for causal windows, one for the others."""
    options: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in VARLEN:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    parts = []
    for start, stop, longest, causal, ends in layout.cumulative:
        a, b, c = (t[start:stop].contiguous() for t in (q, k, v))
        if "window_size" in VARLEN:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            options["is_causal"] = causal
        mixed = varlen_attn(a, b, c, ends, ends, longest, longest, **options)
        assert isinstance(mixed, Tensor)  # it would be a tuple only if more outputs were requested
        parts.append(mixed)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if (prefixes := layout.prefixes) is not None:
        # A position behind a prefix sees all of it anyway; those of the prefix are computed once more, by themselves.
        tokens, longest, ends = prefixes
        options |= {"window_size": (-1, -1)} if "window_size" in VARLEN else {"is_causal": False}
        a, b, c = (t.index_select(0, tokens) for t in (q, k, v))
        again = varlen_attn(a, b, c, ends, ends, longest, longest, **options)
        assert isinstance(again, Tensor)
        out = out.index_copy(0, tokens, again)
    return out
