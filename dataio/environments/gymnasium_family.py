"""All other ids that are registered with gymnasium: Box2D, MuJoCo v4 and v5, toy text, and those of installed packages."""

from __future__ import annotations

from typing import Any

from tiphys.dataio.environments.family import Environment, Expert, Family, Stateless, render_without_display


class GymnasiumFamily(Family):
    noise = 0.1

    def owns(self, task: str) -> bool:
        return task in self.names()

    def names(self) -> list[str]:
        import gymnasium

        return sorted(name for name, spec in gymnasium.registry.items() if spec.entry_point is not None)

    def make(self, task: str, **options: Any) -> Environment:
        import gymnasium

        render_without_display()
        try:
            env: Any = gymnasium.make(task, disable_env_checker=True, **options)
            return env
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(str(error), name=getattr(error.__cause__, "name", None)) from error

    def expert(self, task: str, env: Environment) -> Expert:
        if task.startswith("LunarLander"):
            from gymnasium.envs.box2d.lunar_lander import heuristic

            return Stateless(lambda observation: heuristic(env.unwrapped, observation))  # type: ignore[attr-defined]
        return super().expert(task, env)


FAMILY = GymnasiumFamily()
