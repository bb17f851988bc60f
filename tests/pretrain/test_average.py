"""The moving average of the weights: its values, and what policies are made from. That every layout keeps it is tested with the
checkpoints."""

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.pretrain import layouts, synthetic
from tiphys.launch.checks.model import average_errors
from tiphys.pretrain.checkpoint import Checkpoint, export_weights, optimizer_state
from tiphys.pretrain.checkpoint_files import CheckpointError, folder_of
from tiphys.pretrain.checkpoint_weights import RangeReader, SavedWeights
from tiphys.pretrain.parallel import ParallelDims

DECAY = 0.15


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


def checkpoint(run: Path, steps: int, decay: float) -> Checkpoint:
    job = {"name": "it", "steps": steps, "save_at": steps, "run": str(run), "train": {"ema": {"decay": decay}}}
    layouts.do(job)
    return Checkpoint.open(folder_of(run, steps))


@pytest.fixture(scope="module")
def saved(world: object, tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The same run after one, two and three steps."""
    root = tmp_path_factory.mktemp("average")
    return [checkpoint(root / str(steps), steps, DECAY) for steps in (1, 2, 3)]


def test_it_is_the_average_of_its_definition(saved: list[Checkpoint]) -> None:
    model = layouts.model_of({"name": "it"})
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, found in enumerate(saved):
        kept = min(DECAY, (1 + step) / (10 + step))
        state = optimizer_state(found)
        for name, average in expected.items():
            average.mul_(kept).add_(state[name]["master"] * (1 - kept))
            torch.testing.assert_close(state[name]["ema"], average, rtol=0, atol=1e-7)
    assert any((state[name]["ema"] != state[name]["master"]).any() for name in expected)


def test_a_policy_takes_the_average_or_not(saved: list[Checkpoint]) -> None:
    last = saved[-1]
    state, raw, auto = optimizer_state(last), export_weights(last), export_weights(last, weights="auto")
    assert raw.keys() == auto.keys()
    for name, keys in state.items():
        if "ema" in keys:
            assert torch.equal(raw[name], keys["master"])
            assert torch.equal(auto[name], keys["ema"])
    half = export_weights(last, torch.bfloat16, "ema")
    assert half["token.weight"].dtype == torch.bfloat16


def test_without_an_average_none_is_published(world: object, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, 1, 0.0)
    with RangeReader(found) as reader:
        assert not SavedWeights(found, reader, weights="auto").averaged
        with pytest.raises(CheckpointError, match=r"has no averages of the weights; set `train.ema.decay`"):
            SavedWeights(found, reader, weights="ema")
    [(key, _)] = average_errors(synthetic.recipe(publish={"weights": "ema"}))
    assert key == "publish.weights"
    assert not list(average_errors(synthetic.recipe(publish={"weights": "ema"}, train={"ema": {"decay": 0.9}})))
