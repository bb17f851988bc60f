"""MiniGrid-Memory: see an object, walk down a hallway, turn to the same object there. With an oracle as the expert."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tiphys.dataio.environments.babyai import FORWARD, LEFT, RIGHT, BabyAI
from tiphys.dataio.environments.family import Environment, Expert

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # (x, y) of one step in each `agent_dir`
Pose = tuple[int, int, int]  # x, y, direction


class Memory(BabyAI):
    noise = 0.1

    def owns(self, task: str) -> bool:
        return task.startswith("MiniGrid-Memory")

    def names(self) -> list[str]:
        return [name for name in super().names() if self.owns(name)]

    def expert(self, task: str, env: Environment) -> Expert:
        return Oracle(env)


class Oracle:
    """Takes a shortest path to a place from which the first room's object is visible, then a shortest path to the same object.

    It must look at the object first: the start may be in the hallway, facing away. A demonstration that goes straight to the goal
    from there cannot be learned, because the observations do not show which object is correct.
    """

    def __init__(self, env: Environment) -> None:
        self._env: Any = env.unwrapped  # type: ignore[attr-defined]
        self._seen = False

    def reset(self) -> None:
        self._seen = False

    def act(self, observation: Any, taken: Any = None) -> int:
        env = self._env
        clue = (1, env.height // 2 - 1)
        self._seen = self._seen or bool(env.agent_sees(*clue))
        if self._seen:
            return self._toward(lambda pose: pose[:2] == tuple(env.success_pos))
        return self._toward(lambda pose: self._visible(pose, clue))

    def _visible(self, pose: Pose, cell: tuple[int, int]) -> bool:
        """Whether the agent would see this cell from that pose, by MiniGrid's own rules of occlusion."""
        env = self._env
        now = env.agent_pos, env.agent_dir
        env.agent_pos, env.agent_dir = pose[:2], pose[2]
        try:
            return bool(env.agent_sees(*cell))
        finally:
            env.agent_pos, env.agent_dir = now

    def _toward(self, goal: Callable[[Pose], bool]) -> int:
        """The first action of a shortest path to a pose that satisfies `goal`, found by breadth-first search."""
        env = self._env
        start = (int(env.agent_pos[0]), int(env.agent_pos[1]), int(env.agent_dir))
        queue: deque[tuple[Pose, int]] = deque((after, action) for action, after in self._moves(start))
        known = {start}
        while queue:
            pose, first = queue.popleft()
            if pose in known:
                continue
            known.add(pose)
            if goal(pose):
                return first
            queue.extend((after, first) for _, after in self._moves(pose))
        raise RuntimeError(f"{env.spec.id if env.spec else env}: there is no path to the goal from {start}")

    def _moves(self, pose: Pose) -> list[tuple[int, Pose]]:
        x, y, direction = pose
        moves = [(LEFT, (x, y, (direction - 1) % 4)), (RIGHT, (x, y, (direction + 1) % 4))]
        ahead = (x + _STEPS[direction][0], y + _STEPS[direction][1])
        cell = self._env.grid.get(*ahead)
        if (cell is None or cell.can_overlap()) and ahead != tuple(self._env.failure_pos):
            moves.append((FORWARD, (*ahead, direction)))
        return moves


FAMILY = Memory()
