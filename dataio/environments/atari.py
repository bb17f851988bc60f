"""Atari 2600 games by the ids of the Arcade Learning Environment (`ALE/Pong-v5`). The user must give agents that play them."""

from __future__ import annotations

from typing import Any

from tiphys.dataio.environments.family import Environment
from tiphys.dataio.environments.gymnasium_family import GymnasiumFamily

PREFIX = "ALE/"


class Atari(GymnasiumFamily):
    extra = "atari"
    noise = 0.0  # the v5 games already have sticky actions

    def owns(self, task: str) -> bool:
        return task.startswith(PREFIX)

    def names(self) -> list[str]:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        return sorted(name for name in gymnasium.registry if name.startswith(PREFIX))

    def make(self, task: str, **options: Any) -> Environment:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # otherwise each process prints a banner
        return super().make(task, **options)

    def max_steps(self, task: str, env: Environment) -> int:
        """The games' limit of frames (108,000), in steps of the environment's frame skip; 0 if the skip is random."""
        spec = env.spec  # type: ignore[attr-defined]
        frames, skip = spec.kwargs.get("max_num_frames_per_episode") or 0, spec.kwargs.get("frameskip", 1)
        return spec.max_episode_steps or (frames // skip if isinstance(skip, int) else 0)


FAMILY = Atari()
