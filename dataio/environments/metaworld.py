"""The 50 manipulation tasks of Meta-World v3, named like `metaworld/reach-v3`, with their scripted policies (Yu et al. 2019)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, Family, Stateless, render_without_display

PREFIX = "metaworld/"
HORIZON = 150  # enough for the scripted policies; in most of Meta-World's own 500 steps the robot has already finished


class MetaWorld(Family):
    normalise = "success"
    noise = 0.3

    def owns(self, task: str) -> bool:
        return task.startswith(PREFIX)

    def names(self) -> list[str]:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        return sorted(PREFIX + name for name in ALL_V3_ENVIRONMENTS)

    def make(self, task: str, horizon: int = HORIZON, **options: Any) -> Environment:
        render_without_display()
        return _environment(task.removeprefix(PREFIX), horizon, options)

    def horizon_options(self, steps: int) -> dict[str, Any]:
        return {"horizon": steps}

    def max_steps(self, task: str, env: Environment) -> int:
        return env.horizon  # type: ignore[attr-defined]

    def expert(self, task: str, env: Environment) -> Expert:
        from metaworld.policies import ENV_POLICY_MAP

        scripted: Any = ENV_POLICY_MAP[task.removeprefix(PREFIX)]
        policy, space = scripted(), env.action_space
        # the policies exceed the space and warn; the environment clips, so the clipped action must be recorded
        warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
        return Stateless(lambda seen: np.clip(policy.get_action(seen), space.low, space.high).astype(np.float32))


def _environment(name: str, horizon: int, options: dict[str, Any]) -> Environment:
    import gymnasium
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env: Any = ALL_V3_ENVIRONMENTS[name](**options)
    # What a benchmark's Task would set, without making fifty goals first: the goal is visible, because the scripted
    # policies read it, and each reset draws start and goal from the task's own distribution, by the episode's seed.
    env._set_task_called = True
    env._partially_observable = False
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env.__dict__.pop("sawyer_observation_space", None)
    env.observation_space = env.sawyer_observation_space

    class MetaWorldEnvironment(gymnasium.Wrapper):
        """Ends at the first success, or after `horizon` steps."""

        def __init__(self) -> None:
            super().__init__(env)
            self.horizon, self._steps = horizon, 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            self._steps = 0
            if seed is not None:
                env.seed(seed)
            # An episode must depend on its seed alone, which needs both resets. This one keeps the last episode's state out of
            # the random draws. The next line calls reset_model twice, which keeps it out of 13 tasks' first observation.
            mujoco.mj_resetData(env.model, env.data)
            return env.reset()

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, reward, _, _, info = env.step(np.asarray(action, np.float32))
            self._steps += 1
            success = bool(info["success"])
            info["success"] = success
            return observation, float(reward), success, not success and self._steps >= self.horizon, info

    return MetaWorldEnvironment()


FAMILY = MetaWorld()
