"""Open-loop action errors against a loop, and means from sums over held-out rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain import synthetic
from tiphys.pretrain.action_error import NativeErrors, action_errors
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.sequence import placements
from tiphys.pretrain.validate import ValidationResult
from tiphys.recipes.sections.model import Experts, Model
from tiphys.recipes.sections.objective import FieldTokens


def test_action_errors_equal_a_loop_over_targets() -> None:
    config = synthetic.config()
    model = DecisionModel(config, seed=3).eval()
    batch = synthetic.rows_of(4, list(range(6)))
    inputs = to_tensors(batch)
    with torch.no_grad():
        output = model(inputs)
        hidden = unpack(output.hidden, inputs, batch.rows, batch.length)
        logits = hidden @ model.output.weight.T
        expected = np.zeros((3, 4))
        for r, t in np.argwhere(batch.target >= 0):
            low, high = (0, 48) if batch.softmax[r, t] == 0 else (32, 48)
            guess = low + int(logits[r, t, low:high].argmax())
            expected[batch.task[r, t], :2] += (1, guess != batch.target[r, t])
        regression = batch.regression["action:3"]
        for index, value in zip(regression.index, regression.value, strict=True):
            r, t = divmod(int(index), batch.length)
            guess = model.regress(hidden[r, t][None], "action:3")[0].numpy()
            expected[batch.task[r, t], 2:] += (1, np.abs(guess - value).mean())
        np.testing.assert_allclose(action_errors(model, output, inputs)[0], expected, rtol=1e-5)
    assert expected.min() >= 0
    assert (expected[:, 0] > 0).all()


def test_means_are_by_task() -> None:
    result = ValidationResult(
        np.array([[4.0, 2.0, 2, 0, 0], [0] * 5, [1.0, 3.0, 1, 0, 0]]),
        np.array([[4.0, 1, 0, 0], [0] * 4, [0, 0, 2, 3.0]]),
    )
    assert result.loss == pytest.approx(5 / 3)
    assert result.to_json(["reach"]) == {
        "loss": result.loss,
        "targets": 3,
        "loss_by_task": {"reach": 1.0, "2": 3.0},
        "wrong_by_task": {"reach": 0.25},
        "error_by_task": {"2": 1.5},
        "perplexity": {},
        "action_error": {},
    }


def test_perplexity_is_by_token_and_by_byte() -> None:
    sums = np.array([[0, 9.0, 5, 8 * np.log(2), 4], [0, 3.0, 2, 0, 0], [0, 1.0, 1, 1e9, 1]])
    found = ValidationResult(sums, np.zeros((3, 4)), text_bytes=np.array([8.0, 0, 0])).to_json(["book", "reach", "x"])
    assert found["perplexity"]["book"] == {"token": pytest.approx(4), "byte": pytest.approx(2)}
    assert "reach" not in found["perplexity"]
    assert np.isfinite(found["perplexity"]["x"]["token"])


def test_errors_by_field_are_means_in_the_units_of_the_data() -> None:
    fields, sums = [(0, "action.arm"), (0, "action.hand"), (1, "action")], np.array([[3.0, 2], [0, 0], [1.0, 4]])
    result = ValidationResult(np.zeros((2, 5)), np.zeros((2, 4)), fields, sums)
    assert result.to_json(["reach"])["action_error"] == {"reach": {"action.arm": 1.5}, "1": {"action": 0.25}}


@pytest.mark.parametrize("paradigm", ["bc", "dt", "gato"])
@pytest.mark.parametrize("discretise", ["yes", "no"])
def test_native_errors_are_those_of_the_actions_that_a_policy_would_take(paradigm: str, discretise: str) -> None:
    """Against the slow way: each predicted position by itself, decoded by the codec of its field."""
    tasks = [fixtures.ARM, fixtures.CAMERA]
    objectives = fixtures.make(tasks, paradigm, context=300, discretise=discretise)
    rng = np.random.default_rng(0)
    windows = [
        [fixtures.window(objectives, "arm", 3, rng), fixtures.window(objectives, "camera", 2, rng)] for _ in range(3)
    ]
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(3), windows, seed=0, training=False))
    sizes = Model(layers=1, hidden=16, heads=2, moe=Experts(experts=0))
    model = DecisionModel(DecisionConfig.from_recipe(sizes, objectives.vocabulary), seed=1).eval()
    native = NativeErrors(objectives.layouts)
    assert [(t, f) for t, f in native.fields] == [(0, "action"), (1, "action.arm"), (1, "action.hand")]
    inputs = to_tensors(batch)
    with torch.no_grad():
        output = model(inputs)
        hidden = unpack(output.hidden, inputs, batch.rows, batch.length)
        _, found = action_errors(model, output, inputs, native)
        wanted = np.zeros((3, 2))
        for r, row in enumerate(windows):
            for placed in placements(row, objectives.layouts, objectives.vocabulary, objectives.text):
                element = placed.element
                if element is None or element.role != "action":
                    continue
                window = row[placed.window]
                assert placed.step is not None
                true = window.fields[element.field][placed.step : placed.step + 1]
                states = hidden[r, placed.first - 1 : placed.first - 1 + placed.size]
                assert element.codec is not None
                if element.head:
                    guess = element.codec.decode(model.regress(states, element.head).numpy()[:, None])
                    true = element.codec.decode(element.codec.encode(true))
                else:
                    ids = [
                        low + int(model.logits(state[None])[0, low:high].argmax())
                        for state, (low, high) in zip(states, element.codec.choices(), strict=True)
                    ]
                    guess, true = (
                        element.codec.decode(np.array([ids])),
                        element.codec.decode(element.codec.encode(true)),
                    )
                difference = np.abs(guess.astype(float) - true.astype(float)).reshape(-1)
                if element.field == "action.hand":
                    difference = (difference > 0).astype(float)
                at = native.fields.index((window.task, element.field))
                wanted[at] += difference.sum(), difference.size
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted[:, 1] > 0).all()


def test_layouts_whose_ids_are_not_actions_alone_are_not_measured() -> None:
    objectives = fixtures.make([fixtures.ARM], "bc", context=60)
    (by_task,) = objectives.layouts
    hidden = {n: replace(layout, hiding=(("random", 1.0),)) for n, layout in by_task.items()}
    assert NativeErrors([hidden]).fields == []
    coarse = fixtures.make([fixtures.ARM], "bc", context=60, fields={"action": FieldTokens("uniform", bins=8)})
    both = NativeErrors([by_task, *coarse.layouts])
    assert both._entries == {}
