"""Agents of mixed quality: in each episode either the task's expert acts, or a weak agent. What is recorded is what they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.environments import Environment

# Task -> share of the episodes that the expert plays, which gives it a quarter of the steps or somewhat more. Its episodes are 13
# times as long as those of the weak agent in CartPole, and half as long in MountainCar.
EXPERT = {"CartPole-v1": 0.025, "Pendulum-v1": 0.25, "MountainCar-v0": 0.4}


class Mixed:
    """Draws in each episode who acts, from the state of the environment's generator: so an episode depends on its seed only."""

    def __init__(self, task: str, env: Environment) -> None:
        self._env: Any = env
        self._expert = environments.expert(task, env)
        self._weak = _WEAK[task]
        self._share = EXPERT[task]

    def reset(self) -> None:
        self._random: np.random.Generator = copy.deepcopy(self._env.unwrapped.np_random)
        self._strong = bool(self._random.random() < self._share)
        self._expert.reset()

    def act(self, observation: Any, taken: Any = None) -> Any:
        best = self._expert.act(observation, taken)
        return best if self._strong else self._weak(observation, best, self._random)


def _leaning(observation: Any, best: Any, random: np.random.Generator) -> int:
    """CartPole: pushes to the side that the pole leans to, and ignores its speed. The pole falls after about 40 steps."""
    return int(observation[2] > 0)


def _feeble(observation: Any, best: Any, random: np.random.Generator) -> np.ndarray:
    """Pendulum: swings it with a quarter of the torque, so it does not come up."""
    return np.array([np.copysign(0.5, observation[2])], np.float32)


def _onwards(observation: Any, best: Any, random: np.random.Generator) -> int:
    """MountainCar: always pushes to the right, which is not enough to leave the valley."""
    return 2


_WEAK: dict[str, Callable[[Any, Any, np.random.Generator], Any]] = {
    "CartPole-v1": _leaning,
    "Pendulum-v1": _feeble,
    "MountainCar-v0": _onwards,
}
