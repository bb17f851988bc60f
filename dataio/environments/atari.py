"""Atari 2600 games by the Arcade Learning Environment's ids (`ALE/Pong-v5`); the agents that play them are the user's."""

from __future__ import annotations

from typing import Any

from tiphys.dataio.environments.family import Environment
from tiphys.dataio.environments.gymnasium_family import GymnasiumFamily

PREFIX = "ALE/"


class Atari(GymnasiumFamily):
    extra = "atari"
    noise = 0.0  # sticky actions disturb the v5 games already

    def owns(self, task: str) -> bool:
        return task.startswith(PREFIX)

    def names(self) -> list[str]:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        return sorted(name for name in gymnasium.registry if name.startswith(PREFIX))

    def make(self, task: str, **options: Any) -> Environment:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every process prints the emulator's banner
        return super().make(task, **options)

    def max_steps(self, task: str, env: Environment) -> int:
        """The games' own limit of 108,000 frames, in steps of this environment's frame skip."""
        spec = env.spec  # type: ignore[attr-defined]
        frames, skip = spec.kwargs.get("max_num_frames_per_episode") or 0, spec.kwargs.get("frameskip", 1)
        return spec.max_episode_steps or (frames // skip if isinstance(skip, int) else 0)


FAMILY = Atari()
