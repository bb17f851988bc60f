"""Weights of mixture lines that are chosen, and each line's share of the gradient."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.pretrain import synthetic
from tiphys.pretrain.balance import Balance, Line
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry


def balance(*auto: bool, weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Balance:
    names = "abc"[: len(auto)]
    lines = [Line(name, (name,), (i,), chosen) for i, (name, chosen) in enumerate(zip(names, auto, strict=True))]
    return Balance(lines, dict(zip(names, weights, strict=False)), len(lines))


def shares_after(of: Balance, losses: np.ndarray, steps: int = 300, first: int = 0) -> dict[str, float]:
    found: dict[str, float] = {}
    for step in range(first, first + steps):
        found = of.observe(step + 1, losses * of.factors)
    return found


def test_shares_become_those_of_the_mixture() -> None:
    of = balance(True, True, True)
    losses = np.array([1.0, 10.0, 0.1])
    assert shares_after(of, losses) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    assert (losses * of.factors).sum() == pytest.approx(losses.sum())


def test_lines_with_a_fixed_weight_keep_it() -> None:
    of = balance(False, True, False)
    assert shares_after(of, np.array([5.0, 100.0, 2.0]))["b"] == pytest.approx(0.3)
    assert of.factors.tolist() == [1, pytest.approx(3 / 100), 1]
    assert list(of.chosen()) == ["b"]
    assert not balance(False, False).chooses


def test_new_weights_of_the_mixture_are_aimed_at_from_their_step_on() -> None:
    of = balance(True, True)
    of.follow([{"kind": "weights", "step": 500, "weights": {"a": 0.1, "b": 0.9}}])
    of.follow([{"kind": "weights", "step": 500, "weights": {"a": 0.1, "b": 0.9}}])
    losses = np.array([1.0, 1.0])
    assert shares_after(of, losses, 499)["a"] == pytest.approx(0.5 / 0.8)
    assert shares_after(of, losses, 50, 500)["a"] == pytest.approx(0.1)


def test_a_line_without_loss_and_a_loss_that_is_not_finite_change_nothing() -> None:
    of = balance(True, True)
    of.observe(1, np.array([2.0, 0.0]))
    assert of.factors.tolist() == [1, 1]
    known = of.state_dict()
    of.observe(2, np.array([np.nan, 1.0]))
    assert of.state_dict() == known


def test_it_goes_on_from_a_checkpoint() -> None:
    of, other = balance(True, True), balance(True, True)
    shares_after(of, np.array([1.0, 3.0]), 7)
    other.load_state_dict(json.loads(json.dumps(of.state_dict())))
    assert shares_after(of, np.array([2.0, 1.0]), 3) == shares_after(other, np.array([2.0, 1.0]), 3)
    assert of.factors.tolist() == other.factors.tolist()


def test_every_target_of_a_line_is_weighted() -> None:
    batch = synthetic.rows_of(1, list(range(6)))
    of = balance(True, True, True)
    of.factors = np.array([2.0, 1.0, 0.5])
    found = of.weighted(batch)
    np.testing.assert_array_equal(found.weight, batch.weight * of.factors[batch.task].astype(np.float32))
    for name, part in batch.regression.items():
        task = batch.task.reshape(-1)[part.index]
        np.testing.assert_allclose(found.regression[name].weight, part.weight * of.factors[task])
    assert found.targets == batch.targets
    of.factors[:] = 1
    assert of.weighted(batch) is batch


def recipe(*weights: float | str) -> Recipe:
    mixture = [Entry(dataset=f"d{i}", loss_weight=weight) for i, weight in enumerate(weights)]
    return Recipe(name="t", run=Run(dir="r"), data=Data(mixture=mixture))


def test_lines_that_share_tasks_are_one() -> None:
    of = Balance.of(recipe("auto", 1.0, "auto"), ["0", "1", "2"], [[0], [1], [2, 0]], 3)
    assert [(line.name, line.tasks, line.auto) for line in of.lines] == [("0 + 2", (0, 2), True), ("1", (1,), False)]
    with pytest.raises(ValueError, match="entries 0 and 2 have tasks in common"):
        Balance.of(recipe("auto", 1.0, 1.0), ["0", "1", "2"], [[0], [1], [2, 0]], 3)
