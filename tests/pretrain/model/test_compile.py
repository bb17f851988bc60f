"""`torch.compile`: with the attention kernel a layer is one graph, and it computes the same as without compilation."""

import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model import attention
from tiphys.pretrain.model.inputs import scalars, to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.model.transformer import Block


def varlen(q, k, v, ends, ends_again, longest, longest_again, *, window_size, enable_gqa):
    """A fake of the GPU kernel: its result depends on all of its arguments."""
    return q * 0.5 + (k.mean(1, keepdim=True) - v.mean(1, keepdim=True)) * (1 + window_size[1])


def make_layer(number=1, dtype=torch.bfloat16):
    config = make_config(bias_rate=0.01, num_experts=8, hidden_size=32)
    block = Block(config, number)
    initialise(block, 1)
    return block.to(dtype).train()


def make_layout(batch):
    inputs = to_tensors(batch)
    return TokenLayout(inputs["windows"], inputs["attributes"], scalars(1.0, batch.real_tokens, 1.0, "cpu"))


@pytest.mark.parametrize("number", [0, 1], ids=["dense", "experts"])
def test_a_layer_is_one_graph(monkeypatch, number):
    monkeypatch.setattr(attention, "_has_varlen", lambda q: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    batch = make_batch(seed=1)
    layout = make_layout(batch)
    assert len(layout.cumulative) == 2  # NumPy computes this once for the batch, outside the graph
    torch._dynamo.reset()
    found = torch._dynamo.explain(make_layer(number))(torch.randn(batch.real_tokens, 32).bfloat16(), layout)
    assert found.graph_break_count == 0, [reason.reason for reason in found.break_reasons]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_gives_the_same_result(dtype):
    batches = [make_batch(seed=s) for s in (1, 2, 3)]
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        block, out = make_layer(dtype=dtype), []
        layer = torch.compile(block, backend="aot_eager") if compiled else block
        for seed, batch in enumerate(batches):
            x = torch.randn(batch.real_tokens, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
            made = layer(x, make_layout(batch))
            (made.float() * torch.linspace(-1, 1, 32)).sum().backward()
            out.append(made.detach())
        assert torch.equal(step_counts(block)[0].sum((0, 2)).ne(0), torch.ones(3, dtype=torch.bool))
        out += [mixtures(block)[0].counts, *(p.grad for p in block.parameters())]
        results.append(out)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
