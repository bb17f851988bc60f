"""FieldSpec and TaskSpec refuse what means nothing, and give bounds entry by entry."""

import numpy as np
import pytest

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec


def test_bounds_are_given_for_each_entry():
    field = FieldSpec("action", "action", "continuous", "float32", (2, 3))
    assert np.array_equal(field.entries((1.0,)), np.ones((2, 3)))
    assert np.array_equal(field.entries((1.0, 2.0, 3.0)), [[1, 2, 3]] * 2)
    assert np.array_equal(field.entries(tuple(range(6))), np.arange(6).reshape(2, 3))
    assert FieldSpec("a", "action", "discrete", "int64").entries((4.0,)).shape == ()
    with pytest.raises(DataError, match=r"'action'.*shape \(2, 3\).*has 4"):
        field.entries((1.0,) * 4)


@pytest.mark.parametrize("wrong", [{"normalise": "sucess"}, {"max_steps": -1}, {"max_steps": 1.5}, {"max_steps": "9"}])
def test_a_task_refuses_words_and_horizons_that_mean_nothing(wrong):
    with pytest.raises(DataError, match=rf"task 't': {next(iter(wrong))}"):
        TaskSpec("t", (), **wrong)
    assert TaskSpec("t", (), max_steps=1e3).max_steps == 1000  # type: ignore[arg-type]
