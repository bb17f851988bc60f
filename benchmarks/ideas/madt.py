"""Multi-agent Decision Transformer (Meng et al. 2021): agents agree on a convention that only the first step tells.

A coin that both agents see at the first step says which of two actions both take from then on. A third action is not always
available. Controls: windows of one step remember no coin; the policy is not told which actions are available.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import REWARD
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy

AGENTS, ACTIONS, STEPS, NOTHING = 2, 3, 5, 2
TASK = TaskSpec(
    "agree",
    (
        FieldSpec("observation.coin", "observation", "discrete", "int64", (AGENTS,), values=3),
        FieldSpec("mask", "mask", "discrete", "bool", (AGENTS, ACTIONS), values=2),
        FieldSpec("action", "action", "discrete", "int64", (AGENTS,), values=ACTIONS),
        REWARD,
    ),
)


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    random = np.random.default_rng([seed, 1])
    dataset = write(folder / "data", [TASK], [episode(random, i) for i in range(400)])
    policy = learnt(dataset, seed, STEPS)
    agreed, illegal = play(policy, seed)
    forgetful = unmasked = None
    if control:
        forgetful = play(learnt(dataset, seed, 1), seed)[0]
        unmasked = play(policy, seed, masked=False)[1]
    yield Mark(
        "share that keeps the convention", agreed, at_least(0.95), forgetful, at_most(0.65), "windows of one step"
    )
    yield Mark("share of actions not available", illegal, at_most(0.0), unmasked, at_least(0.05), "all seem available")


def begin(random: np.random.Generator) -> tuple[int, np.ndarray]:
    """The coin, and which actions are available: the third one, by chance, at each step and for each agent."""
    can = np.ones((STEPS, AGENTS, ACTIONS), bool)
    can[..., NOTHING] = random.random((STEPS, AGENTS)) < 0.5
    return int(random.integers(2)), can


def seen(coin: int, step: int) -> np.ndarray:
    return np.full(AGENTS, coin if step == 0 else 2)


def episode(random: np.random.Generator, number: int) -> Episode:
    """Both agents keep to the coin; in one step of three they do nothing, if they can, which costs no reward."""
    coin, can = begin(random)
    rest = can[..., NOTHING] & (random.random((STEPS, AGENTS)) < 1 / 3)
    rest[0] = False
    actions = np.where(rest, NOTHING, coin)
    fields = {
        "observation.coin": np.stack([seen(coin, t) for t in range(STEPS)]),
        "mask": can,
        "action": actions,
        "reward": np.isin(actions, (coin, NOTHING)).all(1).astype(np.float32),
    }
    return Episode(f"agree-{number}", TASK.name, fields, STEPS)


def learnt(dataset: str, seed: int, window: int) -> Policy:
    objective = {"paradigm": "madt", "context": 64, "window": window, "options": {"agents": AGENTS}}
    return train([{"dataset": dataset}], objective, steps=150, rows=16, seed=seed, data={"starts": "windows"})


def play(policy: Policy, seed: int, masked: bool = True, episodes: int = 60) -> tuple[float, float]:
    """Share of later actions that are the coin's, of those that do something; and share of all that were not available."""
    random = np.random.default_rng([seed, 3])
    coins, can = (np.stack(some) for some in zip(*(begin(random) for _ in range(episodes)), strict=True))
    policy.reset(TASK.name, episodes)
    rewards: list[float] | None = None
    kept: list[Any] = []
    illegal: list[Any] = []
    for step in range(STEPS):
        told = can[:, step] if masked else np.ones_like(can[:, step])
        given = [{"coin": seen(coin, step), "mask": told[i]} for i, coin in enumerate(coins)]
        actions = np.stack(policy.act(given, rewards))
        rewards = ((actions == coins[:, None]) | (actions == NOTHING)).all(1).astype(float).tolist()
        illegal.append(~np.take_along_axis(can[:, step], actions[..., None], -1)[..., 0])
        kept += (actions == coins[:, None])[actions != NOTHING].tolist() if step else []
    return float(np.mean(kept)), float(np.mean(illegal))
