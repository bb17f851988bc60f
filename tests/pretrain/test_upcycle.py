"""A dense model becomes a mixture of experts that computes the same; each part of the model reads only what it holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain.adopt.test_adopt import logits, recipe_of, saved
from tests.pretrain.test_pretrained import published
from tests.pretrain.test_pretrained import recipe_of as policy_recipe
from tests.pretrain.token_fixtures import ARM, make
from tiphys.dataio.episode import DataError
from tiphys.launch.checks.model import init_errors
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.layers import declared, initial_range, initialise
from tiphys.pretrain.model.moe import Experts
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.pretrained import begin, open_pretrained, start_lines
from tiphys.recipes.sections.model import Experts as Moe
from tiphys.recipes.sections.model import Upcycle

MOE = Moe(experts=4, experts_per_token=2, every=2)


@pytest.fixture(scope="module")
def objectives():
    return make([ARM], "dt", context=200)


@pytest.fixture(scope="module")
def dense(objectives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return folder, saved(folder, objectives, "Qwen2", tie_word_embeddings=True)


def upcycled(folder, fresh=0.0, **moe):
    recipe = recipe_of(folder)
    return replace(
        recipe,
        model=replace(recipe.model, moe=replace(MOE, **moe), upcycle=Upcycle(fresh)),
        train=replace(recipe.train, seed=5),
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("top", [2, 3])
def test_the_mixture_computes_what_the_language_model_does(objectives, dense, shared, top):
    folder, theirs = dense
    ours = begin(upcycled(folder, shared=shared, experts_per_token=top), objectives.vocabulary)
    ids = np.random.default_rng(0).integers(0, 600, (2, 40))
    wanted = theirs(torch.from_numpy(ids)).logits.detach()[..., :600]
    assert (logits(ours, ids)[..., :600] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert any(line.startswith("upcycled: ") and "layer 1 " in line for line in start_lines(ours))


def test_ones_own_dense_policy_becomes_a_mixture(objectives, tmp_path):
    old = published(tmp_path / "policy", objectives, moe=Moe())
    ours = begin(policy_recipe(tmp_path / "policy", moe=MOE), objectives.vocabulary)
    ids = np.random.default_rng(1).integers(0, 200, (2, 30))
    wanted = logits(old, ids)
    assert (logits(ours, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_copies_are_trained_apart(objectives, dense):
    """With a shared expert the others write nothing at first; what they write must have a gradient."""
    model = begin(upcycled(dense[0], shared=True), objectives.vocabulary)
    experts = model.layers[1].mlp.experts
    assert torch.count_nonzero(experts.down) == 0
    x = torch.randn(6, model.config.hidden_size)
    (experts(x, torch.tensor([3, 1, 2, 0])) * x).sum().backward()
    assert all(experts.down.grad[e].abs().max() > 0 for e in range(3))


def test_fresh_columns_are_drawn_by_name(objectives, dense):
    folder, _ = dense
    table = load_file(folder / "model.safetensors")
    inner = 48
    gate, up, down = (table[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    model = begin(upcycled(folder, fresh=0.25), objectives.vocabulary)
    experts = model.layers[1].mlp.experts
    chosen = []
    for e in range(4):
        copied = (experts.down[e] == down.T).all(1)
        assert int((~copied).sum()) == inner // 4
        for part, dense_part in ((experts.up[e][:, :inner], gate), (experts.up[e][:, inner:], up)):
            assert torch.equal((part == dense_part.T).all(0), copied)
        assert experts.down[e][~copied].std().item() == pytest.approx(down.std().item(), rel=0.2)
        chosen.append(copied)
    assert not torch.equal(chosen[0], chosen[1])
    again = begin(upcycled(folder, fresh=0.25), objectives.vocabulary).layers[1].mlp.experts
    assert torch.equal(again.up, experts.up)
    part = Experts(model.config, count=2, first=1)
    initialise(part, 5, lambda name: f"layers.1.mlp.experts.{name}", model.source)
    assert torch.equal(part.up, experts.up[1:3])
    assert torch.equal(part.down, experts.down[1:3])


@pytest.mark.parametrize("moe", [MOE, Moe()])
def test_any_range_of_a_parameter_is_that_of_the_whole_model(objectives, dense, moe):
    """What a rank of ZeRO-3 draws and reads for its part; reads stay within the rows of the range."""
    recipe = upcycled(dense[0], fresh=0.25 if moe.experts else 0.0)
    recipe = replace(recipe, model=replace(recipe.model, moe=moe))
    whole = begin(recipe, objectives.vocabulary)
    random = np.random.default_rng(2)
    source = open_pretrained(recipe, (whole.config, objectives.vocabulary))
    for name, parameter, start in declared(whole):
        size = parameter.numel()
        low, high = sorted(random.integers(0, size + 1, 2))
        for at, end in ((0, size), (low, max(high, low + 1) if low < size else size)):
            if at < end:
                found = initial_range(name, tuple(parameter.shape), start, 5, source, int(at), int(end - at))
                assert torch.equal(found, parameter.detach().view(-1)[at:end]), name


def test_a_range_reads_its_rows_only(objectives, dense):
    recipe = upcycled(dense[0])
    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    source = open_pretrained(recipe, (config, objectives.vocabulary))
    read, weights = [], source.weights

    class Watched:
        shapes = weights.shapes

        def read(self, name, first=0, count=None):
            read.append((name, first, count))
            return weights.read(name, first, count)

    source.weights = Watched()
    with torch.device("meta"):
        model = DecisionModel(config)
    for name, parameter, start in declared(model):
        if name.endswith(("experts.up", "attention.out.weight")):
            width = parameter[0].numel()
            initial_range(name, tuple(parameter.shape), start, 5, source, width + 3, width)
    assert read
    assert {what[1:] for what in read} == {(1, 2)}


def errors(recipe, objectives):
    return " ".join(reason for _, reason in init_errors(recipe, objectives))


def test_what_would_change_the_function_is_refused(objectives, dense):
    folder, _ = dense
    with pytest.raises(DataError, match=r"experts_per_token: 1: the gate of a single expert is its probability"):
        begin(upcycled(folder, experts_per_token=1), objectives.vocabulary)
    with pytest.raises(DataError, match=r"model.moe.hidden is 24 here, and the MLPs there have 48"):
        begin(upcycled(folder, hidden=24), objectives.vocabulary)
    recipe = upcycled(folder, fresh=0.5)
    plain = replace(recipe, model=replace(recipe.model, moe=Moe()))
    assert "0.5, but no expert is a copy" in errors(plain, objectives)
    assert "no `model.init`" in errors(replace(plain, model=replace(plain.model, init="")), objectives)
