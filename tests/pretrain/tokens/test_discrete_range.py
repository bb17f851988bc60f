"""The range of a discrete field: declared by entry, else that of the data; data outside it are found before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.statistics import Sketch
from tiphys.pretrain.tokens.discrete_range import discrete_range


def field(shape: tuple[int, ...] = (2,), **more: Any) -> FieldSpec:
    return FieldSpec("action", "action", "discrete", "int64", shape, **more)


def found(spec: FieldSpec, *rows: Any) -> Any:
    sketch = Sketch(spec.shape)
    sketch.add(np.array(rows, np.float64).reshape(len(rows), -1))
    return sketch.result()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"values": 5}, ((5,), (0,))),
        ({"values": 5, "low": (0,), "high": (1, 4)}, ((2, 5), (0,))),
        ({"low": (-1,), "high": (1,)}, ((3,), (-1,))),
        ({"low": (2,), "values": 3}, ((3,), (2,))),
        ({"high": (9,)}, ((10,), (0,))),
        ({}, ((1024,), (0,))),
    ],
)
def test_a_declared_range_is_taken_by_entry(more, expected):
    assert discrete_range(field(**more), None, "here") == expected


def test_an_unknown_range_is_that_of_the_data_if_they_need_it():
    spec = field()
    assert discrete_range(spec, found(spec, [0, 7], [3, 1000]), "here") == ((1024,), (0,))
    assert discrete_range(spec, found(spec, [-3, 7], [3, 2000]), "here") == ((7, 2001), (-3, 0))
    with pytest.raises(DataError, match=r"here: its values go from 0 to 70000.*1 to 65536.*encoding: vector"):
        discrete_range(spec, found(spec, [0, 70000]), "here")


def test_data_outside_a_declared_range_are_refused():
    spec = field(low=(0.0,), high=(1.0, 4.0), values=5)
    assert discrete_range(spec, found(spec, [1, 4]), "here") == ((2, 5), (0,))
    with pytest.raises(DataError, match=r"here: its data go from 2 to 4.*range \[0\] to \[1, 4\].*convert again"):
        discrete_range(spec, found(spec, [2, 4]), "here")
    # a dataset that was filtered keeps the statistics of the whole
    assert discrete_range(spec, found(spec, [2, 4]), "here", exact=False) == ((2, 5), (0,))
    with pytest.raises(DataError, match="whole numbers"):
        discrete_range(field(low=(0.5,), high=(2.0,)), None, "here")
