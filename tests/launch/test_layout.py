"""`tiphys layout`: what fits, what to change, and the layout that the system chooses."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.pretrain import synthetic
from tiphys.launch import layout, layout_auto, layout_command
from tiphys.launch.layout import _freeze, changed, predict, remedies
from tiphys.launch.layout_batches import largest_rows
from tiphys.launch.layout_lines import lines
from tiphys.launch.layout_rates import table_rates
from tiphys.launch.run import _memory_line
from tiphys.pretrain.distributed import layer_costs
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.engine import freeze
from tiphys.pretrain.model.counting import Part
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import LayoutError
from tiphys.recipes.automatic import KEYS, open_keys, with_defaults
from tiphys.recipes.load import RecipeError, load_recipe
from tiphys.recipes.schema import Recipe

CONFIG = synthetic.config(num_hidden_layers=2)
DENSE = synthetic.config(num_hidden_layers=2, num_experts=0)
WORST = [typical_batch(CONFIG, 8, 64)]
GIB = 2**30
PLAN: Any = SimpleNamespace(
    rows=1, many=lambda steps, rows: [SimpleNamespace(row=np.zeros(1, int), tokens=np.array([64]))]
)


def recipe(stage: int = 1, **sections: Any) -> Recipe:
    section = {"train_batch_size": 64, "zero_optimization": {"stage": stage}}
    return synthetic.recipe(**{"deepspeed": section, "objectives": {"gato": {"context": 64}}} | sections)


def test_a_stage_holds_as_many_micro_batches_as_the_schedule_has_in_flight() -> None:
    section = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    config = synthetic.config(num_hidden_layers=4, num_experts=0)
    found = predict(recipe(deepspeed=section, parallel={"pipeline": 4}), config, WORST, 4, device="cpu")
    assert [(s.name, s.in_flight) for s in found.stages] == [("first", 4), ("middle", 3), ("last", 1)]
    assert found.bubble == pytest.approx(3 / 11)
    assert not found.cut
    assert "measured times" in "\n".join(lines(found))


def test_stages_are_those_of_the_run_if_they_are_known() -> None:
    config = synthetic.config(num_hidden_layers=6, num_experts=0)
    known = {"bounds": [0, 3, 4, 7, 10], "device": "cpu", "counted": False}
    found = predict(recipe(parallel={"pipeline": 4}), config, WORST, 4, **known)
    assert [s.layers for s in found.stages] == [(0, 3), (4, 7), (7, 10)]
    assert found.cut


def test_stages_hold_what_they_receive() -> None:
    config = synthetic.config(num_hidden_layers=4, num_experts=0)
    made = recipe(parallel={"pipeline": 2})
    stages = predict(made, config, WORST, 2, device="cpu").stages
    largest = max(p.numel() for p in DecisionModel(config).parameters())
    received = layout.COPIES * 64 * 64 * config.hidden_size  # 64 rows of 64 positions
    first, last = (stage.peak.communication for stage in stages)
    assert first >= 4 * largest
    assert last >= 4 * (largest + received)


def test_popular_experts_are_part_of_what_is_needed() -> None:
    (stage,) = predict(recipe(parallel={"expert": 2}), CONFIG, WORST, 2).stages
    assert stage.peak.total > stage.even.total
    (whole,) = predict(recipe(), CONFIG, WORST, 2).stages
    assert whole.peak == whole.even  # all tokens may go to one expert: the rows are the same


def test_what_does_not_fit_says_what_to_change() -> None:
    one = recipe()
    needs = predict(one, DENSE, WORST, 2, device="cpu")
    advice = remedies(one, DENSE, WORST, 2, needs.peak - 1, device="cpu")
    assert advice[0] == "micro-batch 16"
    assert predict(*changed(one, DENSE, {"micro_batch": 16}), WORST, 2, device="cpu").peak < needs.peak
    assert remedies(one, DENSE, WORST, 2, 1000, device="cpu") == []
    assert "does not fit" in lines(needs, needs.peak - 1)[-1]


def test_a_layout_that_the_engine_refuses_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.pipeline"):
        predict(recipe(parallel={"pipeline": 3}), CONFIG, WORST, 6)


def chosen(memory: int, keys: tuple[str, ...] = ("pipeline", "zero_stage", "micro_batch")) -> list[layout_auto.Choice]:
    rates = table_rates("A100")
    return layout_auto.choices(recipe(), DENSE, WORST, 2, keys, memory, device="cpu", rates=rates)


def test_the_choice_is_the_same_each_time_fits_and_is_the_fastest() -> None:
    found = chosen(GIB)
    assert len(found) == layout_auto.SHOWN
    assert len({str(c.values) for c in found}) == layout_auto.SHOWN
    times = [c.needs.seconds or 0.0 for c in found]
    assert times == sorted(times)
    keys, most = ("micro_batch",), found[0].needs.peak
    less = chosen(most - 1, keys)
    assert all(c.needs.peak < most for c in less)
    assert [c.values for c in less] == [c.values for c in chosen(most - 1, keys)]
    assert chosen(1000) == []


def test_open_keys_are_valid_until_they_are_filled() -> None:
    raw: dict[str, Any] = {
        "parallel": {"auto": True, "pipeline": "auto"},
        "deepspeed": {"zero_optimization": {"stage": "auto"}},
    }
    assert open_keys(raw) == ["pipeline", "zero_stage"]
    assert with_defaults(raw)["parallel"]["pipeline"] == 1
    assert raw["parallel"]["pipeline"] == "auto"
    raw["parallel"]["auto"] = False
    assert open_keys(raw) == []
    assert set(KEYS) >= {"expert", "micro_batch", "checkpointing"}


def test_auto_without_the_switch_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"parallel\.pipeline"):
        load_recipe("bc", ["parallel.pipeline=auto"])


def test_a_resumed_run_keeps_its_layout_unless_the_world_changed(tmp_path: Any) -> None:
    file = tmp_path / layout_command.FILE
    file.write_text('{"world": 4, "overrides": ["parallel.pipeline=2"]}')
    assert layout_command._kept(file, 4, ["pipeline"]) == ["parallel.pipeline=2"]
    assert layout_command._kept(file, 8, ["pipeline"]) == []
    assert layout_command._kept(file, 4, ["pipeline", "expert"]) == []
    assert layout_command._kept(tmp_path / "none", 4, ["pipeline"]) == []


@pytest.mark.parametrize(
    "pattern",
    [
        "token.*",
        "embedding.*",
        "embedding.values.vector_*",
        "*.layers_1.*",
        "layers.1.*",
        "*experts*",
        "head.*",
        "output.*",
    ],
)
def test_a_pattern_freezes_the_parameters_that_it_freezes_in_the_run(pattern: str) -> None:
    spec = CONFIG.embedders["vector:state:5"]
    config = synthetic.config(num_hidden_layers=2, embedders={"vector:state:5": spec, "layers_1": spec})
    with torch.device("meta"):
        model, part = DecisionModel(config), Part(config)
    freeze(model, [pattern])
    _freeze(part, [pattern])
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {part.canonical_name(name): p.requires_grad for name, p in part.named_parameters()} == expected


def test_frozen_weights_have_no_masters() -> None:
    frozen = dataclasses.replace(recipe(), model=dataclasses.replace(recipe().model, freeze=["layers.*"]))
    some, every = (predict(r, DENSE, WORST, 2, device="cpu").stages[0].peak for r in (frozen, recipe()))
    assert some.masters < every.masters
    assert some.weights == every.weights


def test_a_calibrated_layout_cuts_stages_by_measured_times_unless_the_recipe_does_not() -> None:
    found, none = (
        layout_command.Measured(2, "cpu")(recipe(parallel={"pipeline": 2, "measure": measure}), DENSE)
        for measure in (True, False)
    )
    assert list(found) == [0, 3, 6]  # two blocks: there is one way
    assert list(none) == []


def test_what_is_proposed_and_compared_is_cut_by_measured_times_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layers take nearly all the time, so the first stage gets nearly all layers, and needs more memory."""
    times = [1e-3] * 7 + [1.0] * 2
    timed: list[int] = []

    def layer_seconds(config: Any, rows: int, *_: Any, **__: Any) -> list[float]:
        timed.append(rows)
        return times

    monkeypatch.setattr(layer_costs, "layer_seconds", layer_seconds)
    deep, cut = synthetic.config(num_hidden_layers=6, num_experts=0), layout_command.Measured(2, "cpu")
    two = recipe(parallel={"pipeline": 2})
    by_operations, measured = (predict(two, deep, WORST, 2, device="cpu", bounds=b).peak for b in ((), cut(two, deep)))
    assert measured > by_operations
    for how in (layout.by_operations, cut):
        options: dict[str, Any] = {"device": "cpu", "rates": table_rates("A100"), "cut": how}
        assert layout_auto.choices(two, deep, WORST, 2, ("zero_stage",), GIB, **options)[0].needs.cut is (how is cut)
    tight = measured - 1  # enough for the stages by operations, too little for those of the run
    seen: list[Any] = []

    def fits(*given: Any) -> bool:
        seen.append(given[-1])
        return False

    monkeypatch.setattr(layout, "_fits", fits)
    remedies(two, deep, WORST, 2, tight, device="cpu", cut=cut)
    assert set(seen) == {cut}
    assert len(timed) == len(set(timed))  # once for each size of a micro-batch


def test_the_line_of_a_run_is_for_the_largest_rows_of_its_plan() -> None:
    def planned(step: int) -> Any:
        row, tokens = np.array([0, 0, 1, 2]), np.array([10, 20, 40, 5 + step])
        return SimpleNamespace(row=row, tokens=tokens)

    plan: Any = SimpleNamespace(rows=4, many=lambda steps, rows: [planned(step) for step in steps])
    one = dataclasses.replace(recipe(), train=dataclasses.replace(recipe().train, steps=7))
    assert largest_rows(one, plan, 2) == (35, 7)  # rows 0 and 1
    assert largest_rows(one, plan, 1) == (40, 7)
    long = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=1000))
    assert largest_rows(long, plan, 2) == (150, 256)  # 260 and 40 at step 255


def test_the_line_of_a_run_is_for_the_stages_as_they_were_cut() -> None:
    config = synthetic.config(num_hidden_layers=4, num_experts=0)
    uneven, even = (
        _memory_line(
            recipe(parallel={"pipeline": 2}),
            PLAN,
            SimpleNamespace(
                config=config, micro_batch=2, bounds=bounds, world=SimpleNamespace(world=2, device=torch.device("cpu"))
            ),
        )
        for bounds in ([0, 5, 8], [0, 4, 8])
    )
    assert uneven != even
