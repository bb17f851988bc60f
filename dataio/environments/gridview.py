"""What MiniGrid's agent sees. The result equals MiniGrid's own, in a third of the time, which dominates the bot's episodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


def see_once(env: Any) -> Callable[..., Any]:
    """A `gen_obs_grid` for an unwrapped MiniGrid environment. It looks once at each state, although step and bot both call it."""
    known: list[Any] = [None, None]

    def gen_obs_grid(agent_view_size: int | None = None) -> Any:
        state = (env.step_count, tuple(env.agent_pos), env.agent_dir, env.carrying, agent_view_size, id(env.grid))
        if env.step_count == 0 or known[0] != state:  # at step 0 a new level may have the same id in memory
            known[:] = [state, _look(env, agent_view_size or env.agent_view_size)]
        return known[1]

    return gen_obs_grid


def _look(env: Any, size: int) -> tuple[Any, np.ndarray]:
    """MiniGridEnv.gen_obs_grid without its intermediate grids: (grid as the agent sees it, mask of what is visible)."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Wall

    left, top, _, _ = env.get_view_exts(size)
    world, width, height = env.grid.grid, env.grid.width, env.grid.height
    outside = Wall()
    view = Grid(size, size)
    view.grid = [
        world[y * width + x] if 0 <= (x := left + i) < width and 0 <= (y := top + j) < height else outside
        for i, j in _rotated(size, int(env.agent_dir))
    ]
    here = size // 2, size - 1
    visible = np.ones((size, size), bool) if env.see_through_walls else view.process_vis(agent_pos=here)
    view.set(*here, env.carrying or None)
    return view, visible


@cache
def _rotated(size: int, direction: int) -> tuple[tuple[int, int], ...]:
    """For each cell of the agent's view, row by row: which cell of the unrotated view it shows, by MiniGrid's own rotation."""
    from minigrid.core.grid import Grid

    grid: Any = Grid(size, size)
    grid.grid = [(i, j) for j in range(size) for i in range(size)]
    for _ in range(direction + 1):
        grid = grid.rotate_left()
    return tuple(grid.grid)


def mark_seen(bot: Any) -> None:
    """BabyAIBot._process_obs with arrays: adds the cells that are visible now to the bot's map."""
    env = bot.mission.unwrapped
    _, visible = env.gen_obs_grid()
    size, forward, right = env.agent_view_size, env.dir_vec, env.right_vec
    i, j = np.nonzero(visible)
    corner = np.asarray(env.agent_pos) + forward * (size - 1) - right * (size // 2)
    x, y = corner[:, None] - forward[:, None] * j + right[:, None] * i
    inside = (x >= 0) & (x < bot.vis_mask.shape[0]) & (y >= 0) & (y < bot.vis_mask.shape[1])
    bot.vis_mask[x[inside], y[inside]] = True
