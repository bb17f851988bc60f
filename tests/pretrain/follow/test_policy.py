"""A real policy follows: it takes new weights between two actions or episodes, and acts as one that was loaded anew."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="needs the envs extra")
pytest.importorskip("minigrid", reason="needs the envs extra")

import tests.pretrain.acting.acting_fixtures as acting
from tiphys.dataio.episode import DataError
from tiphys.launch.cli import main
from tiphys.launch.statuses import Status
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.follow.scored import scored_steps
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.publish import How, publish, save_policy, say_final

pytestmark = pytest.mark.envs
OBJECTIVES = acting.objectives((acting.CART,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies with other weights: steps 1 and 2."""
    made = []
    for step in (1, 2):
        model = acting.model(OBJECTIVES, step)
        config = DecisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "auto_map"})
        to = tmp_path_factory.mktemp("policies") / "policy"
        made.append(save_policy(to, model.state_dict(), config, OBJECTIVES.processor(), step=step))
    return made


def observations(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(0, 0.05, (count, 4)).astype(np.float32))


def until_ready(policy: Policy) -> None:
    ends = time.monotonic() + 60
    while policy.following._ready is None:
        assert time.monotonic() < ends, policy.following.problem
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["act", "episode"])
def test_new_weights_are_taken_between_two_actions_or_episodes(when: str, folders: list[Path], tmp_path: Path) -> None:
    to = str(tmp_path / "to")
    publish(folders[0], to, how=How())
    policy = Policy.follow(to, "cpu", every=0.01, when=when, sample=True)
    try:
        fixed = [Policy.load(folder, "cpu", sample=True) for folder in folders]
        for one in (policy, *fixed):
            one.reset(acting.CART)
        seen = observations(12)
        for observation in seen[:4]:
            assert policy.act(observation) == fixed[0].act(observation)
        publish(folders[1], to, how=How(folders[0]))
        until_ready(policy)
        if when == "episode":
            assert policy.act(seen[4]) == fixed[0].act(seen[4])
            assert policy.following.step == 1
            policy.reset(acting.CART)
            assert policy.following.step == 2
            assert [policy.act(o) for o in seen] == [fixed[1].act(o) for o in seen]
            return
        actions = [policy.act(o) for o in seen[4:]]
        assert policy.following.step == 2
        assert policy.following.digest
        assert actions == [replayed(fixed[1], fixed[0], seen, n) for n in range(4, 12)]
    finally:
        policy.following.close()


def replayed(new: Policy, old: Policy, seen: list[np.ndarray], number: int) -> Any:
    """The action of a policy that sees the same history, whose first actions the older policy chose, without any memory."""
    new.hop, old.hop = False, False
    new.reset(acting.CART)
    old.reset(acting.CART)
    action = None
    for at, observation in enumerate(seen[: number + 1]):
        old.act(observation)
        action = new.act(observation)
        if at < 4:  # what was done then
            new.history._episodes[0].actions[-1] = dict(old.history._episodes[0].actions[-1])
            new.forget()
    return action


def test_a_folder_that_is_published_loads_by_its_address(folders: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "to"
    at = publish(folders[0], str(to))
    assert Policy.load(to, "cpu").tasks == Policy.load(at, "cpu").tasks
    with pytest.raises(DataError, match="when='never'"):
        Policy.follow(str(to), when="never")
    with pytest.raises(FileNotFoundError, match="nothing that can be followed"):
        Policy.follow(str(tmp_path / "nothing"))


def test_each_step_is_scored_until_the_run_ends(folders: list[Path], tmp_path: Path) -> None:
    to, out = str(tmp_path / "to"), tmp_path / "scores.jsonl"
    publish(folders[0], to, how=How())
    found = []
    for one in scored_steps(to, [acting.CART], every=0.01, out=out, episodes=1, processes=1):
        found.append(one)
        if len(found) == 1:
            publish(folders[1], to, how=How(folders[0]))
        else:
            say_final(to)
    assert [one["step"] for one in found] == [1, 2]
    assert [json.loads(line)["step"] for line in out.read_text().splitlines()] == [1, 2]
    assert found[0]["tasks"][acting.CART]["episodes"] == 1


def test_the_command_ends_with_a_policy_that_is_final(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(folders[1]), str(tmp_path / "to")]) == Status.DONE
    words = ["--tasks", acting.CART, "--episodes", "1", "--processes", "1", "--follow"]
    assert main(["evaluate", str(tmp_path / "to"), *words]) == Status.DONE
    assert "step 2\n" in capsys.readouterr().out
