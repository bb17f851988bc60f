"""Stages connected by hand, in DeepSpeed's way, against the plain model."""

import itertools

import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.model.pipeline import canonical_name, partition, pipeline_inputs, pipeline_layers
from tiphys.pretrain.model.transformer import DecisionModel


def make_stages(config, bounds, seed):
    """The stages as modules with DeepSpeed's parameter names."""
    stages = []
    for start, stop in itertools.pairwise(bounds):
        stage = torch.nn.Module()
        for i in range(start, stop):
            kind, arguments = pipeline_layers(config)[i]
            stage.add_module(str(i), kind(*arguments))
        initialise(stage, seed, lambda name: canonical_name(name, config))
        stages.append(stage.train())
    return stages


def run_stages(stages, tensors):
    """Forward through all stages with tensors detached between them, then backward stage by stage through the one float."""
    inputs, outputs = [], []
    for stage in stages:
        tensors = tuple(t.clone().detach().requires_grad_(t.is_floating_point()) for t in tensors)
        inputs.append(tensors)
        for layer in stage.children():
            tensors = layer(tensors)
        outputs.append(tensors)
    loss = outputs[-1]
    loss.backward()
    for i in range(len(stages) - 2, -1, -1):
        floats = [t for t in outputs[i] if t.is_floating_point()]
        assert len(floats) == 1
        assert outputs[i][0] is floats[0]
        floats[0].backward(inputs[i + 1][0].grad)
    return loss.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_equal_the_plain_model(stages, checkpointing):
    config = make_config(balance=0.5, z_loss=0.5, checkpointing=checkpointing)
    plain = DecisionModel(config, seed=9).train()
    parts = make_stages(config, partition(config, stages), seed=9)
    for moe in [*mixtures(plain), *(m for p in parts for m in mixtures(p))]:
        moe.previous.copy_(torch.tensor([5, 1, 9, 2]))
    expected = 0.0
    batches = [make_batch(seed=1), make_batch(rows=2, seed=2)]
    for batch in batches:
        out = plain(to_tensors(batch), batch.targets, batch.real_tokens, 3.0)
        (3 * out.loss).backward()
        expected += out.loss.detach()
    got = 0.0
    for batch in batches:
        tensors = pipeline_inputs(to_tensors(batch), config, batch.targets / 3, batch.real_tokens, 3.0)
        got += run_stages(parts, tensors) / 3
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    names = set()
    for part in parts:
        for name, parameter in part.named_parameters():
            name = canonical_name(name, config)
            names.add(name)
            other = plain.get_parameter(name)
            assert torch.equal(parameter, other), name
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert names == {n for n, _ in plain.named_parameters()}
    assert torch.equal(torch.cat([step_counts(p)[0] for p in parts if mixtures(p)]), step_counts(plain)[0])


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_partition_covers_all_layers_and_balances_costs(stages):
    config = make_config(num_hidden_layers=8)
    bounds = partition(config, stages)
    assert bounds[0] == 0
    assert bounds[-1] == 12
    assert len(bounds) == stages + 1
    for start, stop in itertools.pairwise(bounds):
        assert min(stop, 10) > max(start, 2)  # a block on every stage
    costs = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 4]
    uneven = partition(config, 2, costs=costs)
    assert uneven == [0, 8, 12]  # 6 | 2 + 4


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"model\.layers"):
        partition(make_config(), 5)
