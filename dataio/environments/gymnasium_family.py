"""All other ids that are registered with gymnasium: Box2D, MuJoCo v4 and v5, toy text, and those of installed plug-ins."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tiphys.dataio.environments.family import Environment, Expert, Family, Stateless, render_without_display


class GymnasiumFamily(Family):
    noise = 0.1

    def owns(self, task: str) -> bool:
        import gymnasium

        return task in gymnasium.registry or task in self.names()

    def names(self) -> list[str]:
        import gymnasium

        _register_plugins()
        return sorted(name for name, spec in gymnasium.registry.items() if spec.entry_point is not None)

    def make(self, task: str, **options: Any) -> Environment:
        import gymnasium

        render_without_display()
        try:
            env: Any = gymnasium.make(task, disable_env_checker=True, **options)
            return env
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(str(error), name=getattr(error.__cause__, "name", None)) from error

    def horizon_options(self, steps: int) -> dict[str, Any]:
        return {"max_episode_steps": steps}

    def expert(self, task: str, env: Environment) -> Expert:
        if task.startswith("LunarLander"):
            from gymnasium.envs.box2d.lunar_lander import heuristic

            return Stateless(lambda observation: heuristic(env.unwrapped, observation))  # type: ignore[attr-defined]
        return super().expert(task, env)


@cache
def _register_plugins() -> None:
    """Register the ids of installed packages that have an entry point in the group `gymnasium.envs`.

    Gymnasium did so itself before version 1.0. The entry point's name is the namespace of the ids, `__root__` stands for none.
    """
    from gymnasium.envs.registration import namespace

    for point in entry_points(group="gymnasium.envs"):
        try:
            register = point.load()
            if point.name == "__root__":
                register()
            else:
                with namespace(point.name):
                    register()
        except Exception as error:  # the other packages' environments work without it
            warnings.warn(f"the gymnasium plug-in {point.value} cannot be loaded: {error!r}", stacklevel=2)


FAMILY = GymnasiumFamily()
