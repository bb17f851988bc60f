"""The whole model: packing, order and grouping of rows, recomputation and the cache must not change its results."""

import re

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.embedding import module_name
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.vocabulary import Vocabulary
from tiphys.recipes.sections.model import Model


def run(model, batches, scale=1.0):
    """Loss, auxiliary losses and gradients of one step over several micro-batches, as the engine sums them."""
    model.zero_grad()
    targets, tokens = sum(b.targets for b in batches), sum(b.real_tokens for b in batches)
    loss, auxiliary = 0.0, torch.zeros(2)
    for batch in batches:
        out = model(to_tensors(batch), targets, tokens, scale)
        (out.loss * scale).backward()
        loss, auxiliary = loss + float(out.loss.detach()), auxiliary + out.auxiliary
    return loss, auxiliary, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(a, b, tolerance=1e-6):
    assert a[0] == pytest.approx(b[0], abs=tolerance)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=tolerance)
    for name, gradient in a[2].items():
        torch.testing.assert_close(gradient, b[2][name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def permuted(batch, order):
    return TokenBatch.concatenate([batch.select(slice(i, i + 1)) for i in order])


@pytest.fixture(scope="module")
def model():
    made = DecisionModel(make_config(balance=0.1, z_loss=0.1), seed=3)
    for moe in mixtures(made):
        moe.previous.copy_(torch.tensor([5, 1, 9, 2]))
    return made.train()


@pytest.mark.parametrize("size", [32, 256])
def test_embedded_values_begin_about_as_large_as_rows_of_the_token_table(size):
    """Otherwise attention adds next to nothing to them, and they do not learn from an instruction for long."""
    config = make_config(hidden_size=size, initializer_range=size**-0.5)
    model, batch = DecisionModel(config, seed=3), make_batch(rows=16, length=80)
    for name, part in batch.embedded.items():
        embedder = model.embedding.values[module_name(name)]
        text = torch.randn(len(part.index), size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = embedder(torch.from_numpy(part.value), torch.from_numpy(part.place), text)
        assert 0.3 < made.square().mean().sqrt() * size**0.5 < 3, name


def test_the_width_of_drawn_weights_is_that_of_the_model_unless_the_recipe_says_otherwise():
    vocabulary = Vocabulary.build(300)
    for model, width in ((Model(hidden=256), 1 / 16), (Model(hidden=256, init_std=0.02), 0.02)):
        assert DecisionConfig.from_recipe(model, vocabulary).initializer_range == width


def test_the_width_of_drawn_weights_is_that_of_the_config():
    """Only a factor changes: what is inside embedders, norms and biases stay as they are."""
    narrow = dict(DecisionModel(make_config(pairs=True), seed=3).named_parameters())
    wide = dict(DecisionModel(make_config(pairs=True, initializer_range=0.08), seed=3).named_parameters())
    for name, parameter in narrow.items():
        own = (
            parameter.dim() == 1
            or re.search(r"embedding\.values\.(?!patch.*\.(row|column)\.)(?!.*\.out\.)", name)
            or "router.task" in name
        )
        torch.testing.assert_close(wide[name], parameter * (1 if own or "router.modality" in name else 4), msg=name)
    assert wide["layers.0.attention.qkv.weight"].std().item() == pytest.approx(0.08, rel=0.05)
    depth = make_config().num_hidden_layers
    assert wide["layers.0.attention.out.weight"].std().item() == pytest.approx(0.08 / (2 * depth) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "grouping",
    [
        lambda b: [permuted(b, [3, 0, 5, 1, 4, 2])],
        lambda b: [b.select(slice(i, i + 1)) for i in range(6)],
        lambda b: [b.select(slice(4, 6)).fill(4), b.select(slice(0, 4)), TokenBatch.empty(b.step, b.length, 2)],
    ],
    ids=["permuted", "row by row", "regrouped with fillers"],
)
def test_order_and_grouping_of_rows_do_not_change_the_step(model, grouping):
    batch = make_batch(rows=6, seed=1)
    assert_same(run(model, [batch]), run(model, grouping(batch)))


def test_windows_packed_in_a_row_do_not_see_each_other(model):
    batch = make_batch(rows=3, seed=2)
    together = unpack(model(to_tensors(batch)).hidden, to_tensors(batch), 3, batch.length)
    compared = 0
    for row in range(3):
        for segment in range(1, batch.segment[row].max() + 1):
            alone = batch.select(slice(row, row + 1))
            keep = alone.segment == segment
            dense = {n: np.where(keep, getattr(alone, n), 0) for n in ("segment", "modality", "tokens")}
            part = np.flatnonzero(keep[0])
            embedded = {
                n: type(e)(e.index[m], e.value[m], e.place[m] if len(e.place) else e.place)
                for n, e in alone.embedded.items()
                for m in [np.isin(e.index, part)]
            }
            only = TokenBatch(**{**alone.__dict__, **dense, "embedded": embedded, "regression": {}})
            hidden = unpack(model(to_tensors(only)).hidden, to_tensors(only), 1, batch.length)[0, part]
            torch.testing.assert_close(hidden, together[row, part], rtol=1e-4, atol=2e-6)
            compared += 1
    assert compared > 6


def test_every_parameter_gets_a_gradient_even_without_tokens(model):
    loss, auxiliary, gradients = run(model, [TokenBatch.empty(1, 40, 2)])
    assert loss == 0
    assert not auxiliary.any()
    assert set(gradients) == {n for n, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_the_scale_applies_to_auxiliary_gradients(model):
    batch = make_batch(seed=5)
    _, _, one = run(model, [batch])
    _, _, eight = run(model, [batch], scale=8.0)
    for name in one:
        torch.testing.assert_close(eight[name], 8 * one[name], rtol=1e-4, atol=1e-5)


def test_recomputation_gives_the_same_results_and_counts_once():
    batch = make_batch(seed=6)
    results, counts = [], []
    for checkpointing in (False, True):
        made = DecisionModel(make_config(checkpointing=checkpointing), seed=1).train()
        results.append(run(made, [batch]))
        counts.append(step_counts(made)[0])
    assert_same(*results)
    assert torch.equal(*counts)
    assert counts[0].sum() == batch.real_tokens * 2 * 2  # two experts for each token, in two layers


def test_tied_matrix_is_one_parameter(tmp_path):
    made = DecisionModel(make_config(tie_word_embeddings=True), seed=1)
    assert made.output.weight is made.token.weight
    assert "output.weight" not in dict(made.named_parameters())
    made.save_pretrained(tmp_path)
    again = DecisionModel.from_pretrained(tmp_path)
    assert again.output.weight is again.token.weight


@pytest.mark.parametrize("tie", [False, True])
def test_a_saved_model_gives_the_same_loss(tmp_path, tie):
    made = DecisionModel(make_config(tie_word_embeddings=tie), seed=4).eval()
    for moe in mixtures(made):
        moe.finish_step(torch.tensor([5, 1, 9, 2]))
    made.save_pretrained(tmp_path)
    again = DecisionModel.from_pretrained(tmp_path).eval()
    inputs = to_tensors(make_batch(seed=8))
    assert torch.equal(made(inputs).loss, again(inputs).loss)
    assert torch.equal(mixtures(again)[0].previous, torch.tensor([5, 1, 9, 2]))


def test_loss_by_task_adds_up():
    model = DecisionModel(make_config(), seed=2).eval()
    batch = make_batch(seed=9)
    with torch.no_grad():
        out = model(to_tensors(batch), batch.targets, batch.real_tokens)
    assert float(out.loss_by_task[:, 0].sum()) / batch.targets == pytest.approx(float(out.loss), rel=1e-5)
    counts = np.bincount(batch.task[batch.target >= 0], minlength=3)
    counts = counts + np.bincount(batch.task.reshape(-1)[batch.regression["action:6"].index], minlength=3)
    assert out.loss_by_task[:, 2].tolist() == counts.tolist()


def test_weights_depend_only_on_seed_and_name():
    small, large = make_config(), make_config(num_hidden_layers=6)
    a, b = DecisionModel(small, seed=5), DecisionModel(large, seed=5)
    other = dict(b.named_parameters())
    for name, value in a.named_parameters():
        if "down" not in name and "attention.out" not in name:  # scaled by the depth
            assert torch.equal(value, other[name]), name
    assert not torch.equal(a.token.weight, DecisionModel(small, seed=6).token.weight)
    up = mixtures(a)[0].experts.up
    assert all(not torch.equal(up[0], up[i]) for i in range(1, 4))


def test_bfloat16_is_close_to_float32():
    batch = make_batch(seed=4)
    model = DecisionModel(make_config(), seed=2).eval()
    with torch.no_grad():
        loss = model(to_tensors(batch), batch.targets, batch.real_tokens).loss
        half = model.to(torch.bfloat16)(to_tensors(batch), batch.targets, batch.real_tokens).loss
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(loss), rel=2e-2)
