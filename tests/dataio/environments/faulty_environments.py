"""Experts that fail on purpose. They are in a module of their own, so that spawned processes can import them."""

from __future__ import annotations

import os
from typing import Any

from tiphys.dataio.environments import ExpertLost, Stateless


class Left:
    """An expert for CartPole. It is lost if the cart starts to the right, else it pushes to where the pole falls."""

    def __init__(self, task: str, env: Any) -> None:
        self._env = env

    def reset(self) -> None:
        self._lost = float(self._env.unwrapped.state[0]) > 0.02

    def act(self, observation: Any, taken: Any = None) -> int:
        if self._lost:
            raise ExpertLost("cart starts too far to the right")
        return int(observation[2] > 0)


def always_lost(task: str, env: Any) -> Any:
    def act(observation: Any) -> int:
        raise ExpertLost("nowhere to go")

    return Stateless(act)


def raises(task: str, env: Any) -> Any:
    """An expert that raises in its thirteenth episode."""

    class Raises:
        seen = 0

        def reset(self) -> None:
            Raises.seen += 1

        def act(self, observation: Any, taken: Any = None) -> int:
            if Raises.seen > 12:  # after the episodes of the scores
                raise ZeroDivisionError("the simulator diverged")
            return 0

    return Raises()


def dies(task: str, env: Any) -> Any:
    def act(observation: Any) -> int:
        os._exit(9)

    return Stateless(act)
