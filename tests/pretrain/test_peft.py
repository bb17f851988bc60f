"""The README's line on `peft`: it wraps a policy by the names of its parameters, and only what it adds is trained."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pretrain.token_fixtures import ARM, make, window
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.sections.model import Experts, Model

peft = pytest.importorskip("peft", reason="needs peft, which Tiphys does not install")

README = Path(__file__).parents[2] / "README.md"


def test_peft_wraps_a_policy() -> None:
    (names,) = re.findall(r"(?s)target_parameters=\[(.*?)\]", README.read_text(encoding="utf-8"))
    made = make([ARM], "bc", context=60)
    sizes = Model(layers=2, hidden=32, heads=2, moe=Experts(experts=4))
    model = DecisionModel(DecisionConfig.from_recipe(sizes, made.vocabulary), seed=1)
    rows = [[window(made, "arm", 4, np.random.default_rng(0))]]
    batch = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), rows, seed=0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model(to_tensors(batch), batch.targets, batch.real_tokens).loss.item()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_parameters=re.findall(r'"(.*?)"', names)))
    output = wrapped(to_tensors(batch), batch.targets, batch.real_tokens)
    assert output.loss.item() == pytest.approx(loss, rel=1e-6)  # what it adds begins at 0
    output.loss.backward()
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("experts" in name for name in trained)
    torch.optim.SGD(wrapped.parameters(), 1.0).step()
    merged = wrapped.merge_and_unload().state_dict()
    assert merged.keys() == before.keys() | {n for n in merged if "previous" in n or "bias_steps" in n}
    assert not torch.equal(merged["layers.0.attention.qkv.weight"], before["layers.0.attention.qkv.weight"])
    assert torch.equal(merged["token.weight"], before["token.weight"])
