"""A model begins with the weights of another one: each parameter and row by its name, on every part of the model alike."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.pretrain.token_fixtures import ARM, CAMERA, GRID, make
from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.moe import Experts
from tiphys.pretrain.model.pipeline import canonical_name, partition, pipeline_layers
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.pretrained import begin, open_pretrained, pinned, policy_digest, start_lines
from tiphys.pretrain.publish import save_policy
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.model import Experts as Moe
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.training import Train

SIZES = {"layers": 4, "hidden": 32, "heads": 2, "text_vocabulary": 600}
MOE = Moe(experts=4, experts_per_token=2, every=2, task=True, bias_rate=0.01)


def config_of(objectives, **changes):
    return DecisionConfig.from_recipe(Model(**{**SIZES, "moe": MOE, **changes}), objectives.vocabulary)


def published(folder, objectives, seed=3, **changes):
    """A policy whose weights are drawn, and whose routers have a bias."""
    model = DecisionModel(config_of(objectives, **changes), seed=seed)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_steps"):
            buffer += torch.arange(len(buffer))
    save_policy(folder, model.state_dict(), model.config, objectives.processor())
    return model


def recipe_of(folder, **changes):
    return Recipe(name="test", model=Model(init=str(folder), **{**SIZES, "moe": MOE, **changes}), train=Train(seed=9))


@pytest.fixture(scope="module")
def before():
    return make([GRID, ARM], "dt", context=200)


@pytest.fixture(scope="module")
def policy(before, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "policy"
    return folder, published(folder, before)


def test_the_same_model_begins_with_every_weight(before, policy):
    folder, old = policy
    new = begin(recipe_of(folder), before.vocabulary)
    for name, value in old.state_dict().items():
        assert torch.equal(value, new.state_dict()[name]), name
    (line,) = start_lines(new)
    assert line == f"{len(old.state_dict())} of {len(old.state_dict())} tensors come from {folder}"


def test_a_published_config_says_how_wide_weights_were_drawn(before, tmp_path):
    """A model that begins with them may draw what they lack by another width."""
    old = published(tmp_path / "policy", before, init_std=0.1)
    assert old.token.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert DecisionConfig.from_pretrained(tmp_path / "policy").initializer_range == 0.1
    new = begin(recipe_of(tmp_path / "policy", timesteps=50, init_std=0.05), before.vocabulary)
    assert torch.equal(new.token.weight, old.token.weight)
    assert new.embedding.timestep.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert DecisionConfig.from_dict({}).initializer_range == 0.02  # of a policy that does not say it


def test_what_is_not_found_is_drawn_by_name_and_listed(before, policy):
    folder, old = policy
    after = make([CAMERA, ARM], "dt", context=300)  # other tasks, fields and texts; the arm is task 1 of both
    new = begin(recipe_of(folder), after.vocabulary)
    drawn = DecisionModel(new.config, seed=9).state_dict()
    was, now = old.state_dict(), new.state_dict()
    arm, camera = "embedding.values.vector_observation_5.hidden.weight", "head.regressions.action_arm_2.weight"
    assert torch.equal(now[arm], was[arm])
    assert torch.equal(now[camera], drawn[camera])
    assert torch.equal(now["layers.1.attention.qkv.weight"], was["layers.1.attention.qkv.weight"])
    task = "layers.1.mlp.router.task"  # hidden, camera, arm; it was hidden, grid, arm
    assert torch.equal(now[task][[0, 2]], was[task][[0, 2]])
    lines = "\n".join(start_lines(new))
    assert "drawn: " in lines
    assert "embedding.values.patch_3.*" in lines
    assert "head.regressions.action_arm_2.*" in lines
    assert "left out: embedding.values.grid_observation_image_7x7x3.*" in lines


def test_rows_of_the_vocabulary_are_found_by_what_they_stand_for(before, policy):
    folder, old = policy
    after = make([GRID, ARM], "gato", text=700, context=900)
    new = begin(recipe_of(folder, text_vocabulary=700), after.vocabulary)
    drawn = DecisionModel(new.config, seed=9).state_dict()
    table, was = new.token.weight, old.token.weight
    mine, theirs = after.vocabulary, before.vocabulary
    for kind in ("continuous", "discrete"):
        (low, high), first = mine.range(kind), theirs.range(kind)[0]
        assert torch.equal(table[low:high], was[first : first + high - low])
    for name in ("separator", "embedded", "mask", "end_of_text"):
        assert torch.equal(table[getattr(mine, name)], was[getattr(theirs, name)])
    pieces = before.text.pieces()
    assert pieces
    for piece, i in after.text.pieces().items():
        wanted = was[pieces[piece]] if piece in pieces else drawn["token.weight"][i]
        assert torch.equal(table[i], wanted), piece
    assert torch.equal(table[699], drawn["token.weight"][699])  # no piece of any tokenizer


def test_a_renamed_field_and_task_are_found_by_the_map(before, policy):
    folder, old = policy
    fields = tuple(replace(f, name="state") if f.name == "observation" else f for f in ARM.fields)
    after = make([replace(ARM, name="robot", fields=fields)], "dt", context=200)
    new = begin(recipe_of(folder, init_map={"observation": "state", "arm": "robot"}), after.vocabulary)
    was, now = old.state_dict(), new.state_dict()
    assert torch.equal(
        now["embedding.values.vector_state_5.out.weight"], was["embedding.values.vector_observation_5.out.weight"]
    )
    assert torch.equal(now["layers.1.mlp.router.task"][1], was["layers.1.mlp.router.task"][2])
    with pytest.raises(
        DataError, match=r"init_map: \{observation: stat\}: this recipe has no field or task 'stat'.*state"
    ):
        begin(recipe_of(folder, init_map={"observation": "stat"}), after.vocabulary)


def test_values_of_a_grid_keep_their_channel(before, tmp_path):
    folder = tmp_path / "policy"
    old = published(folder, before)
    fields = tuple(replace(f, values=13) if f.name == "observation.image" else f for f in GRID.fields)
    after = make([replace(GRID, fields=fields), ARM], "dt", context=200)
    new = begin(recipe_of(folder), after.vocabulary)
    name = "embedding.values.grid_observation_image_7x7x3.cell.weight"
    was, now = (model.state_dict()[name].view(3, -1, 64) for model in (old, new))
    assert (was.shape[1], now.shape[1]) == (11, 13)
    assert torch.equal(was, now[:, :11])


def test_stages_read_their_own_part_only(before, policy):
    folder, old = policy
    config = config_of(before)
    for start, stop in itertools.pairwise(partition(config, 2)):
        source = open_pretrained(recipe_of(folder), (config, before.vocabulary))
        assert source is not None
        read, weights = [], source.weights

        class Watched:
            shapes = weights.shapes

            def read(self, name, *rows):
                read.append(name)  # noqa: B023
                return weights.read(name, *rows)  # noqa: B023

        source.weights = Watched()
        stage = torch.nn.Module()
        for i in range(start, stop):
            kind, arguments = pipeline_layers(config)[i]
            stage.add_module(str(i), kind(*arguments))
        initialise(stage, 9, lambda name: canonical_name(name, config), source)
        mine = {canonical_name(name, config): value for name, value in stage.state_dict().items()}
        assert set(read) <= set(mine)
        for name, value in mine.items():
            assert torch.equal(value, old.state_dict()[name]), name


def test_a_slice_of_the_experts_reads_its_rows(before, policy):
    folder, old = policy
    config = config_of(before)
    source = open_pretrained(recipe_of(folder), (config, before.vocabulary))
    experts = Experts(config, count=2, first=1)
    initialise(experts, 9, lambda name: f"layers.1.mlp.experts.{name}", source)
    assert torch.equal(experts.up, old.state_dict()["layers.1.mlp.experts.up"][1:3])


def test_tied_and_untied_tables_find_each_other(before, tmp_path):
    tied = published(tmp_path / "tied", before, tie=True)
    new = begin(recipe_of(tmp_path / "tied"), before.vocabulary)
    assert torch.equal(new.output.weight, tied.token.weight)
    assert torch.equal(new.token.weight, tied.token.weight)


def test_layers_of_other_sizes_are_refused_with_the_key(before, policy):
    folder, _ = policy
    with pytest.raises(DataError, match=r"model.hidden is 64 here and 32 there.*model.ffn"):
        begin(recipe_of(folder, hidden=64), before.vocabulary)
    with pytest.raises(DataError, match=r"model.heads is 4 here and 2 there"):
        begin(recipe_of(folder, heads=4), before.vocabulary)
    with pytest.raises(DataError, match=r"model.moe.experts is 0 here and 4 there"):
        begin(recipe_of(folder, moe=Moe()), before.vocabulary)


def test_a_deeper_model_draws_the_layers_that_are_new(before, policy):
    folder, old = policy
    new = begin(recipe_of(folder, layers=5), before.vocabulary)
    assert torch.equal(new.layers[3].norm1.weight, old.layers[3].norm1.weight)
    assert any("drawn: layers.4.*" in line for line in start_lines(new))


def test_the_digest_of_the_source_is_part_of_the_recipe(before, tmp_path):
    published(tmp_path / "policy", before)
    recipe = recipe_of(tmp_path / "policy")
    first = pinned(recipe, None)
    assert first.model.init_digest == policy_digest(str(tmp_path / "policy"))
    assert pinned(first, None) == first
    published(tmp_path / "policy", before, seed=4)
    assert pinned(recipe, None) != first
    with pytest.raises(DataError, match=r"model.init_digest: the recipe was pinned to"):
        pinned(first, None)


def test_a_run_that_continues_does_not_open_the_source(before, tmp_path, monkeypatch):
    class Saved:
        def state(self):
            return {"recipe": {"model": {"init_digest": "abc"}}}

    recipe = recipe_of(tmp_path / "gone")
    assert pinned(recipe, Saved()).model.init_digest == "abc"  # type: ignore[arg-type]
    assert begin(recipe, before.vocabulary, fresh=False).source is None
    with pytest.raises(DataError, match=r"model.init: .*gone: neither the folder of a run with a policy nor a policy"):
        pinned(recipe, None)


def test_a_policy_without_safetensors_or_of_another_kind_is_refused(before, tmp_path):
    published(tmp_path / "policy", before)
    (tmp_path / "policy" / "model.safetensors").rename(tmp_path / "policy" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no weights; model.init reads model.safetensors only"):
        begin(recipe_of(tmp_path / "policy"), before.vocabulary)
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(DataError, match="not a valid safetensors file"):
        begin(recipe_of(tmp_path / "policy"), before.vocabulary)
    (tmp_path / "policy" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="model_type 'gpt2'; known: llama"):
        begin(recipe_of(tmp_path / "policy"), before.vocabulary)
