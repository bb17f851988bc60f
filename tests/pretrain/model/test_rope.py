"""Rotary frequencies are those of `transformers`; heads of any size, norms and biases on every part of the model alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.pretrain.model.model_fakes import make_batch, make_config
from tests.pretrain.model.test_pipeline import make_stages, run_stages
from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.pipeline import partition, pipeline_inputs
from tiphys.pretrain.model.rope import Rope
from tiphys.pretrain.model.transformer import DecisionModel

SHAPE = {
    "head_size": 12,
    "qk_norm": True,
    "qkv_bias": True,
    "first_dense": 2,
    "rope": {"type": "yarn", "factor": 3.0, "original_length": 8},
}


@pytest.mark.parametrize(
    ("rope", "theirs"),
    [
        (Rope(500.0, "linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
        (
            Rope(5e5, "llama3", factor=8.0, original_length=512),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        (
            Rope(1e4, "yarn", factor=4.0, original_length=64),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            Rope(1e4, "yarn", factor=4.0, original_length=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.5,
            },
        ),
    ],
)
def test_frequencies_are_those_of_transformers(rope, theirs):
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters={"rope_theta": rope.theta, **theirs})
    wanted, scale = ROPE_INIT_FUNCTIONS[rope.type](config, "cpu")
    torch.testing.assert_close(rope.frequencies(32), wanted, rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(scale)
    assert Rope.of(rope.theta, rope.values()) == rope


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "dynamic"}, "type 'dynamic'; allowed: default, linear, llama3, yarn"),
        ({"type": "linear", "beta_fast": 2.0}, "rope of type linear has no 'beta_fast'"),
        ({"type": "linear", "factor": "two"}, "rope, factor: 'two' is not a number"),
        ({"type": "llama3", "low_frequency": 4.0}, "low_frequency is not below high_frequency"),
    ],
)
def test_a_config_with_other_positions_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        make_config(rope=values)


def test_every_shape_of_attention_is_the_same_in_stages():
    config = make_config(**SHAPE)
    assert [config.has_experts(i) for i in range(4)] == [False, False, False, True]
    plain = DecisionModel(config, seed=9).train()
    assert plain.layers[0].attention.qkv.bias.shape == (8 * 12,)
    assert plain.layers[0].attention.out.weight.shape == (32, 48)
    stages, batch = make_stages(config, partition(config, 2), seed=9), make_batch(seed=1)
    out = plain(to_tensors(batch), batch.targets, batch.real_tokens)
    loss = run_stages(stages, pipeline_inputs(to_tensors(batch), config, batch.targets, batch.real_tokens))
    torch.testing.assert_close(loss, out.loss.detach())
    out.loss.backward()
    for name in ("attention.q_norm.weight", "attention.qkv.bias"):
        there = stages[0].get_parameter(f"2.{name}").grad
        torch.testing.assert_close(there, plain.layers[0].get_parameter(name).grad)
        assert there.abs().sum() > 0


def test_operations_follow_the_size_of_a_head():
    config = make_config(num_experts=0, embedders={}, regressions={}, head_size=12)
    batch = make_batch(bidirectional=False)
    batch = replace(batch, embedded={}, regression={}, target=np.full_like(batch.target, -1))
    lengths = to_tensors(batch)["windows"][:, 0].double()
    pairs = 3 * 4 * 4 * 48 * float((lengths * (lengths + 1) / 2).sum())
    matrices = sum(
        p.numel() for n, p in DecisionModel(config).named_parameters() if n.startswith("layers") and p.dim() > 1
    )
    assert flops_per_batch(config, batch) == pytest.approx(6 * matrices * batch.real_tokens + pairs)


def test_the_shape_survives_a_file(tmp_path):
    config = make_config(**SHAPE)
    config.save_pretrained(tmp_path)
    again = DecisionConfig.from_pretrained(tmp_path)
    assert (again.head_size, again.qk_norm, again.qkv_bias, again.first_dense) == (12, True, True, 2)
    assert again.rope == config.rope


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_size": 7}, "model.head_size: 7 is an odd number"), ({"first_dense": 4}, "4 leaves no layer with experts")],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
