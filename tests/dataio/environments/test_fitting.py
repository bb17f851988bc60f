"""Actions are brought into the form of the space, and what does not fit is named with field and both shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tiphys.dataio.environments.fitting import fitted, misfits
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.envs
SEEN = FieldSpec("observation", "observation", "continuous", "float32", (4,))
DONE = FieldSpec("action", "action", "discrete", "int64", values=2)
TASK = TaskSpec("cart", (SEEN, DONE), environment="CartPole-v1")


def test_an_action_gets_shape_and_dtype_of_the_space():
    s = gymnasium.spaces
    cases = [
        (np.array([1]), s.Discrete(2), 1),
        (np.int32(-1), s.Discrete(3, start=-1), -1),
        (0.5, s.Box(-1, 1, (1,), np.float32), np.array([0.5], np.float32)),
        (np.array([[0.5]]), s.Box(-1, 1, (), np.float32), np.float32(0.5)),
        (np.array([1.0, 4.0]), s.MultiDiscrete([2, 5]), np.array([1, 4])),
        (np.array([0, 1]), s.MultiBinary(2), np.array([0, 1], np.int8)),
    ]
    for action, space, wanted in cases:
        got = fitted(action, space, "task 't'")
        assert space.contains(got if isinstance(space, s.Discrete) else np.asarray(got))
        assert np.array_equal(got, wanted)
        assert np.asarray(got).dtype == np.asarray(wanted).dtype
    nested = s.Dict(move=s.Tuple((s.Discrete(2), s.Box(-1, 1, (1,)))), stop=s.MultiBinary(1))
    got = fitted({"move": {"0": np.array([1]), "1": 0.5}, "stop": 1}, nested, "task 't'")
    assert nested.contains(got)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (np.zeros(3), r"task 't', field 'action': the action has shape \(3,\).*takes \(\)"),
        (7, r"the action 7 is not in Discrete\(2\)"),
        (0.4, r"the action 0.4 is not in Discrete\(2\)"),
        (np.array([300, 0, 0, 0]), "the action has shape"),
        ("left", "the action has shape"),
    ],
)
def test_an_action_that_does_not_fit_is_named(action, words):
    with pytest.raises(DataError, match=words):
        fitted(action, gymnasium.spaces.Discrete(2), "task 't'")


def test_an_empty_action_fits_nothing():
    with pytest.raises(DataError, match=r"the action has shape \(0,\).*takes \(2,\)"):
        fitted([], gymnasium.spaces.Box(-1, 1, (2,)), "task 't'")


def test_a_missing_part_of_an_action_is_named():
    with pytest.raises(DataError, match="field 'action': the action lacks the part 'b'"):
        fitted({"a": 1}, gymnasium.spaces.Dict(b=gymnasium.spaces.Discrete(2)), "task 't'")


def test_fields_that_differ_from_the_environments_are_named():
    def found(*declared: FieldSpec, task: TaskSpec = TASK) -> str:
        return "\n".join(misfits(task, [f.name for f in task.fields], declared))

    assert not found(SEEN, DONE)
    assert not found(replace(SEEN, shape=(1, 4)), replace(DONE, shape=(1,)))
    assert found(replace(SEEN, shape=(6,)), DONE) == (
        "task 'cart', field 'observation': its data have shape (4,), but environment 'CartPole-v1' has shape (6,)"
    )
    assert "has no such field, it has observation.state" in found(replace(SEEN, name="observation.state"), DONE)
    assert "takes the action field 'action.hand'" in found(SEEN, DONE, replace(DONE, name="action.hand"))
    real = replace(TASK, fields=(SEEN, FieldSpec("action", "action", "continuous", "float32", (1,))))
    assert "takes whole numbers" in found(SEEN, DONE, task=real)
    varies = replace(TASK, fields=(FieldSpec("observation", "observation", "image", "uint8", (0, 0, 3)), DONE))
    assert not found(replace(SEEN, shape=(64, 48, 3), modality="image"), DONE, task=varies)
