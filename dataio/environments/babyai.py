"""BabyAI and MiniGrid levels by their gymnasium ids, with BabyAI's bot as the expert (Chevalier-Boisvert et al. 2019)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, ExpertLost, Family, NoExpert
from tiphys.dataio.environments.gridview import mark_seen, see_once
from tiphys.dataio.episode import FieldSpec

LEFT, RIGHT, FORWARD = range(3)


class BabyAI(Family):
    normalise = "success"
    noise = 0.2  # a fifth of random turns and steps leads the bot into states that a learner's errors lead to

    def owns(self, task: str) -> bool:
        return task.startswith(("BabyAI-", "MiniGrid-"))

    def names(self) -> list[str]:
        import gymnasium
        import minigrid

        del minigrid  # importing it registers its ids
        return sorted(n for n in gymnasium.registry if n.startswith(("BabyAI-", "MiniGrid-")))

    def make(self, task: str, **options: Any) -> Environment:
        import gymnasium
        import minigrid

        del minigrid
        return _grid_environment(gymnasium.make(task, disable_env_checker=True, **options).unwrapped)

    def expert(self, task: str, env: Environment) -> Expert:
        if not hasattr(env.unwrapped, "instrs") and not task.startswith("BabyAI-"):  # type: ignore[attr-defined]
            raise NoExpert(
                f"{task!r} has no expert, because the bot only acts in BabyAI levels: give one with "
                "`--policy module:function`"
            )
        return Bot(env)

    def max_steps(self, task: str, env: Environment) -> int:
        """The largest horizon of ten missions, because a level's horizon depends on its mission."""
        largest = 0
        for seed in range(10):
            env.reset(seed=seed)
            largest = max(largest, int(env.unwrapped.max_steps))  # type: ignore[attr-defined]
        return largest

    def fields(self, task: str, env: Environment) -> tuple[FieldSpec, ...]:
        from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

        values = max(len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX))
        fields = []
        for spec in super().fields(task, env):
            if spec.name == "observation.image":  # cells of (object, colour, state), not a picture
                spec = FieldSpec(spec.name, spec.role, "discrete", spec.dtype, spec.shape, values=values)
            elif spec.role == "text":  # an episode has one mission
                spec = replace(spec, per="episode")
            fields.append(spec)
        return tuple(fields)

    def disturb(self, action: Any, space: Any, noise: float, rng: np.random.Generator) -> Any:
        """Only random turns and steps, which can be undone. Picking up, dropping or opening cannot always be undone."""
        return int(rng.integers(LEFT, FORWARD + 1)) if rng.random() < noise else action


def _grid_environment(env: Any) -> Environment:
    import gymnasium

    class GridEnvironment(gymnasium.Wrapper):
        """Adds `info["success"]`, and replaces MiniGrid's space of the mission by gymnasium's Text."""

        def __init__(self) -> None:
            super().__init__(env)
            env.gen_obs_grid = see_once(env)
            spaces = dict(env.observation_space.spaces)
            spaces["mission"] = gymnasium.spaces.Text(max_length=1024)
            self.observation_space = gymnasium.spaces.Dict(spaces)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            with contextlib.redirect_stdout(io.StringIO()):  # level generation prints each rejected sample
                return self.env.reset(seed=seed, options=options)

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, info = self.env.step(int(action))
            info["success"] = bool(terminated and float(reward) > 0)
            return observation, float(reward), terminated, truncated, info

    return GridEnvironment()


class Bot:
    """BabyAI's bot. It plans on what it has seen so far, and plans again after each disturbance."""

    def __init__(self, env: Environment) -> None:
        self._env: Any = env
        self._bot: Any = None
        self._action: Any = None  # that it chose last

    def reset(self) -> None:
        from minigrid.utils.baby_ai_bot import BabyAIBot

        class QuickBot(BabyAIBot):
            _process_obs = mark_seen

        self._bot, self._action = QuickBot(self._env), None

    def act(self, observation: Any, taken: Any = None) -> int:
        assert self._bot is not None, "reset() comes first"
        try:
            action = self._bot.replan(self._action if taken is None else taken)
        except (
            Exception
        ) as error:  # disturbances break assumptions that the bot asserts, by exceptions of several classes
            raise ExpertLost(f"the bot gave up: {error!r}") from error
        self._action = action
        return int(action)


FAMILY = BabyAI()
