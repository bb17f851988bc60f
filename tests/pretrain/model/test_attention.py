"""Attention within windows against a full mask, and groups of windows."""

import inspect

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model import attention as module
from tiphys.pretrain.model.attention import Attention, grouped_attention
from tiphys.pretrain.model.inputs import scalars, to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.token_layout import TokenLayout, group_windows, length_class


def masked_attention(q, k, v, windows):
    """The oracle: one T × T mask."""
    lengths, causal, prefix = torch.as_tensor(windows).unbind(1)
    window = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    order = torch.arange(len(window))
    ahead = order < (lengths.cumsum(0) - lengths + prefix)[window]
    seen = (order[:, None] >= order) | ~causal.bool()[window][:, None] | (ahead[:, None] & ahead)
    mask = (window[:, None] == window) & seen
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def make_windows(lengths, causal, prefix=0):
    """`prefix`: share of the causal windows that have one."""
    lengths, causal = np.asarray(lengths), np.asarray(causal, bool)
    ahead = np.where(causal & (np.arange(len(lengths)) % 10 < 10 * prefix), (lengths + 1) // 2, 0)
    order = np.lexsort((lengths, ahead > 0, ~causal))
    return np.stack([lengths, causal, ahead], -1)[order].astype(np.int32)


@pytest.mark.parametrize("short", [0, 1000], ids=["fused", "plain"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_within_windows_equals_a_full_mask(monkeypatch, short, kv_heads):
    monkeypatch.setattr(module, "SHORT", {torch.float32: short})
    g = np.random.default_rng(kv_heads)
    windows = make_windows(g.integers(1, 70, 30), g.random(30) < 0.6, prefix=0.5)
    tokens = int(windows[:, 0].sum())
    layout = TokenLayout(torch.from_numpy(windows), torch.zeros(tokens, 4, dtype=torch.int32), scalars(1, 1, 1, "cpu"))
    assert any(group.slots is not None for group in layout.groups)
    q, k, v = (torch.randn(tokens, h, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    y = torch.randn(tokens, 4, 8)
    results = []
    for f in (lambda: grouped_attention(q, k, v, layout), lambda: masked_attention(q, k, v, windows)):
        q.grad = k.grad = v.grad = None
        out = f()
        (out * y).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def kernel(q, k, v, cu_q, cu_k, longest, longest_k, causal):
    """What the variable-length kernel computes from its arguments."""
    assert cu_q.dtype == torch.int32
    assert cu_q is cu_k
    assert longest == longest_k == int(cu_q.diff().max())
    assert all(t.is_contiguous() for t in (q, k, v))
    windows = torch.stack([cu_q.diff(), torch.full_like(cu_q[1:], causal), torch.zeros_like(cu_q[1:])], -1)
    return masked_attention(q, k, v, windows.tolist())


def varlen_2_10(q, k, v, cu_q, cu_k, longest, longest_k, is_causal=False, return_aux=None):
    assert k.shape == q.shape
    return kernel(q, k, v, cu_q, cu_k, longest, longest_k, is_causal)


def varlen_2_11(q, k, v, cu_q, cu_k, longest, longest_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert k.shape == q.shape
    return kernel(q, k, v, cu_q, cu_k, longest, longest_k, {(-1, 0): True, (-1, -1): False}[window_size])


def varlen_2_12(q, k, v, cu_q, cu_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (k.shape != q.shape)
    return kernel(q, k, v, cu_q, cu_k, longest, longest_k, {(-1, 0): True, (-1, -1): False}[window_size])


@pytest.mark.parametrize("release", [varlen_2_10, varlen_2_11, varlen_2_12])
@pytest.mark.parametrize("causal", [0.0, 0.6, 1.0])
def test_every_release_of_the_kernel_gets_every_window(monkeypatch, release, causal):
    """The kernel's arguments differ between the supported releases of PyTorch. Windows are causal, bidirectional, or mixed; some
    causal ones have a prefix."""
    known = inspect.signature(module.varlen_attn).parameters
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= set(known)
    monkeypatch.setattr(module, "VARLEN", frozenset(inspect.signature(release).parameters))
    monkeypatch.setattr(module, "varlen_attn", release)
    g = np.random.default_rng(3)
    windows = make_windows(g.integers(1, 20, 12), g.random(12) < causal, prefix=0.5)
    tokens = int(windows[:, 0].sum())
    layout = TokenLayout(torch.from_numpy(windows), torch.zeros(tokens, 4, dtype=torch.int32), scalars(1, 1, 1, "cpu"))
    q, k, v = (torch.randn(tokens, h, 8) for h in (4, 2, 2))
    torch.testing.assert_close(module.varlen_attention(q, k, v, layout), masked_attention(q, k, v, windows))


def test_groups_contain_every_token_once_with_little_padding():
    g = np.random.default_rng(0)
    windows = make_windows(g.integers(1, 1025, 300), g.random(300) < 0.5, prefix=0.3)
    groups = group_windows(windows, torch.device("cpu"))
    assert [a.stop for a in groups[:-1]] == [b.start for b in groups[1:]]
    assert groups[-1].stop == windows[:, 0].sum()
    padded = sum(group.windows * group.length for group in groups)
    assert padded < 1.125 * windows[:, 0].sum()
    for group in groups:
        if group.slots is not None:
            assert torch.equal(group.slots[group.places], torch.arange(group.stop - group.start))
    assert (length_class(np.arange(1, 17)) == np.arange(1, 17)).all()


def test_positions_are_relative():
    """Rotary attention does not change if all positions of a window are shifted."""
    config = make_config()
    layer = Attention(config, 0)
    initialise(layer, 1)
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)
    inputs = to_tensors(make_batch(rows=1))
    x = torch.randn(len(inputs["index"]), 32)
    attributes = inputs["attributes"].clone()
    before = layer(x, TokenLayout(inputs["windows"], attributes, scalars(1, 1, 1, "cpu")))
    attributes[:, 0] += 7
    after = layer(x, TokenLayout(inputs["windows"], attributes, scalars(1, 1, 1, "cpu")))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
    attributes[:, 0] *= 2
    assert not torch.allclose(
        before, layer(x, TokenLayout(inputs["windows"], attributes, scalars(1, 1, 1, "cpu"))), atol=1e-4
    )
