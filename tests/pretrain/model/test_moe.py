"""The mixture of experts against loops and explicit auxiliary losses."""

import pytest
import torch
from torch.nn import functional as F

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model.inputs import scalars, to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.moe import MixtureOfExperts, has_grouped_mm, looped_products, products
from tiphys.pretrain.model.token_layout import TokenLayout


def make_moe(**changes):
    config = make_config(shared_expert=False, **changes)
    moe = MixtureOfExperts(config, 1)
    initialise(moe, 3)
    torch.nn.init.normal_(moe.router.weight, std=0.5)
    return moe.train()


def make_layout(batch, tokens=None, scale=1.0):
    inputs = to_tensors(batch)
    return TokenLayout(inputs["windows"], inputs["attributes"], scalars(1.0, tokens or batch.real_tokens, scale, "cpu"))


def slow_mixture(moe, x, layout):
    """The oracle: one token and one expert at a time."""
    probabilities = moe.router(x, layout).softmax(-1)
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        gates, chosen = probabilities[t].topk(moe.experts_per_token)
        if moe.experts_per_token > 1:
            gates = gates / gates.sum()
        for gate, e in zip(gates, chosen.tolist()):
            a, b = (x[t] @ moe.experts.up[e]).chunk(2)
            out[t] += gate * ((F.silu(a) * b) @ moe.experts.down[e])
    return out


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_a_loop_over_tokens(k):
    moe = make_moe(num_experts_per_tok=k, balance=0.0, z_loss=0.0)
    batch = make_batch(rows=2)
    layout = make_layout(batch)
    x = torch.randn(batch.real_tokens, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.randn(batch.real_tokens, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for f in (moe, lambda x, layout: slow_mixture(moe, x, layout)):
        moe.zero_grad()
        x.grad = None
        out = f(x, layout)
        (out * y).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 9, 2], [16, 0, 0, 0], [0, 0, 0, 16], [4, 4, 4, 4]])
def test_grouped_products_equal_the_loop(dtype, counts):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 24, generator=g).to(dtype).requires_grad_()
    w = torch.randn(4, 24, 40, generator=g).to(dtype).requires_grad_()
    y = torch.randn(16, 40, generator=g).to(dtype)
    assert has_grouped_mm(x, w)
    sizes = torch.tensor(counts)
    results = []
    for f in (lambda: products(x, w, sizes, sizes.cumsum(0).int()), lambda: looped_products(x, w, sizes)):
        x.grad = w.grad = None
        out = f()
        (out * y).sum().backward()
        results.append((out.detach(), x.grad, w.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    assert (results[0][2][[n == 0 for n in counts]] == 0).all()


def test_weights_without_alignment_work():
    """ZeRO packs parameters without alignment, but the grouped product needs addresses that are multiples of 16."""
    memory = torch.randn(4 * 24 * 40 + 3)
    x, w, counts = torch.randn(16, 24), memory[3:].view(4, 24, 40).requires_grad_(), torch.tensor([5, 0, 9, 2])
    assert w.data_ptr() % 16
    out = products(x, w, counts, counts.cumsum(0).int())
    torch.testing.assert_close(out, looped_products(x, w, counts), rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(out.square().sum(), w)
    (theirs,) = torch.autograd.grad(looped_products(x, w, counts).square().sum(), w)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_sizes_without_alignment_use_the_loop():
    x, w = torch.randn(8, 6), torch.randn(2, 6, 10)
    assert not has_grouped_mm(x, w)
    counts = torch.tensor([3, 5])
    assert torch.equal(products(x, w, counts, counts.cumsum(0).int())[3:], x[3:] @ w[1])


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_injected_gradient_equals_the_explicit_loss(scale):
    """The gradient of the output with injected auxiliary losses, against that of output + auxiliary losses."""
    batch = make_batch(rows=3)
    tokens = 2 * batch.real_tokens
    moe = make_moe(balance=0.3, z_loss=0.2)
    moe.previous.copy_(torch.tensor([7, 1, 4, 2]))
    x = torch.randn(batch.real_tokens, 32, requires_grad=True)

    (scale * moe(x, make_layout(batch, tokens, scale)).square().sum()).backward()
    injected = [x.grad, *(p.grad for p in moe.parameters())]

    x.grad = None
    moe.zero_grad()
    layout = make_layout(batch, tokens)
    logits = moe.router(x, layout)
    shares = torch.tensor([7, 1, 4, 2]) / 14
    balance = 4 * (shares * logits.softmax(-1).sum(0)).sum() / tokens
    z = torch.logsumexp(logits, -1).square().sum() / tokens
    with_losses = slow_mixture(moe, x, layout).square().sum() + 0.3 * balance + 0.2 * z
    (scale * with_losses).backward()
    for a, b in zip(injected, [x.grad, *(p.grad for p in moe.parameters())]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(moe.losses, torch.stack([0.3 * balance, 0.2 * z]).detach())


@pytest.mark.parametrize("favourite", [0, 3])
def test_all_tokens_to_one_expert(favourite):
    moe = make_moe(num_experts_per_tok=1)
    with torch.no_grad():
        moe.router.modality[:, favourite] = 50.0
    batch = make_batch(rows=2)
    x = torch.randn(batch.real_tokens, 32, requires_grad=True)
    out = moe(x, make_layout(batch))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
    assert moe.counts.sum(0).tolist() == [batch.real_tokens if e == favourite else 0 for e in range(4)]
    idle = [e for e in range(4) if e != favourite]
    assert (moe.experts.up.grad[idle] == 0).all()


def test_counts_are_by_task_and_finish_step_stores_them():
    moe = make_moe()
    batch = make_batch(rows=3)
    x = torch.randn(batch.real_tokens, 32)
    moe(x, make_layout(batch))
    moe(x, make_layout(batch))
    for task in range(3):
        assert moe.counts[task].sum() == 2 * 2 * ((batch.task == task) & (batch.segment > 0)).sum()
    counts = moe.counts
    moe.finish_step(counts)
    assert torch.equal(moe.previous, counts.sum(0))
    assert moe.counts is None
    moe.finish_step(torch.zeros(4, dtype=torch.int64))  # a step without tokens keeps the counts
    assert torch.equal(moe.previous, counts.sum(0))


def test_evaluation_does_not_count_tokens():
    moe = make_moe().eval()
    batch = make_batch(rows=1)
    moe(torch.randn(batch.real_tokens, 32), make_layout(batch))
    assert moe.counts is None


def test_the_bias_balances_without_a_loss():
    """The router prefers one expert for all tokens; the bias spreads them over all experts."""
    moe = make_moe(num_experts_per_tok=1, bias_rate=0.02, balance=0.5)
    assert moe.balance == 0
    batch = make_batch(rows=6)
    with torch.no_grad():
        moe.router.modality[:, 2] = 1.5
    x = torch.randn(batch.real_tokens, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    shares = []
    for _ in range(60):
        moe(x, make_layout(batch))
        counts = moe.counts.sum(0)
        shares.append(float(counts.max() / counts.sum()))
        moe.finish_step(counts)
    assert shares[0] > 0.6
    assert sum(shares[-10:]) / 10 < 0.4
    assert moe.to(torch.bfloat16).bias_steps.dtype == torch.int64


def test_a_hidden_task_is_hidden_from_the_router_only():
    batch = make_batch(rows=40, length=20)
    inputs = to_tensors(batch, task_dropout=0.5, seed=3)
    route, task = inputs["attributes"][:, 3], inputs["attributes"][:, 2]
    row = inputs["index"] // 20
    hidden = {int(r): bool((route[row == r] == 0).all()) for r in row.unique()}
    for r, gone in hidden.items():
        assert torch.equal(route[row == r], torch.zeros_like(route[row == r]) if gone else task[row == r] + 1)
    assert 8 < sum(hidden.values()) < 32
    # The draw of a row does not depend on its batch.
    again = to_tensors(batch.select(slice(10, 20)), task_dropout=0.5, seed=3)
    expected = [hidden[int(r) + 10] for r in (again["index"] // 20)]
    assert [(t == 0) for t in again["attributes"][:, 3].tolist()] == expected
