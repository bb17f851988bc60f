"""A model of `transformers` gives the same logits after a recipe has begun with it; what cannot be followed is refused."""

import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.hub import Hub, Repository
from tests.pretrain.token_fixtures import ARM, CAMERA, GRID, make
from tiphys import plain_yaml
from tiphys.dataio.episode import DataError
from tiphys.pretrain.adopt.families import family_config, section
from tiphys.pretrain.adopt.weights import AdoptedWeights
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.moe import Experts
from tiphys.pretrain.model.pipeline import canonical_name, partition, pipeline_layers
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.pretrained import begin, pinned, policy_digest, start_lines
from tiphys.pretrain.publish import save_policy
from tiphys.pretrain.tokens.batch import TEXT, TokenBatch
from tiphys.recipes.load import from_dict

PLAIN = {"name": "test", "run": {"dir": "unused"}}
SIZES = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, **EXPERTS}),
    "qwen3_moe, first dense": ("Qwen3Moe", {"head_dim": 16, **EXPERTS, "mlp_only_layers": [0]}),
}


@pytest.fixture(scope="module")
def objectives():
    return make([ARM], "dt", context=200)


def saved(folder, objectives, family="Llama", **changes):
    """A random model of a family, with the tokenizer of the objectives."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():  # norms and biases that matter
            value.copy_(torch.randn_like(value) * 0.3 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(objectives.vocabulary.text_tokenizer, encoding="utf-8")
    return model


def recipe_of(folder, **changes):
    """The recipe that `section` proposes, with changes."""
    model = section(family_config(folder), str(folder))
    return from_dict({**PLAIN, "model": {**model, **changes}})


@torch.no_grad()
def logits(model, ids):
    """Of the texts in a batch of ids [rows, length]."""
    rows, length = ids.shape
    none = np.zeros(ids.shape, np.int32)
    batch = TokenBatch(
        step=0,
        row=np.arange(rows, dtype=np.int64),
        tokens=ids.astype(np.int32),
        modality=np.full(ids.shape, TEXT, np.uint8),
        segment=none + 1,
        position=none + np.arange(length, dtype=np.int32),
        local=none + np.arange(length, dtype=np.int32),
        timestep=none,
        task=none,
        causal=none == 0,
        target=none - 1,
        softmax=none.astype(np.uint8),
        weight=none.astype(np.float32),
        embedded={},
        regression={},
    )
    return model.eval().logits(model(to_tensors(batch)).hidden).view(rows, length, -1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(objectives, tmp_path, name):
    family, changes = MODELS[name]
    theirs = saved(tmp_path, objectives, family, **changes)
    ours = begin(recipe_of(tmp_path), objectives.vocabulary)
    ids = np.random.default_rng(0).integers(0, 600, (2, 70))
    assert objectives.vocabulary.range("text") == (0, 600)
    wanted = theirs(torch.from_numpy(ids)).logits.detach()[..., :600]
    found = logits(ours, ids)[..., :600]
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture(scope="module")
def experts(objectives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return folder, saved(folder, objectives, "Qwen3Moe", head_dim=8, **EXPERTS, mlp_only_layers=[0])


def test_what_is_found_drawn_and_zero_is_listed(objectives, experts):
    model = begin(recipe_of(experts[0]), objectives.vocabulary)
    lines = start_lines(model)
    special = objectives.vocabulary.size
    assert f"in part: token.weight (600 of {special} rows), output.weight (600 of {special} rows)" in lines
    assert "begin at 0: embedding.local.weight" in lines
    (drawn,) = (line for line in lines if line.startswith("drawn: "))
    assert "layers.1.mlp.router.modality" in drawn
    assert "layers.1.*" not in drawn
    assert not any(line.startswith("left out") for line in lines)


def test_stacked_experts_are_read_as_well_as_single_ones(objectives, experts, tmp_path):
    folder, _ = experts
    tensors = load_file(folder / "model.safetensors")
    for base in ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts"):
        each = [{n: tensors.pop(f"{base}.{e}.{n}_proj.weight") for n in ("gate", "up", "down")} for e in range(4)]
        tensors[f"{base}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in each])
        tensors[f"{base}.down_proj"] = torch.stack([e["down"] for e in each])
    save_file(tensors, tmp_path / "model.safetensors")
    config = family_config(folder)
    single, stacked = AdoptedWeights(folder, config), AdoptedWeights(tmp_path, config)
    assert single.shapes == stacked.shapes
    for name in single.shapes:
        assert torch.equal(single.read(name), stacked.read(name)), name
        assert torch.equal(single.read(name)[1:3], stacked.read(name, 1, 2)), name


def test_texts_are_found_by_another_tokenizer_too(objectives, experts):
    other = make([GRID, CAMERA], "gato", context=900)
    model = begin(recipe_of(experts[0]), other.vocabulary)
    pieces = objectives.text.pieces()
    assert pieces != other.text.pieces()
    table = load_file(experts[0] / "model.safetensors")["model.embed_tokens.weight"]
    for piece, i in other.text.pieces().items():
        if piece in pieces:
            assert torch.equal(model.token.weight[i], table[pieces[piece]]), piece


def test_new_rows_resemble_those_that_are_found(objectives, experts):
    model = begin(recipe_of(experts[0]), objectives.vocabulary)
    found, drawn = model.token.weight[:600], model.token.weight[600:]
    torch.testing.assert_close(drawn.mean(0), found.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), found.std(0), rtol=0.1, atol=0)
    again = begin(recipe_of(experts[0]), objectives.vocabulary)
    assert torch.equal(again.token.weight, model.token.weight)
    assert not torch.equal(model.output.weight[600:], drawn)


def test_one_tensor_at_a_time_is_held(objectives, experts, monkeypatch):
    """At most two tensors of the largest size live at once, beside the model."""
    source = AdoptedWeights(experts[0], family_config(experts[0]))
    largest = max(torch.Size(shape).numel() for shape in source.shapes.values())
    live, peak = 0, 0
    read, empty = source._files.read, torch.Tensor.new_empty

    def counted(tensor):
        nonlocal live, peak
        live += tensor.numel()
        peak = max(peak, live)
        weakref.finalize(tensor, gone, tensor.numel())
        return tensor

    def gone(size):
        nonlocal live
        live -= size

    monkeypatch.setattr(source._files, "read", lambda *a: counted(read(*a)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a: counted(empty(self, *a)))
    for name in source.shapes:
        source.read(name)
    assert 0 < peak <= 2 * largest


def changed(folder, to, **values):
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **values}))
    for name in ("model.safetensors", "tokenizer.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; known: llama, qwen2, qwen3, qwen3_moe"),
        ({"attention_bias": True}, "attention_bias is 'True'; only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is 'True'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is "),
        ({"norm_topk_prob": False}, "norm_topk_prob is False with num_experts_per_tok 2; only True"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob is True with num_experts_per_tok 1; only False"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; only the first layers"),
        ({"mlp_only_layers": []}, "the tensor 'model.layers.0.mlp.gate.weight' is missing"),
        (
            {"vocab_size": 630},
            r"'model.embed_tokens.weight' … have shape \[640, 32\], but config.json says \[630, 32\]",
        ),
        ({"num_hidden_layers": 2}, "the tensor 'model.layers.2.input_layernorm.weight' is not one of this family"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"hidden_size": "wide"}, "config.json is not valid"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_key_and_value(objectives, experts, tmp_path, values, message):
    folder = changed(experts[0], tmp_path, **values)
    with pytest.raises(DataError, match=message):
        begin(recipe_of(folder), objectives.vocabulary)


def test_a_folder_without_a_tokenizer_or_without_safetensors_is_refused(objectives, experts, tmp_path):
    recipe = recipe_of(changed(experts[0], tmp_path))
    first = policy_digest(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    assert policy_digest(str(tmp_path)) != first
    with pytest.raises(DataError, match="there is no tokenizer"):
        begin(recipe, objectives.vocabulary)
    changed(experts[0], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"model.init reads model.safetensors only, never pickles"):
        begin(recipe, objectives.vocabulary)


def test_a_recipe_of_other_sizes_is_shown_the_section_that_fits(objectives, experts):
    folder, _ = experts
    recipe = recipe_of(folder, hidden=64, layers=2, qk_norm=False)
    with pytest.raises(DataError, match=r"model.hidden is 64 here and 32 there.*model.layers is 2 here") as caught:
        begin(recipe, objectives.vocabulary)
    text = re.search(r"the section that fits is (model: .*)", str(caught.value)).group(1)
    shown = from_dict({**PLAIN, **plain_yaml.read(text, "shown").values}).model
    assert shown == recipe_of(folder, text_tokenizer=str(folder / "tokenizer.json")).model


def test_every_stage_and_slice_begins_like_the_whole(objectives, experts):
    recipe = recipe_of(experts[0])
    whole = begin(recipe, objectives.vocabulary).state_dict()
    source = begin(recipe, objectives.vocabulary, divided=True).source
    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    for start, stop in itertools.pairwise(partition(config, 2)):
        stage = nn.Module()
        for i in range(start, stop):
            kind, arguments = pipeline_layers(config)[i]
            stage.add_module(str(i), kind(*arguments))
        initialise(stage, 0, lambda name: canonical_name(name, config), source)
        for name, value in stage.state_dict().items():
            assert torch.equal(value, whole[canonical_name(name, config)]), name
    part = Experts(config, count=2, first=1)
    initialise(part, 0, lambda name: f"layers.1.mlp.experts.{name}", source)
    assert torch.equal(part.up, whole["layers.1.mlp.experts.up"][1:3])


def test_the_adopted_model_is_published_and_acts_alike(objectives, experts, tmp_path):
    model = begin(recipe_of(experts[0]), objectives.vocabulary)
    save_policy(tmp_path, model.state_dict(), model.config, objectives.processor())
    again = DecisionModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 600, (2, 30))
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_from_a_hub_come_neither_pickles_nor_code(experts, tmp_path):
    files = {p.name: p.read_bytes() for p in experts[0].iterdir()}
    files |= {"modeling.py": b"raise SystemExit(3)", "pytorch_model.bin": b"x"}
    code = "from tiphys.pretrain.policy_files import local_policy as f; print(*sorted(p.name for p in f('hf://org/m').iterdir()))"
    with Hub() as hub:
        hub.repositories["org/m"] = Repository("org/m", private=False)
        hub.repositories["org/m"].commit(files)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment["HF_HUB_DISABLE_XET"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=100
        )
    assert done.stdout.split() == ["config.json", "model.safetensors", "tokenizer.json"]


REVISIONS = """
import sys
from tiphys.pretrain.pretrained import pinned
from tiphys.recipes.load import from_dict

def found(**model):
    model = {"init": "hf://org/m", **model}
    recipe = pinned(from_dict({"name": "test", "run": {"dir": "unused"}, "model": model}), None)
    print(recipe.model.init_commit, recipe.model.init_digest)

for revision in ("v1", "main", ""):
    found(init_revision=revision)
found(init_revision="main", init_commit=sys.argv[1])  # a run that began before the branch moved
try:
    found(init_revision="v9")
except ValueError as error:
    print("refused", error)
"""


def test_a_revision_of_a_hub_is_pinned_to_its_commit(objectives, experts, tmp_path):
    """A tag or a branch is resolved once; the digest is that of the files of that commit."""
    first = {p.name: p.read_bytes() for p in experts[0].iterdir()}
    saved(tmp_path / "other", objectives, "Qwen3Moe", head_dim=8, **EXPERTS, num_hidden_layers=2)
    second = {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    with Hub() as hub:
        hub.repositories["org/m"] = Repository("org/m", private=False)
        one, two = (hub.repositories["org/m"].commit(files) for files in (first, second))
        hub.repositories["org/m"].tags["v1"] = one
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        environment["HF_HUB_DISABLE_XET"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", REVISIONS, one],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    *lines, refused = done.stdout.splitlines()
    digests = {one: policy_digest(str(experts[0])), two: policy_digest(str(tmp_path / "other"))}
    assert lines == [f"{commit} {digests[commit]}" for commit in (one, two, two, one)]
    assert refused.startswith("refused model.init: hf://org/m: ")
    assert "v9" in refused
    recipe = recipe_of(experts[0])
    with pytest.raises(DataError, match="only a repository of a hub has revisions"):
        pinned(replace(recipe, model=replace(recipe.model, init_revision="v1")), None)
