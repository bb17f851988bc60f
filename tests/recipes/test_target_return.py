"""One way to write a target return."""

import pytest

from tests.recipes.test_load import GOOD, write
from tiphys.recipes.load import RecipeError, load_recipe
from tiphys.recipes.target_return import TargetReturn


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        *((450, "rewards", 450.0), ("-1.5e2", "rewards", -150.0), (" 0 ", "rewards", 0.0)),
        *(("best", "best", 1.0), ("1.2x", "best", 1.2), ("q0.9", "quantile", 0.9), ("q1", "quantile", 1.0)),
    ],
)
def test_the_forms_of_a_target_return(given, kind, value):
    target = TargetReturn.parse(given)
    assert target == TargetReturn(kind, value)
    assert TargetReturn.parse(str(target)) == target


@pytest.mark.parametrize("given", ["", "x", "1.2 x", "q", "q-0.1", "q2", "nan", "-infx", "1e999", "0x10", True, None])
def test_anything_else_is_refused(given):
    with pytest.raises(ValueError, match=r"not a target return|not a quantile"):
        TargetReturn.parse(given)


def test_a_recipe_takes_a_number_or_a_text(tmp_path):
    file = write(tmp_path, GOOD)
    for given, read in {"450": "450", "-150.5": "-150.5", "q0.9": "q0.9", "1.2x": "1.2x"}.items():
        recipe = load_recipe(file, [f"objectives.dt.target_return={given}"])
        assert recipe.objectives["dt"].target_return == read
    with pytest.raises(
        RecipeError, match=r"objectives\.dt\.target_return: 'high' is not a target return; write .*q0\.9"
    ):
        load_recipe(file, ["objectives.dt.target_return=high"])


def test_values():
    assert TargetReturn.parse("1.5x").of(-10.0) == -15.0
    assert TargetReturn.parse("q0.25").of(0.0, [0.0, 10.0, 30.0]) == 5.0
    assert TargetReturn.parse("q1").of(0.0, [7.0]) == 7.0
