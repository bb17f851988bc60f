"""Trained agents from elsewhere: they are opened only if trusted, and act as they were trained."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import REPOSITORY
from tiphys.dataio import environments
from tiphys.dataio.collect import play
from tiphys.dataio.environments import Stateless
from tiphys.dataio.environments.agents import Agent, _normaliser, agent
from tiphys.dataio.episode import DataError

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.envs
TRAINED = REPOSITORY.parent / "shared" / "data" / "rl-trained-agents"


def test_a_zip_is_not_opened_before_it_is_trusted(tmp_path):
    file = tmp_path / "agent.zip"
    file.write_bytes(b"not even a zip")
    with pytest.raises(DataError, match=r"run any code.*--trust-policy"):
        agent(str(file))
    with pytest.raises(DataError, match="not a Stable-Baselines3 agent"):
        agent(str(file), trusted=True)("CartPole-v1", environments.make("CartPole-v1"))
    with pytest.raises(DataError, match="no such file"):
        agent(str(tmp_path / "missing.zip"), trusted=True)


def test_a_zip_that_is_not_an_agent_is_refused(tmp_path):
    file = tmp_path / "agent.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(DataError, match=r"none of the algorithms.*PPO"):
        agent(str(file), trusted=True)("CartPole-v1", environments.make("CartPole-v1"))


def random_expert(task: str, env: Any) -> Any:
    return Stateless(lambda observation: 1)


def test_a_users_function_makes_the_expert():
    made = agent(f"{__name__}:random_expert")
    assert made("CartPole-v1", None).act(np.zeros(4)) == 1  # type: ignore[arg-type]
    for wrong in ("nowhere", "a b:c", "os:"):
        with pytest.raises(DataError, match="is not an agent"):
            agent(wrong)
    with pytest.raises(DataError, match="nowhere_at_all"):
        agent("nowhere_at_all:f")("CartPole-v1", None)  # type: ignore[arg-type]


def write_statistics(path: Path, **state: Any) -> None:
    """Write a pickle like one of VecNormalize, without Stable-Baselines3."""
    import sys
    import types

    modules = {"stable_baselines3": types.ModuleType("stable_baselines3")}
    for name in ("VecNormalize", "RunningMeanStd"):
        made = type(name, (), {"__module__": "stable_baselines3", "__qualname__": name})
        setattr(modules["stable_baselines3"], name, made)
    real = {k: sys.modules.get(k) for k in modules}
    sys.modules.update(modules)
    try:
        running = modules["stable_baselines3"].RunningMeanStd()
        running.__dict__.update(mean=state.pop("mean"), var=state.pop("var"))
        saved = modules["stable_baselines3"].VecNormalize()
        saved.__dict__.update(obs_rms=running, **state)
        path.write_bytes(pickle.dumps(saved))
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def test_observations_are_normalised_by_the_statistics_beside_the_zip(tmp_path):
    state = {"mean": np.array([1.0, -2.0]), "var": np.array([4.0, 0.25]), "epsilon": 0.0, "clip_obs": 3.0}
    write_statistics(tmp_path / "vecnormalize.pkl", norm_obs=True, **state)
    normalise = _normaliser(str(tmp_path / "agent.zip"))
    np.testing.assert_allclose(normalise(np.array([3.0, -1.5])), [1.0, 1.0])
    np.testing.assert_allclose(normalise(np.array([99.0, -99.0])), [3.0, -3.0])
    write_statistics(tmp_path / "vecnormalize.pkl", norm_obs=False, **state)
    assert _normaliser(str(tmp_path / "agent.zip"))(np.array([3.0]))[0] == 3.0
    assert _normaliser(str(tmp_path / "elsewhere" / "agent.zip"))(np.array([3.0]))[0] == 3.0


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_statistics_that_would_run_code_are_refused(tmp_path):
    (tmp_path / "vecnormalize.pkl").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(DataError, match="not opened"):
        _normaliser(str(tmp_path / "agent.zip"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.long
def test_a_saved_agent_acts_like_the_original(tmp_path):
    algorithms = pytest.importorskip("stable_baselines3")
    for name, task in (("PPO", "CartPole-v1"), ("DQN", "CartPole-v1"), ("SAC", "Pendulum-v1"), ("A2C", "Pendulum-v1")):
        model = getattr(algorithms, name)("MlpPolicy", gymnasium.make(task), seed=0)
        model.save(tmp_path / "agent.zip")
        env = environments.make(task)
        expert = pickle.loads(pickle.dumps(agent(str(tmp_path / "agent.zip"), trusted=True)))(task, env)
        rng = np.random.default_rng(0)
        for _ in range(5):
            seen = rng.normal(size=env.observation_space.shape).astype(np.float32)
            assert np.allclose(expert.act(seen), model.predict(seen, deterministic=True)[0])
        other = environments.make("Acrobot-v1")
        with pytest.raises(DataError, match=f"this {name} agent cannot act"):
            agent(str(tmp_path / "agent.zip"), trusted=True)("Acrobot-v1", other)


@pytest.mark.long
@pytest.mark.skipif(not TRAINED.is_dir(), reason=f"needs the trained agents in {TRAINED}: this test did NOT run")
@pytest.mark.parametrize(
    ("task", "path", "least"),
    [
        ("CartPole-v1", "ppo/CartPole-v1_1/CartPole-v1.zip", 490),
        ("Acrobot-v1", "ppo/Acrobot-v1_1/Acrobot-v1.zip", -110),
        ("MountainCar-v0", "dqn/MountainCar-v0_1/MountainCar-v0.zip", -130),
        ("LunarLander-v3", "ppo/LunarLander-v2_1/LunarLander-v2.zip", 150),
        ("HalfCheetah-v4", "a2c/HalfCheetah-v3_1/HalfCheetah-v3.zip", 2500),
        ("HalfCheetah-v5", "tqc/HalfCheetah-v3_1/HalfCheetah-v3.zip", 9000),
        ("Hopper-v4", "tqc/Hopper-v3_1/Hopper-v3.zip", 3000),
        ("Walker2d-v4", "trpo/Walker2d-v3_1/Walker2d-v3.zip", 4500),
        ("BipedalWalker-v3", "a2c/BipedalWalker-v3_1/BipedalWalker-v3.zip", 250),
    ],
)
def test_agents_of_the_zoo_reach_their_scores(task, path, least):
    for package in ("stable_baselines3", "sb3_contrib", "mujoco", "Box2D"):
        pytest.importorskip(package)
    env = environments.make(task)
    expert = Agent(str(TRAINED / path))(task, env)

    def act(observation: Any, taken: Any, reward: float) -> tuple[Any, Any]:
        action = expert.act(observation)
        return action, action

    assert np.mean([play(env, task, seed, act).outcome.total_return for seed in range(3)]) >= least
