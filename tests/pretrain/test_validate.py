"""Open-loop action errors against a loop, and means from sums over held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pretrain import synthetic
from tiphys.pretrain.action_error import action_errors
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.validate import ValidationResult


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
        np.testing.assert_allclose(action_errors(model, output, inputs), expected, rtol=1e-5)
    assert expected.min() >= 0
    assert (expected[:, 0] > 0).all()


def test_means_are_by_task() -> None:
    result = ValidationResult(
        np.array([[4.0, 2.0, 2], [0, 0, 0], [1.0, 3.0, 1]]), np.array([[4.0, 1, 0, 0], [0] * 4, [0, 0, 2, 3.0]])
    )
    assert result.loss == pytest.approx(5 / 3)
    assert result.to_json(["reach"]) == {
        "loss": result.loss,
        "targets": 3,
        "loss_by_task": {"reach": 1.0, "2": 3.0},
        "wrong_by_task": {"reach": 0.25},
        "error_by_task": {"2": 1.5},
    }
