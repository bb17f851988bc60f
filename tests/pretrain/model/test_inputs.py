"""From TokenBatch to compact tensors: no token is lost, no padding is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import RANGES, make_batch, make_config
from tiphys.pretrain.model.bits import from_bits
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.flops import flops_per_batch, parameters
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TokenBatch


def test_every_real_token_appears_once_and_windows_are_consecutive():
    batch = make_batch(rows=5)
    inputs = to_tensors(batch)
    index = inputs["index"].numpy()
    assert sorted(index) == np.flatnonzero(batch.segment.reshape(-1)).tolist()
    at = 0
    for length, causal, prefix in inputs["windows"].tolist():
        part = index[at : at + length]
        assert (np.diff(part) == 1).all()
        assert len(set(zip(part // batch.length, batch.segment.reshape(-1)[part]))) == 1
        assert batch.causal.reshape(-1)[part].tolist() == [bool(causal) and i >= prefix for i in range(length)]
        assert (inputs["attributes"][at : at + length, 0].numpy() == np.arange(length)).all()
        at += length
    assert at == batch.real_tokens


def test_targets_keep_position_weight_and_task():
    batch = make_batch(rows=5)
    inputs = to_tensors(batch)
    index, found = inputs["index"].numpy(), 0
    for i in range(len(RANGES) + 1):
        place, task, _, target = inputs[f"target/{i}"].numpy().T
        weight = from_bits(inputs[f"target/{i}"][:, 2]).numpy()
        flat = index[place]
        assert (batch.softmax.reshape(-1)[flat] == i).all()
        for name, values in (("target", target), ("task", task), ("weight", weight)):
            assert (getattr(batch, name).reshape(-1)[flat] == values).all()
        found += len(flat)
    assert found == (batch.target >= 0).sum()
    r, got = batch.regression["action:6"], inputs["regression/action:6"]
    assert (index[got[:, 0].numpy()] == r.index).all()
    assert np.array_equal(from_bits(got[:, 3:]).numpy(), r.value)


def test_unpack_restores_rows():
    batch = make_batch(rows=3)
    inputs = to_tensors(batch)
    rows = unpack(inputs["tokens"][:, None].float(), inputs, 3, batch.length)[..., 0]
    assert (rows.numpy() == batch.tokens * (batch.segment > 0)).all()


def test_split_segments_and_mixed_causality_are_refused():
    batch = make_batch(rows=2)
    segment = batch.segment.copy()
    segment[1, 1] = 9
    with pytest.raises(ValueError, match="row 1: the positions of segment 1 "):
        to_tensors(replace(batch, segment=segment))
    causal = batch.causal.copy()
    first = np.flatnonzero(batch.segment[0] == 1)
    causal[0, first] = True
    causal[0, first[-1]] = False
    with pytest.raises(ValueError, match="not causal stands behind"):
        to_tensors(replace(batch, causal=causal))


def test_filler_rows_add_no_tokens():
    batch = make_batch(rows=2)
    a, b = to_tensors(batch), to_tensors(batch.fill(5))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(to_tensors(TokenBatch.empty(0, 40, 3))["index"]) == 1


def test_flops_follow_parameters_and_windows():
    config = make_config(num_experts=0, embedders={}, regressions={})
    batch = make_batch(rows=4, bidirectional=False)
    batch = replace(batch, embedded={}, regression={}, target=np.full_like(batch.target, -1))
    lengths = to_tensors(batch)["windows"][:, 0].double()
    attention = 3 * 4 * 4 * 32 * float((lengths * (lengths + 1) / 2).sum())  # 4 layers, two products, half of the pairs
    model = DecisionModel(config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("layers") and p.dim() > 1)
    assert flops_per_batch(config, batch) == pytest.approx(6 * matrices * batch.real_tokens + attention)
    assert flops_per_batch(config, batch.fill(9)) == flops_per_batch(config, batch)


def test_number_of_active_parameters():
    dense, sparse = make_config(num_experts=0), make_config(num_experts_per_tok=1, shared_expert=False)
    assert parameters(sparse)[0] > parameters(dense)[0]
    assert parameters(sparse)[1] == parameters(dense)[1] + 2 * 4 * 32  # the routers


def test_config_round_trip(tmp_path):
    config = make_config(bias_rate=0.001, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    again = DecisionConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert again.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 30}, "heads"), ({"num_key_value_heads": 3}, "kv_heads"), ({"num_experts_per_tok": 9}, "experts")],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
