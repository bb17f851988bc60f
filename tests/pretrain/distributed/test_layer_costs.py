"""Every kind of layer is timed with every kind of input."""

from __future__ import annotations

import pytest
import torch

from tests.pretrain import synthetic
from tiphys.pretrain.distributed.layer_costs import layer_seconds, typical_batch
from tiphys.pretrain.model.transformer import DecisionModel, build_layers

PATCHES = {"patch:2": {"kind": "patch", "shape": [4, 4, 3], "values": 0}}
GRIDS = {"grid:cells:3x3x2": {"kind": "grid", "shape": [3, 3, 2], "values": 5}}


@pytest.mark.parametrize(
    "changes",
    [
        {"embedders": PATCHES | GRIDS, "checkpointing": True, "num_experts_per_tok": 1},
        {"num_experts": 0, "embedders": {}, "regressions": {}, "tasks": [], "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_timed(changes: dict[str, object], dtype: torch.dtype) -> None:
    config = synthetic.config(**changes)
    state = torch.get_rng_state()
    seconds = layer_seconds(config, 2, 24, torch.device("cpu"), dtype, expert=4)
    assert len(seconds) == len(build_layers(config))
    assert all(0 < s < 10 for s in seconds)
    assert seconds[2] == seconds[4]  # layers of the same kind
    assert (seconds[2] == seconds[3]) == (config.num_experts == 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.num_experts in (0, 4)


def test_the_typical_batch_has_every_kind_of_input() -> None:
    config = synthetic.config(embedders=PATCHES | GRIDS)
    batch = typical_batch(config, 3, 600)
    assert batch.real_tokens == 1800
    assert {len(e.index) for e in batch.embedded.values()} == {600}
    assert batch.segment.max() == 3
    assert set(batch.regression) == set(config.regressions)
    from tiphys.pretrain.model.inputs import to_tensors

    out = DecisionModel(config)(to_tensors(batch))
    assert out.loss.isfinite()
    assert int(out.loss_by_task[:, 2].sum()) == batch.targets
