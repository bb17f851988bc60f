"""A 4 × 4 grid: walks of six steps towards a goal that no observation tells, with 30 % random moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.ideas.worlds import REWARD, Behaviour, Played, discrete
from tiphys.dataio.episode import TaskSpec, Window
from tiphys.pretrain.acting.infer import fill_in
from tiphys.pretrain.acting.policy import Policy

SIDE = 4
MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
STEPS = 6


def after(cell: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The cells after actions. A move against a wall stays where it is."""
    place = np.stack(np.divmod(cell, SIDE), -1) + MOVES[action]
    return np.clip(place, 0, SIDE - 1) @ np.array([SIDE, 1])


class Grid:
    """The reward is 1 for each step that changes the cell."""

    steps = STEPS

    def __init__(self) -> None:
        fields = (discrete("observation", "observation", SIDE * SIDE), discrete("action", "action", len(MOVES)), REWARD)
        self.task = TaskSpec("grid", fields)

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.cell = random.integers(0, SIDE * SIDE, n)
        return {"observation": self.cell}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        before, self.cell = self.cell, after(self.cell, actions)
        return {"observation": self.cell}, (before != self.cell).astype(np.float64)


def walker(noise: float = 0.3, to: int = -1) -> Callable[[np.random.Generator], Behaviour]:
    """Walks to a goal and stays there; a share of its moves are random. `to`: the goal; -1: one is drawn for each episode."""

    def make(random: np.random.Generator) -> Behaviour:
        goal = np.zeros(0, np.int64)

        def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
            nonlocal goal
            cell = fields["observation"]
            if step == 0:
                goal = random.integers(0, SIDE * SIDE, len(cell)) if to < 0 else np.full(len(cell), to)
            off = np.stack(np.divmod(goal, SIDE), -1) - np.stack(np.divmod(cell, SIDE), -1)
            row = (np.abs(off[:, 0]) > 0) & ((np.abs(off[:, 1]) == 0) | (random.random(len(cell)) < 0.5))
            towards = np.where(row, np.where(off[:, 0] < 0, 1, 2), np.where(off[:, 1] < 0, 3, 4))
            towards = np.where((off == 0).all(1), 0, towards)
            return np.where(random.random(len(cell)) < noise, random.integers(0, len(MOVES), len(cell)), towards)

        return act

    return make


def pairs(data: Played, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cell, an action and the next cell of each of n episodes."""
    i, t = np.arange(n), np.arange(n) % (STEPS - 1)
    return data.fields["observation"][i, t], data.actions[i, t], data.fields["observation"][i, t + 1]


def filled(policy: Policy, data: Played, role: str, n: int = 400) -> np.ndarray:
    """[n] the next cell (role `observation`) or the action between two cells, of which alone the policy is told."""
    layout = policy.processor.layouts["it"]["grid"]
    number = np.arange(STEPS)
    windows = []
    for i in range(n):
        at = i % (STEPS - 1)
        seen = number == at if role == "observation" else (number == at) | (number == at + 1)
        window = data.window(i)
        fields: dict[str, Any] = dict(window.fields) | {"reward": np.zeros(STEPS, np.float32)}
        hidden = {"observation": ~seen, "return": number >= 0, "action": (number != at) | (role == "action")}
        windows.append(
            Window(
                entry=0,
                task=0,
                episode=window.episode,
                start=0,
                steps=STEPS,
                episode_steps=STEPS,
                fields=fields,
                step=window.step,
                returns_to_go=window.returns_to_go,
                valid=window.valid,
                hidden=hidden,
            )
        )
    name = {"observation": "observation", "action": "action"}[role]
    found = fill_in(policy.model, policy.processor, layout, windows, role)
    return np.array([one[name].values[i % (STEPS - 1) + (role == "observation")] for i, one in enumerate(found)])
