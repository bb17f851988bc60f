"""Policies of converted data act in the environment of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tests.dataio.convert.convert_sources import LENGTHS, d4rl, lerobot_v2, minari, npz, rlds, robomimic, zarr_buffer
from tests.dataio.convert.test_lerobot import TOP, add_feature
from tiphys.dataio import environments
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.observation import native, observation_fields
from tiphys.pretrain.acting.play import play_group
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import FieldTokens, Objective

_MAPPING = {
    "environment": acting.CART,
    "text": {},
    "fields": {
        "observation.state": "drop",
        TOP: "drop",
        "action": "drop",
        "instruction": "drop",
        "pushed": {"name": "action", "role": "action", "values": 2},
        "seen": {"name": "observation", "role": "observation"},
    },
}


def test_a_discrete_action_of_a_lerobot_source_plays_cartpole(tmp_path: Path) -> None:
    """LeRobot writes a number as shape [1]; CartPole takes a number."""
    lerobot_v2(tmp_path / "s")
    r = np.random.default_rng(0)
    pushed = [pa.array(r.integers(0, 2, n)) for n in LENGTHS]
    add_feature(tmp_path / "s", "pushed", {"dtype": "int64", "shape": [1], "names": None}, pushed)
    seen = [pa.array(r.normal(size=(n, 4)).tolist(), pa.list_(pa.float32())) for n in LENGTHS]
    add_feature(tmp_path / "s", "seen", {"dtype": "float32", "shape": [4], "names": None}, seen)
    report = convert(str(tmp_path / "s"), str(tmp_path / "out"), mapping=_MAPPING, processes=1)
    assert any(n.startswith("pushed: has shape [1]") for n in report.notes)
    (task,) = EpisodeIndex.open(str(tmp_path / "out")).tasks
    assert task.field("action").shape == ()
    of = fixtures.make([task], "bc", context=60, scheme="compact")
    policy = Policy.load(acting.folder(tmp_path / "policy", of), "cpu")
    (played,) = play_group(policy, task, [environments.make(acting.CART)], [1_000_000])
    assert played.outcome.steps >= 1
    assert set(played.actions) <= {0, 1}


def policy_of(source: Path, tmp_path: Path, **options: object) -> tuple[Policy, EpisodeIndex]:
    """A policy with random weights of a converted dataset, in its first task."""
    convert(str(source), str(tmp_path / "out"), processes=1)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset=index.url, objective="bc", tasks=[index.tasks[0].name])]),
        objectives={"bc": Objective(context=400, options={"allow_clipped": 1.0}, **options)},
        model=Model(text_vocabulary=400),
        run=Run(dir="unused"),
    )
    policy = Policy.load(acting.folder(tmp_path / "policy", Objectives(recipe, [index])), "cpu")
    policy.reset(index.tasks[0].name)
    return policy, index


def same(policy: Policy, *observations: tuple[object, dict[str, object]]) -> None:
    """Assert that all of these give the same action at the first step of an episode."""
    found = []
    for observation, options in observations:
        policy.reset(policy.task, instruction=options.pop("instruction", None))
        found.append(observation_fields(policy.act(observation, **options), "action"))
    for action in found[1:]:
        assert action.keys() == found[0].keys()
        for name, value in action.items():
            np.testing.assert_array_equal(value, found[0][name])


def test_a_policy_acts_on_the_frames_of_a_lerobot_dataset(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    policy, index = policy_of(tmp_path / "s", tmp_path)
    stored = read_episode(index, 0)
    words = stored.fields["instruction"]
    state, top = stored.fields["observation.state"][0], stored.fields[TOP][0]
    frame = {
        "observation.state": torch.from_numpy(state),
        TOP: torch.from_numpy(top).permute(2, 0, 1) / 255,
        "task": words,
    }
    nested = {"state": state, TOP.removeprefix("observation."): top}
    same(
        policy, (frame, {}), (nested, {"text": words}), (nested, {"instruction": words}), (nested | {"task": words}, {})
    )
    policy.reset(policy.task)
    with pytest.raises(
        DataError, match=r"no text 'instruction'.*reset\(task, instruction=…\).*act\(observation, text=…\)"
    ):
        policy.act(nested)


def test_a_policy_acts_on_the_steps_of_an_rlds_dataset(tmp_path: Path) -> None:
    rlds(tmp_path / "s")
    policy, index = policy_of(tmp_path / "s", tmp_path, fields={"observation.count": FieldTokens(encoding="skip")})
    stored = read_episode(index, 0)
    observed = {n.removeprefix("observation."): v[0] for n, v in stored.fields.items() if n.startswith("observation.")}
    (text,) = policy.history.texts
    words = stored.fields[text] if isinstance(stored.fields[text], str) else str(stored.fields[text][0])
    step = {"observation": observed, "language_instruction": words, "is_first": True}
    same(policy, (step, {}), (observed, {"text": words}))


@pytest.mark.parametrize("source", [minari, d4rl, robomimic, zarr_buffer, npz])
def test_a_policy_acts_on_the_native_observations_of_other_sources(source: Any, tmp_path: Path) -> None:
    source(tmp_path / "s")
    policy, index = policy_of(tmp_path / "s", tmp_path)
    episode = next(e for e in range(index.episodes) if index.tasks[index.task[e]].name == policy.task)
    stored = read_episode(index, episode)
    observed = {n: v[0] for n, v in stored.fields.items() if n.partition(".")[0] == "observation"}
    missing = set(policy.history.texts) - observed.keys()
    if len(missing) > 1:  # it is not clear which of them an instruction is
        observed |= dict.fromkeys(missing, "do it")
    words = "do it" if len(missing) == 1 else None
    nested = native(observed, "observation") if "observation" not in observed else {}
    nested |= {n: v for n, v in observed.items() if n in missing or not nested}
    same(policy, (nested, {"text": words}), (observed, {"text": words}))


def test_instructions_for_several_environments(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    policy, index = policy_of(tmp_path / "s", tmp_path)
    stored = read_episode(index, 0)
    observed = {n: stored.fields[n][0] for n in ("observation.state", TOP)}
    alone = []
    for words in ("push", "lift the cube"):
        policy.reset(policy.task, instruction=words)
        alone.append(policy.act(observed))
    policy.reset(policy.task, 2, instruction=["push", "lift the cube"])
    together = policy.act([observed, observed])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    policy.restart(1, instruction="push")
    np.testing.assert_allclose(policy.act([observed], environments=[1])[0], alone[0], atol=1e-6)
    with pytest.raises(ValueError, match="3 instructions for 2 environments"):
        policy.reset(policy.task, 2, instruction=["a", "b", "c"])
