"""The example of docs/acting.md acts: frames of LeRobot, instructions, returns, chunks, two robots, from a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto", reason="needs the dev extra")

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tests.processes import REPOSITORY
from tests.servers import moto_server, s3_environment
from tests.test_docs import blocks
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.publish import publish, save_policy

PAGE = REPOSITORY / "docs" / "acting.md"
TOP = "observation.images.top"
TASK = TaskSpec(
    "table",
    (
        FieldSpec("observation.state", "observation", "continuous", "float32", (3,)),
        FieldSpec(TOP, "observation", "image", "uint8", (16, 16, 3)),
        FieldSpec("instruction", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "continuous", "float32", (2,), low=(-1.0,), high=(1.0,)),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


class Robot:
    """Shows random frames in the form of LeRobot's tensors: colours first, fractions."""

    def __init__(self, seed: int) -> None:
        self.random, self.moves = np.random.default_rng(seed), []

    def observe(self) -> dict[str, Any]:
        picture = self.random.integers(0, 256, (3, 16, 16)) / 255
        return {"observation.state": self.random.normal(size=3).astype("f"), TOP: picture.astype("f")}

    def move(self, action: np.ndarray) -> float:
        self.moves.append(action)
        return 0.5


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The same policy in a folder and in a bucket."""
    of = fixtures.make_each([TASK], ["bc", "dt"], context=200, window=4, scheme="compact", chunk=2, horizon=2)
    model = acting.model(of)
    config = DecisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "auto_map"})
    folder = tmp_path_factory.mktemp("run") / "policy"
    folder = save_policy(folder, model.state_dict(), config, of.processor(), step=1)
    with moto_server() as endpoint, s3_environment(endpoint):
        publish(folder, "s3://bucket/arm")
        yield [str(folder), "s3://bucket/arm"]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    (code,) = [code for code in blocks(PAGE, "python") if "def drive" in code]
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_example_drives_two_robots_from_a_folder_and_from_a_bucket(places: list[str], page: dict[str, Any]) -> None:
    seen = []
    for place in places:
        for follow in (False, True)[: 1 + ("://" in place)]:
            robots = [Robot(0), Robot(1)]
            page["drive"](place, robots, 6, follow)
            assert all(np.shape(move) == (2,) for robot in robots for move in robot.moves)
            seen.append([robot.moves for robot in robots])
    for other in seen[1:]:
        np.testing.assert_array_equal(other, seen[0])


def test_a_batch_of_one_acts_as_its_frame(places: list[str]) -> None:
    policy, frame = Policy.load(places[0], "cpu"), Robot(0).observe() | {"task": "push the cube"}
    policy.reset("table")
    wanted = policy.act(frame)
    policy.reset("table")
    batch = {name: [value] if isinstance(value, str) else value[None] for name, value in frame.items()}
    np.testing.assert_array_equal(policy.act(batch), wanted)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            TOP,
            np.zeros((3, 8, 8)),
            r"'observation.images.top' .* shape \[3, 8, 8\], .* trained on \[16, 16, 3\]; give pictures",
        ),
        ("observation.state", np.zeros(4), r"'observation.state' .* shape \[4\], .* trained on \[3\]; give the values"),
        ("observation.state", np.zeros((2, 3)), r"shape \[2, 3\], .* \[3\]; give one observation for each environment"),
        ("task", ["one", "two"], "'task' of the observation holds 2 texts; give one observation for each environment"),
        ("task", None, r"no instruction was given: .* `policy.reset\(task, instruction=…\)`"),
    ],
)
def test_a_frame_that_does_not_fit_is_named(places: list[str], name: str, value: Any, message: str) -> None:
    policy, frame = Policy.load(places[0], "cpu"), Robot(0).observe() | {"task": "push the cube"}
    policy.reset("table")
    bad = frame | {name: value}
    if value is None:
        del bad[name]
    with pytest.raises(DataError, match=message):
        policy.act(bad)
    assert np.shape(policy.act(frame)) == (2,)  # its history is as before


def test_the_names_of_the_table_exist(places: list[str]) -> None:
    policy = Policy.load(places[0], "cpu")
    assert policy.tasks == ("table",)
    assert list(policy.processor.objectives) == ["bc", "dt"]
    policy.reset("table", instruction="push the cube")
    frame = Robot(0).observe()
    policy.act(frame, text="lift it")
    policy.reset("table")
    policy.act(frame | {"task": "push the cube"})
