"""A space gives the same field whether it comes from an environment or from Minari's JSON, with a range for each entry."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tiphys.dataio.convert import spaces as json_spaces
from tiphys.dataio.convert.minari import _environment
from tiphys.dataio.episode import DataError

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.envs


def boxes() -> list[Any]:
    s = gymnasium.spaces
    return [
        s.Discrete(3),
        s.Discrete(3, start=-1),
        s.MultiDiscrete([2, 5]),
        s.MultiDiscrete([[2, 5], [3, 3]]),
        s.MultiDiscrete([2, 5], start=[1, -1]),
        s.MultiBinary([2, 3]),
        s.Box(np.array([-1, 2]), np.array([3, 9]), dtype=np.int64),
        s.Box(0, 9, (3,), np.int8),
        s.Box(-1, 1, (), np.float32),
        s.Box(np.array([[0, 1], [2, 3]], np.float32), np.array([[4, 5], [6, 7]], np.float32)),
        s.Box(0, 255, (40, 40, 3), np.uint8),
        s.Box(0, 4, (40, 40), np.uint8),
        s.Box(-np.inf, np.inf, (2,), np.float32),
    ]


@pytest.mark.parametrize("space", boxes(), ids=str)
def test_the_field_is_the_same_from_json(space):
    serialize = pytest.importorskip("minari.serialization").serialize_space
    from tiphys.dataio.environments.family import space_fields

    ours = space_fields(space, gymnasium.spaces.Discrete(2))[0]
    theirs = json_spaces.spec("observation", json.loads(serialize(space, to_string=True)), "here")
    names = ("modality", "shape", "low", "high", "values", "dtype")
    if ours.modality == "image":  # every image ranges from 0 to 255
        names = ("modality", "shape", "dtype")
    assert {n: getattr(theirs, n) for n in names} == {n: getattr(ours, n) for n in names}


def test_bounds_of_another_size_are_refused():
    space = {"type": "Box", "dtype": "int64", "shape": [3], "low": [0, 0], "high": [1, 1]}
    with pytest.raises(DataError, match=r"'observation' cannot be read.*low has 2 numbers"):
        json_spaces.spec("observation", space, "here")


def test_data_name_no_module():
    assert _environment({"env_spec": '{"id": "evil:CartPole-v1", "kwargs": {}}'}, "here") == {}
