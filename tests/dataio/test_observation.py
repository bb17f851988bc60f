"""Shapes of observations against those of the fields."""

from __future__ import annotations

import numpy as np
import pytest

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.observation import fit_shapes, same_numbers


@pytest.mark.parametrize(
    ("shape", "wanted", "same"),
    [
        ((2,), (2,), True),
        ((1, 2), (2, 1), True),
        ((), (1,), True),
        ((5, 3), (0, 3), True),
        ((0,), (2,), False),
        ((0, 3), (5, 3), False),
        ((3,), (2,), False),
    ],
)
def test_only_a_wanted_extent_may_vary(shape, wanted, same):
    assert same_numbers(shape, wanted) is same


def test_an_empty_observation_is_refused_by_name():
    spec = FieldSpec("observation", "observation", "continuous", "float32", (2,))
    with pytest.raises(DataError, match=r"'observation' of the observation has the shape \[0\].*trained on \[2\]"):
        fit_shapes({"observation": []}, {"observation": spec})
    assert np.shape(fit_shapes({"observation": [[1.0, 2.0]]}, {"observation": spec})["observation"]) == (2,)
