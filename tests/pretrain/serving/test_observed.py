"""Names, shapes and pictures of clients become the fields of a task, or a sentence says what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.serving.serving_fixtures import ARM, served
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.serving.observed import Names, fit, fitted
from tiphys.pretrain.serving.served import Wish

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 32, 3)).astype(np.uint8)
CAMERA = {
    "observation/front": IMAGE,
    "observation/joints": np.zeros(2),
    "observation/gripper": np.array([1, 2]),
    "goal": np.zeros(2, np.float32),
    "prompt": b"go",
}


@pytest.fixture(scope="module")
def needed() -> Any:
    return served(fixtures.CAMERA).needed("camera")


def fields(needed: Any, names: Names | None = None, **changes: Any) -> dict[str, Any]:
    message = {name: value for name, value in {**CAMERA, **changes}.items() if value is not None}
    message["prompt"] = "go" if "prompt" in message else None
    return fit(needed, (names or Names()).sent(message))


def test_slashes_short_names_and_prompts(needed: Any) -> None:
    found = fields(needed)
    assert found.keys() == {*needed.fields, *needed.texts}
    assert found["observation.said"] == "go"
    assert found["observation.front"] is not None
    nested = {"observation": {n.removeprefix("observation/"): v for n, v in CAMERA.items()}, "prompt": "go"}
    np.testing.assert_array_equal(fit(needed, Names().sent(nested))["observation.front"], IMAGE)


@pytest.mark.parametrize(
    "image", [IMAGE, IMAGE.transpose(2, 0, 1), IMAGE / 255, (IMAGE / 255).astype(np.float32).transpose(2, 0, 1)]
)
def test_pictures_may_have_colours_first_and_hold_fractions(image: np.ndarray) -> None:
    found = fitted(image, FieldSpec("observation.front", "observation", "image", "uint8", (20, 32, 3)), "image")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IMAGE)


def test_names_are_changed_by_the_map(needed: Any) -> None:
    names = Names.from_words(["cam/0=observation.front", "states=observation/joints"])
    changes = {"observation/front": None, "observation/joints": None, "cam/0": IMAGE, "states": [0.0, 0.0]}
    np.testing.assert_array_equal(fields(needed, names, **changes)["observation.front"], IMAGE)
    with pytest.raises(DataError, match=r"both mean 'observation\.front'"):
        fields(needed, names, **{"cam/0": IMAGE})
    with pytest.raises(DataError, match="--map 'a' is not of the form"):
        Names.from_words(["a"])


REFUSED = {
    "missing": (
        {"observation/joints": None, "state": np.zeros(3)},
        r"needs observation.joints \[2\].*--map state=observation.joints",
    ),
    "shape": ({"observation/joints": np.zeros(3)}, r"'observation.joints' has shape \[3\].*needs \[2\]"),
    "empty": ({"observation/joints": []}, r"'observation.joints' has shape \[0\].*needs \[2\]"),
    "nan": ({"observation/joints": np.array([0, np.nan])}, r"holds NaN at \[1\]"),
    "text": ({"observation/joints": "far"}, "must hold numbers"),
    "ragged": ({"observation/joints": [[1], [1, 2]]}, "must hold numbers"),
    "half a class": ({"observation/gripper": np.array([0.5, 1])}, "0.5"),
    "bright": ({"observation/front": IMAGE.astype(np.float32)}, "floats outside 0 … 1"),
    "no words": ({"prompt": None}, "no instruction was given"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences(needed: Any, name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(DataError, match=said):
        fields(needed, **changes)


def test_the_task_is_named_or_the_only_one_that_fits() -> None:
    twin = TaskSpec("twin", fixtures.ARM.fields)
    of = served(fixtures.ARM, twin, fixtures.CAMERA)
    sent = Names().sent
    assert of.choose(Wish(), sent(CAMERA | {"prompt": "go"})).task == "camera"
    assert of.choose(Wish(), sent({"observation": ARM, "task": "twin"})).task == "twin"
    assert of.choose(Wish("arm"), sent({"observation": ARM})).task == "arm"
    with pytest.raises(DataError, match="fits several tasks: arm, twin; send `task`"):
        of.choose(Wish(), sent({"observation": ARM}))
    with pytest.raises(DataError, match=r"fits none .*needs observation \[5\]"):
        of.choose(Wish(), sent({"x": ARM}))
    with pytest.raises(DataError, match="no task 'other'"):
        of.choose(Wish("other"), sent({"observation": ARM}))
