"""Agree-v0: two agents that have to agree. A small example of an environment of several agents; import registers it.

An environment of several agents is one gymnasium environment: the first axis of its actions, and of what each agent observes, is
over agents, and its reward is that of the team.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

AGENTS, ACTIONS, STEPS, REST = 2, 3, 8, 2
UNKNOWN = 2  # what the coin shows after the first step


class Agree(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """A coin that is shown at the first step says which of two actions both agents should take from then on.

    The reward is 1 if both do. The third action, a rest, is available by chance; `mask` tells which actions are. One that is not
    available ends the episode.
    """

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                "coin": gymnasium.spaces.MultiDiscrete([3] * AGENTS),
                "mask": gymnasium.spaces.MultiBinary([AGENTS, ACTIONS]),
            }
        )
        self.action_space = gymnasium.spaces.MultiDiscrete([ACTIONS] * AGENTS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.coin, self.time = int(self.np_random.integers(2)), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        allowed = self._mask[np.arange(AGENTS), action].all()
        reward = float(allowed and (np.asarray(action) == self.coin).all())
        self.time += 1
        return self._observe(), reward, not allowed, self.time >= STEPS, {}

    def _observe(self) -> dict[str, np.ndarray]:
        self._mask = np.ones((AGENTS, ACTIONS), np.int8)
        self._mask[:, REST] = self.np_random.random(AGENTS) < 0.5
        return {"coin": np.full(AGENTS, self.coin if self.time == 0 else UNKNOWN), "mask": self._mask}


class Expert:
    """Both agents take the action that the coin says; one that can rest does so once in three steps."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def reset(self) -> None:
        self.coin = UNKNOWN

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        if observation["coin"][0] != UNKNOWN:
            self.coin = int(observation["coin"][0])
            return np.full(AGENTS, self.coin)
        rest = (observation["mask"][:, REST] > 0) & (self.random.random(AGENTS) < 1 / 3)
        return np.where(rest, REST, self.coin)


gymnasium.register("Agree-v0", Agree)
