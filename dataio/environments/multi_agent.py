"""Environments of several equal agents as one gymnasium environment: MPE's simple_spread and level-based foraging.

The first axis of the observation and of the action is over agents, and the reward is the sum of what the agents earn. Names:
`mpe2/simple_spread_v3`, and `lbforaging/` before the ids of lbforaging, such as `lbforaging/Foraging-8x8-2p-1f-coop-v3`.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, Family

SPREAD, FORAGING = "mpe2/simple_spread_v3", "lbforaging/"
_STEPS = 50  # of foraging, as in the benchmark of Papoudakis et al. 2021


class _Joint:
    """An environment of n agents.

    Parameters
    ----------
    agents : int
        Their number.
    observation : gymnasium.spaces.Box
        What one of them observes.
    actions : int
        Number of actions of one of them.
    """

    metadata: dict[str, Any] = {}
    spec: Any = None

    def __init__(self, agents: int, observation: Any, actions: int) -> None:
        import gymnasium

        low, high = (np.tile(bound, (agents, 1)) for bound in (observation.low, observation.high))
        self.observation_space: Any = gymnasium.spaces.Box(low, high, dtype=observation.dtype)
        self.action_space: Any = gymnasium.spaces.MultiDiscrete([actions] * agents)
        self.agents, self.time = agents, 0

    @property
    def unwrapped(self) -> Any:
        return self


class Spread(_Joint):
    """MPE's simple_spread: as many landmarks as agents, which have to cover them without collisions. Ends after 25 steps."""

    def __init__(self, agents: int = 3, steps: int = 25, render_mode: str | None = None) -> None:
        from mpe2 import simple_spread_v3

        self._env = simple_spread_v3.parallel_env(N=agents, max_cycles=steps, render_mode=render_mode)
        self._names = self._env.possible_agents
        first = self._names[0]
        super().__init__(agents, self._env.observation_space(first), int(self._env.action_space(first).n))
        self.steps = steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        found, _ = self._env.reset(seed=seed)
        self.time = 0
        return self._stacked(found), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        found, earned, ended, _, _ = self._env.step(dict(zip(self._names, map(int, action), strict=True)))
        self.time += 1
        return self._stacked(found), float(sum(earned.values())), any(ended.values()), self.time >= self.steps, {}

    def _stacked(self, found: Any) -> np.ndarray:
        return np.stack([np.asarray(found[name]) for name in self._names])

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


class Foraging(_Joint):
    """Level-based foraging: agents load food together, if their levels suffice. Ends when all is loaded, or after 50 steps."""

    def __init__(self, name: str, steps: int = _STEPS, render_mode: str | None = None) -> None:
        import gymnasium
        import lbforaging  # noqa: F401  (registers the ids)

        self._env: Any = gymnasium.make(name, disable_env_checker=True, render_mode=render_mode)
        each: Any = self._env.observation_space
        actions: Any = self._env.action_space
        super().__init__(len(each), each[0], int(actions[0].n))
        self.steps = steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        found, _ = self._env.reset(seed=seed)
        self.time = 0
        return np.stack(found), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        found, earned, ended, _, _ = self._env.step(tuple(map(int, action)))
        self.time += 1
        return np.stack(found), float(np.sum(earned)), bool(ended), self.time >= self.steps, {}

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


class Covering:
    """Each agent of simple_spread moves to a landmark of its own: those with the smallest sum of distances at the start."""

    def reset(self) -> None:
        self._mine: tuple[int, ...] = ()

    def act(self, observation: np.ndarray, taken: Any = None) -> np.ndarray:
        agents = len(observation)
        offset = observation[:, 4 : 4 + 2 * agents].reshape(agents, agents, 2)  # from each agent to each landmark
        if not self._mine:
            far = np.linalg.norm(offset, axis=2)
            self._mine = min(permutations(range(agents)), key=lambda p: far[np.arange(agents), p].sum())
        # Agents slide on: where they will be in a few steps counts
        wanted = offset[np.arange(agents), self._mine] - observation[:, :2] * 0.4
        x, y = wanted.T
        sideways = np.where(x < 0, 1, 2)
        along = np.where(np.abs(x) > np.abs(y), sideways, np.where(y < 0, 3, 4))
        return np.where(np.abs(wanted).max(1) < 0.05, 0, along)


class Gathering:
    """All agents of level-based foraging walk to the food that is nearest to all of them together, and load it."""

    def __init__(self, env: Foraging) -> None:
        self._field = env._env.unwrapped

    def reset(self) -> None:
        pass

    def act(self, observation: np.ndarray, taken: Any = None) -> np.ndarray:
        food = np.argwhere(self._field.field > 0)
        places = np.array([player.position for player in self._field.players])
        if not len(food):
            return np.zeros(len(places), np.int64)
        target = food[np.abs(food[None] - places[:, None]).sum(2).sum(0).argmin()]
        return np.array([self._towards(place, target, places) for place in places])

    def _towards(self, place: np.ndarray, target: np.ndarray, places: np.ndarray) -> int:
        if np.abs(target - place).sum() == 1:
            return 5
        moves = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # north, south, west, east
        blocked = {tuple(p) for p in places} | {tuple(p) for p in np.argwhere(self._field.field > 0)}
        free = [i for i, move in enumerate(moves) if tuple(place + move) not in blocked]
        free = [i for i in free if (place + moves[i] >= 0).all() and (place + moves[i] < self._field.field.shape).all()]
        return 1 + min(free, key=lambda i: int(np.abs(target - place - moves[i]).sum())) if free else 0


class MultiAgent(Family):
    """The environments of mpe2 and lbforaging whose agents are equal."""

    extra = "madt"

    def owns(self, task: str) -> bool:
        return task.startswith(("mpe2/", FORAGING))

    def names(self) -> list[str]:
        import gymnasium
        import lbforaging  # noqa: F401
        import mpe2  # noqa: F401

        return sorted([SPREAD, *(FORAGING + name for name in gymnasium.registry if name.startswith("Foraging-"))])

    def make(self, task: str, **options: Any) -> Environment:
        return Spread(**options) if task == SPREAD else Foraging(task.removeprefix(FORAGING), **options)

    def horizon_options(self, steps: int) -> dict[str, Any]:
        return {"steps": steps}

    def max_steps(self, task: str, env: Environment) -> int:
        return int(env.steps)  # type: ignore[attr-defined]

    def expert(self, task: str, env: Environment) -> Expert:
        return Covering() if task == SPREAD else Gathering(env)  # type: ignore[arg-type]


FAMILY = MultiAgent()
