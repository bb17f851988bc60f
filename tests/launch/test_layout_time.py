"""The time of a step: sums of what was measured. And the measurement itself."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.test_layout import CONFIG, DENSE, WORST, recipe
from tiphys.launch import layout_rates
from tiphys.launch.layout import Needs, predict
from tiphys.launch.layout_calibration import MOST_PARAMETERS, _measurable, calibrate
from tiphys.launch.layout_rates import Rates, measured_rates
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.model.transformer import DecisionModel

PLAIN = Rates(flops=1e9, memory=1e30, link=1e30, basis="")


def needs(stage: int = 1, micro_batch: int = 8, world: int = 1, rates: Rates = PLAIN, **sections: Any) -> Needs:
    section = {"train_batch_size": 8 * world, "train_micro_batch_size_per_gpu": micro_batch}
    made = recipe(deepspeed={**section, "zero_optimization": {"stage": stage}}, **sections)
    return predict(made, DENSE, WORST, world, device="cpu", counted=False, rates=rates)


def seconds(*given: Any, **more: Any) -> float:
    return needs(*given, **more).seconds or 0.0


def test_passes_take_their_operations_and_a_start_for_each_layer_and_micro_batch() -> None:
    assert seconds() == pytest.approx(flops_per_batch(DENSE, WORST[0]) / 1e9)
    slow = dataclasses.replace(PLAIN, start=0.5)
    layers = DENSE.num_hidden_layers + 4
    assert seconds(rates=slow) - seconds() == pytest.approx(0.5 * layers)
    assert seconds(micro_batch=2, rates=slow) - seconds(micro_batch=2) == pytest.approx(0.5 * layers * 4)


def test_the_slowest_stage_sets_the_pace() -> None:
    """Two stages: the first has two embedding layers and a block, the second a block and the output."""
    even = seconds(world=2) / 2  # of half of the rows
    two = needs(world=2, micro_batch=4, parallel={"pipeline": 2})
    assert two.derived.accumulation == 4
    assert two.bubble == pytest.approx(1 / 5)
    paced = two.seconds or 0.0
    assert paced > even * 2 * 5 / 4  # two stages of unequal operations, 4 micro-batches, a bubble of one
    assert paced < 2 * even * 2 * 5 / 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_handling_of_gradients_is_that_of_the_stage(stage: int) -> None:
    handling = {str(s): (1e-6 * (s + 1), 1e-7 * (s + 1)) for s in range(4)}
    rates = dataclasses.replace(PLAIN, handling=handling)
    more = seconds(stage, 2, rates=rates) - seconds(stage, 2)
    first, each = handling[str(stage)]
    assert more == pytest.approx(needs().parameters * (first + 3 * each))  # 8 rows in micro-batches of 2


def test_recomputation_takes_what_was_measured_or_a_third_more() -> None:
    deep = copy.deepcopy(DENSE)
    deep.checkpointing = True
    both = [
        predict(recipe(), config, WORST, 1, device="cpu", counted=False, rates=rates).seconds or 0.0
        for config, rates in (
            (DENSE, PLAIN),
            (deep, PLAIN),
            (deep, dataclasses.replace(PLAIN, recomputed=(0.5e9, 0.0))),
        )
    ]
    assert both[1] / both[0] == pytest.approx(4 / 3)
    assert both[2] / both[0] == pytest.approx(2)


def test_tokens_that_are_sent_to_experts_and_stages_take_their_time() -> None:
    section = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}

    def of(rates: Rates, **parallel: int) -> float:
        made = recipe(deepspeed=section, parallel=parallel)
        return predict(made, CONFIG, WORST, 2, device="cpu", counted=False, rates=rates).seconds or 0.0

    slow = dataclasses.replace(PLAIN, exchange=1.0, hop=100.0)
    sparse = sum(map(CONFIG.has_experts, range(CONFIG.num_hidden_layers)))
    assert of(slow) == of(PLAIN)
    assert of(slow, expert=2) - of(PLAIN, expert=2) == pytest.approx(2 * sparse)  # 2 micro-batches on each rank
    assert of(slow, pipeline=2) - of(PLAIN, pipeline=2) == pytest.approx(5 * 100)  # 4 and the bubble


def test_a_stage_that_was_not_measured_costs_nothing_more() -> None:
    assert PLAIN.handled(3, 10**9, 4) == 0.0


def test_a_large_model_is_measured_with_fewer_layers() -> None:
    assert _measurable(DENSE, MOST_PARAMETERS).num_hidden_layers == DENSE.num_hidden_layers
    deep = copy.deepcopy(DENSE)
    deep.num_hidden_layers, deep.hidden_size, deep.intermediate_size = 64, 2048, 4096
    made = _measurable(deep, MOST_PARAMETERS)
    assert 1 <= made.num_hidden_layers < 64
    with torch.device("meta"):
        assert sum(p.numel() for p in DecisionModel(made).parameters()) <= MOST_PARAMETERS
    assert deep.num_hidden_layers == 64


def test_a_machine_is_measured_by_as_many_processes_as_train_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_rates, "rates_file", lambda: tmp_path / "rates.json")
    assert measured_rates(4) is None
    found = calibrate(CONFIG, WORST[0], 4, 2)
    assert "2 processes at once" in found.basis
    assert min(found.flops, found.memory, found.link) > 0
    assert min(found.start, found.exchange, found.hop) >= 0
    assert found.recomputed is not None
    assert found.passes(True)[0] > 0
    assert list(found.handling) == ["0", "1", "2", "3"]
    assert all(first >= 0 and further >= 0 for first, further in found.handling.values())
    kept = measured_rates(4)
    assert kept is not None
    assert kept.handled(1, 1000, 3) == pytest.approx(found.handled(1, 1000, 3))
    assert seconds(rates=kept) > 0
