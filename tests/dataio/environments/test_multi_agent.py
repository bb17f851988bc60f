"""Environments of several agents of other packages, as one environment each. They need the extra `madt`."""

import numpy as np
import pytest

from tiphys.dataio import environments
from tiphys.dataio.collect import collect
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.index import EpisodeIndex

TASKS = {"mpe2/simple_spread_v3": 3, "lbforaging/Foraging-8x8-2p-2f-coop-v3": 2}
installed = pytest.mark.usefixtures("packages")


@pytest.fixture
def packages():
    for name in ("mpe2", "lbforaging"):
        pytest.importorskip(name, reason="needs the extra madt: mpe2 and lbforaging")


def episode(task, seed, act):
    """Rewards and observations of an episode in which `act(env, observation)` chooses."""
    env = environments.make(task)
    seen, _ = env.reset(seed=seed)
    rewards, rows, done = [], [seen], False
    while not done:
        seen, reward, ended, cut, _ = env.step(act(env, seen))
        rewards.append(reward)
        rows.append(seen)
        done = ended or cut
    env.close()
    return np.array(rewards), np.array(rows)


def test_without_the_packages_the_command_that_installs_them_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lbforaging", None)
    with pytest.raises(environments.MissingExtra, match=r"pip install 'tiphys\[madt\]'"):
        environments.make("lbforaging/Foraging-8x8-2p-2f-coop-v3")


@installed
@pytest.mark.parametrize("task", TASKS)
def test_agents_are_the_first_axis_and_the_reward_is_that_of_the_team(task):
    spec = environments.spec(task)
    agents = TASKS[task]
    assert spec.field("action").shape == (agents,)
    assert spec.field("observation").shape[0] == agents
    assert spec.field("reward").shape == ()
    assert spec.max_steps > 0
    assert task in environments.names()


@installed
@pytest.mark.parametrize("task", TASKS)
def test_an_episode_depends_on_its_seed_and_its_actions_alone(task):
    def constant(env, seen):
        return np.ones(TASKS[task], np.int64)

    one, other = episode(task, 3, constant), episode(task, 3, constant)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    assert not np.array_equal(one[1][0], episode(task, 4, constant)[1][0])


@installed
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_earns_more_than_chance(task):
    experts, random = {}, np.random.default_rng(0)

    def expert(env, seen):
        if env not in experts:
            experts[env] = environments.expert(task, env)
            experts[env].reset()
        return experts[env].act(seen)

    skilled = [episode(task, seed, expert)[0].sum() for seed in range(5)]
    chance = [episode(task, s, lambda env, _: random.integers(env.action_space.nvec))[0].sum() for s in range(5)]
    assert np.mean(skilled) > np.mean(chance)


@installed
def test_what_is_collected_can_be_learned_by_madt(tmp_path):
    task = "lbforaging/Foraging-8x8-2p-2f-coop-v3"
    collect([task], str(tmp_path / "data"), episodes=2, processes=1)
    one = read_episode(EpisodeIndex.open(str(tmp_path / "data")), 0)
    assert one.fields["action"].shape == (one.steps, 2)
    assert one.fields["reward"].shape == (one.steps,)
