"""Collecting gives the same bytes with any number of processes, records undisturbed actions, and fails with one clear error."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.dataio.environments.faulty_environments as faulty

pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")

from tiphys.dataio import collect as collecting
from tiphys.dataio import environments
from tiphys.dataio.collect import EVALUATION_SEEDS, SCORE_SEEDS, EnvironmentFault, Players, collect
from tiphys.dataio.episode import DataError

pytestmark = pytest.mark.envs
GRID, CART = "BabyAI-GoToRedBallGrey-v0", "CartPole-v1"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("processes", [2, pytest.param(5, marks=pytest.mark.long)])
def test_the_bytes_do_not_depend_on_the_number_of_processes(processes, tmp_path):
    counts = {GRID: 60, CART: 3}
    for number in (1, processes):
        collect(counts, str(tmp_path / str(number)), processes=number, score_episodes=3)
    one = digests(tmp_path / "1")
    assert one
    assert one == digests(tmp_path / str(processes))
    other = collect(counts, str(tmp_path / "other"), processes=1, score_episodes=3, seed=1)
    assert digests(tmp_path / "other") != one
    assert other.episodes == 63


def test_the_dataset_holds_the_played_episodes(tmp_path):
    index = collect(GRID, str(tmp_path / "data"), 5, processes=1, score_episodes=4)
    spec = index.tasks[0]
    with Players(1) as players:
        episodes = list(players.demonstrations(spec, 5, 0, None))
    assert [index.id(i) for i in range(5)] == [e.id for e in episodes]
    assert index.steps.tolist() == [e.steps for e in episodes]
    assert np.allclose(index.total_return, [e.total_return for e in episodes])
    assert index.success.tolist() == [1] * 5
    env = environments.make(GRID)
    first, _ = env.reset(seed=0)
    assert np.array_equal(episodes[0].fields["observation.image"][0], first["image"])
    assert episodes[0].fields["observation.mission"] == first["mission"]
    assert len(episodes[0].fields["observation.image"]) == episodes[0].steps + 1
    assert episodes[0].fields["terminated"].tolist() == [False] * (episodes[0].steps - 1) + [True]


def test_scores_are_measured_and_stored(tmp_path):
    index = collect([GRID, CART], str(tmp_path / "data"), 2, processes=1, score_episodes=5)
    grid, cart = index.tasks
    assert (grid.normalise, grid.expert) == ("success", 1.0)
    assert grid.random is not None
    assert cart.random is not None
    assert 0 <= grid.random < 0.7
    assert (cart.normalise, cart.expert) == ("return", 500.0)
    assert 5 < cart.random < 60


def test_the_experts_action_is_recorded_not_the_executed_one():
    spec = environments.spec(CART)
    with Players(1) as players:
        (noisy,) = players.demonstrations(spec, 1, 5, 0.9)
        (clean,) = players.demonstrations(spec, 1, 5, 0.0)
    env: Any = environments.make(CART)
    expert = environments.expert(CART, env)

    def replay(episode):
        """Number of steps in which the recorded action does not lead to the next observation."""
        observation, _ = env.reset(seed=5)
        seen = episode.fields["observation"]
        assert np.array_equal(observation, seen[0])
        off = 0
        for t, action in enumerate(episode.fields["action"]):
            assert expert.act(seen[t]) == action
            env.unwrapped.state = seen[t].astype(np.float64)
            off += not np.allclose(env.step(int(action))[0], seen[t + 1], atol=1e-5)
        return off

    assert replay(clean) == 0
    assert replay(noisy) > 0
    assert noisy.info["record"] == "intended"


def test_the_executed_action_is_recorded_if_that_is_asked(tmp_path):
    """So observations and returns are those of the recorded actions, and episodes differ in quality."""
    spec = environments.spec(CART)
    with Players(1) as players:
        episodes = list(players.demonstrations(spec, 12, 5, 1.0, "executed"))
    env: Any = environments.make(CART)
    for episode in episodes:
        assert episode.info["record"] == "executed"
        observation, _ = env.reset(seed=episode.info["seed"])
        for t, action in enumerate(episode.fields["action"]):
            assert np.array_equal(observation, episode.fields["observation"][t])
            observation = env.step(int(action))[0]
    levels, returns = zip(*((e.info["noise"], e.total_return) for e in episodes), strict=True)
    assert min(returns) < 50
    assert max(returns) == 500
    assert np.corrcoef(levels, returns)[0, 1] < -0.5
    with pytest.raises(DataError, match="record 'both' is unknown; it is one of intended, executed"):
        collect(CART, str(tmp_path / "data"), 1, record="both")


def test_seeds_of_demonstrations_scores_and_evaluation_never_overlap(tmp_path):
    assert SCORE_SEEDS < EVALUATION_SEEDS
    with pytest.raises(DataError, match="reserved for scoring"):
        collect(CART, str(tmp_path / "data"), 10, seed=SCORE_SEEDS - 5)
    played = []
    spec = environments.spec(CART)
    original = collecting.play

    def watch(env, task, seed, act):
        played.append(seed)
        return original(env, task, seed, act)

    collecting.play = watch
    try:
        with Players(1, faulty.Left) as players:
            episodes = list(players.demonstrations(spec, 12, 40, 0.0))
    finally:
        collecting.play = original
    seeds = [e.info["seed"] for e in episodes]
    assert len(set(seeds)) == 12
    assert len(played) > 12  # the expert got lost with some seeds, and others were used
    assert max(played) < SCORE_SEEDS


def test_an_expert_that_raises_gives_one_clear_error_and_no_dataset(tmp_path):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        with pytest.raises(EnvironmentFault, match=r"CartPole-v1.*seed \d+, step \d+.*ZeroDivisionError.*diverged"):
            collect(CART, str(folder), 60, processes=processes, policy=faulty.raises, score_episodes=3)
        assert not (folder / "dataset.json").exists()


def test_an_expert_that_always_gets_lost_is_an_error(tmp_path):
    with pytest.raises(EnvironmentFault, match="nowhere to go"):
        collect(CART, str(tmp_path / "data"), 2, processes=1, policy=faulty.always_lost, score_episodes=1)


def test_a_killed_process_gives_an_error_and_no_hang(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        collect(CART, str(tmp_path / "data"), 2, processes=2, policy=faulty.dies, score_episodes=1)
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_a_full_disk_gives_one_clear_error_and_no_dataset(tmp_path, monkeypatch):
    import errno

    from tiphys.dataio import storage

    def full(self, path, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.Store, "upload", full)
    with pytest.raises(OSError, match="no space left"):
        collect(CART, str(tmp_path / "data"), 3, processes=1, score_episodes=1)
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_an_existing_dataset_is_refused_before_anything_is_played(tmp_path):
    collect(CART, str(tmp_path / "data"), 1, processes=1, score_episodes=1)
    with pytest.raises(FileExistsError):
        collect(CART, str(tmp_path / "data"), 1, processes=1, score_episodes=1, policy=faulty.dies)


def test_bad_arguments_are_named_in_the_error(tmp_path):
    with pytest.raises(DataError, match="0 episodes"):
        collect(CART, str(tmp_path / "data"), 0)
    with pytest.raises(DataError, match="no task"):
        collect([], str(tmp_path / "data"))
    with pytest.raises(environments.UnknownEnvironment, match="CartPole-v1"):
        collect("CartPole-v7", str(tmp_path / "data"), 1)


def of_one_number(task: str, env: Any) -> Any:
    return environments.Stateless(lambda observation: np.array([int(observation[2] > 0)]))


def test_an_expert_may_give_an_array_of_one_number(tmp_path):
    index = collect(CART, str(tmp_path / "data"), 2, processes=1, score_episodes=1, policy=of_one_number)
    assert index.tasks[0].field("action").shape == ()


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_a_noise_that_means_nothing_is_refused(noise, tmp_path):
    with pytest.raises(DataError, match=r"noise .* is not a number of at least 0"):
        collect(CART, str(tmp_path / "data"), 1, noise=noise)


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({}, None),
        ({"success": 1.0}, True),
        ({"is_success": False}, False),
        ({"success": False, "is_success": True}, False),
    ],
)
def test_an_environment_may_name_its_success_in_two_ways(info, wanted):
    assert collecting.succeeded(info) is wanted
