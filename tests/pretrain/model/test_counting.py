"""Counted bytes against those that torch's allocator records on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.pretrain import synthetic
from tests.pretrain.model.allocator import peak_bytes
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.model.counting import Part, Pass, count_pass
from tiphys.pretrain.model.inputs import scalars, to_tensors
from tiphys.pretrain.model.moe import mixtures
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.model.transformer import DecisionModel

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
}
ODD = {"hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 101, "moe_intermediate_size": 37}
IMAGES = {"embedders": {"image": {"kind": "patch", "shape": [16, 16, 3], "values": 0}}}


def compare(dtype: torch.dtype, *, rows: int = 2, length: int = 128, short: bool = False, **config: Any) -> float:
    """Relative error of the counted peak of both passes, the larger one of two micro-batches."""
    made = synthetic.config(**(SIZES | config))
    inputs = to_tensors(synthetic.rows_of(0, list(range(16))) if short else typical_batch(made, rows, length))
    model = DecisionModel(made).to(dtype).train()

    def passes() -> None:
        out = model(inputs)
        out.loss.backward()

    passes()
    model.zero_grad(set_to_none=True)
    for mixture in mixtures(model):
        mixture.counts = mixture.losses = None
    real = peak_bytes(passes), peak_bytes(passes)
    found = count_pass(Part(made).to(dtype), inputs)
    return max(abs(mine / its - 1) for mine, its in zip((found.peak, found.again), real, strict=True))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {"num_experts": 0}),
        (torch.bfloat16, {}),
        (torch.float32, {"checkpointing": True, "num_key_value_heads": 2}),
        (torch.float32, ODD),
        (torch.bfloat16, {"short": True, "tie_word_embeddings": True}),
        (torch.float32, IMAGES),
    ],
)
def test_counted_bytes_are_those_of_the_allocator(dtype: torch.dtype, config: dict[str, Any]) -> None:
    assert compare(dtype, **config) < 0.01


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        *(
            {"num_experts": experts, "checkpointing": again, "short": short}
            for experts, again, short in itertools.product((0, 4), (False, True), (False, True))
        ),
        ODD,
        IMAGES,
        {**IMAGES, "num_experts": 0, "length": 64},
        {**IMAGES, "rows": 4, "length": 256},
        {"embedders": {"grid": {"kind": "grid", "shape": [7, 7, 3], "values": 12}}},
        {"vocab_size": 256_000, "rows": 1},
        {"num_experts_per_tok": 1, "shared_expert": True},
    ],
)
def test_counted_bytes_of_many_models(dtype: torch.dtype, config: dict[str, Any]) -> None:
    assert compare(dtype, **config) < 0.01


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_heavy_first_stage(dtype: torch.dtype) -> None:
    made = synthetic.config(**(SIZES | IMAGES | {"num_experts": 0}))
    inputs = to_tensors(typical_batch(made, 4, 256))
    first, later = ({"first": 0, "last": 3}, {"first": 3})
    real = Part(made, **first).to_empty(device="cpu").to(dtype)
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def passes() -> None:
        layout = TokenLayout(inputs["windows"], inputs["attributes"], scalars(1.0, 1.0, 1.0, torch.device("cpu")))
        out, _ = real(None, inputs, layout)
        out.backward(torch.empty_like(out))

    passes()
    real.zero_grad(set_to_none=True)
    found = count_pass(Part(made, **first).to(dtype), inputs)
    assert found.peak == pytest.approx(peak_bytes(passes), rel=0.01)
    assert found.peak > 3 * count_pass(Part(made, **later).to(dtype), inputs).peak


def counted(**changes: Any) -> Pass:
    config = synthetic.config(**SIZES)
    inputs = to_tensors(typical_batch(config, 2, 64))
    given = {name: changes.pop(name) for name in ("ranks", "imbalance", "first", "last") if name in changes}
    return count_pass(Part(config, **given), inputs, **changes)


def test_stages_of_a_pipeline_hold_less_than_the_whole_model() -> None:
    whole, first, last = counted(), counted(first=0, last=3), counted(first=3)
    assert first.kept + last.kept >= whole.kept * 0.99
    assert max(first.peak, last.peak) < whole.peak
    assert first.gradients + last.gradients == whole.gradients


def test_uneven_routing_takes_more_memory_only_if_experts_are_divided() -> None:
    even, uneven = counted(ranks=2, imbalance=1.0), counted(ranks=2, imbalance=2.0)
    assert even.peak < uneven.peak
    assert even.gradients == uneven.gradients < counted().gradients
    assert counted(ranks=2, imbalance=9.0) == uneven  # no more than all rows of the group arrive


def test_a_gpu_rounds_to_blocks_of_512_bytes() -> None:
    found = counted(device="cuda")
    assert found.peak % 512 == found.kept % 512 == 0


def test_nothing_of_a_model_of_100_billion_parameters_is_made() -> None:
    config = synthetic.config(
        hidden_size=32768, num_hidden_layers=5, num_attention_heads=64, intermediate_size=139264, num_experts=0
    )
    part = Part(config).to(torch.bfloat16)
    assert sum(p.numel() for p in part.parameters()) > 80e9
    found = count_pass(part, to_tensors(typical_batch(synthetic.config(), 1, 64)))
    assert found.gradients > 160e9
