"""Arithmetic of the benchmark: normalised scores, the interquartile mean, intervals, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def normalised(score: float, random: float, expert: float) -> float:
    """0: as random actions; 1: as the expert. Raises ValueError if both score the same, because then nothing is measured."""
    if random == expert:
        raise ValueError(f"random actions and the expert both score {expert:g}, so a score cannot be normalised")
    return (score - random) / (expert - random)


def iqm(values: Any) -> float:
    """Interquartile mean of all values: that of the middle half, as rliable defines it (Agarwal et al. 2021).

    A quarter of the values, rounded down, is left out at each end.
    """
    flat = np.sort(np.asarray(values, np.float64), axis=None)
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


@dataclass(frozen=True)
class Played:
    """What is known of the episodes of one task that one policy played.

    Attributes
    ----------
    mean, std : float
        Of the score of an episode, return or success, in its own units.
    episodes : int
        How many were played.
    random, expert : float
        The scores that become 0 and 1.
    success : bool
        The score is a success: 0 or 1.
    """

    mean: float
    std: float
    episodes: int
    random: float
    expert: float
    success: bool

    @classmethod
    def of(cls, scores: Mapping[str, Any], random: float | None = None, expert: float | None = None) -> Played:
        """From the entry of a task in an evaluation.json; `random` and `expert` instead of those of the policy's data."""
        success = scores["normalise"] == "success"
        rate = scores["success_rate"]
        return cls(
            mean=rate if success else scores["mean_return"],
            std=(rate * (1 - rate)) ** 0.5 if success else scores["std_return"],
            episodes=scores["episodes"],
            random=scores["random"] if random is None else random,
            expert=scores["expert"] if expert is None else expert,
            success=success,
        )

    @property
    def score(self) -> float:
        """The normalised score."""
        return normalised(self.mean, self.random, self.expert)

    def draws(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n] normalised scores that other episodes might have given.

        A success rate is drawn from its posterior with Jeffreys' prior, which is not degenerate at 0 and 1; a mean return from a
        normal distribution.
        """
        if self.success:
            hits = self.mean * self.episodes
            found = rng.beta(hits + 0.5, self.episodes - hits + 0.5, n)
        else:
            found = rng.normal(self.mean, self.std / self.episodes**0.5, n)
        return (found - self.random) / (self.expert - self.random)


def interval(
    played: Sequence[Sequence[Played]], statistic: Callable[[np.ndarray], float] = np.mean, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of normalised scores, by a bootstrap in two levels.

    First the seeds of each task are drawn with replacement (rliable's stratified bootstrap), then the mean of each drawn seed's
    episodes (`Played.draws`). So one seed already has an interval, which then covers the episodes only.

    Parameters
    ----------
    played : sequence of sequence of Played
        For each task, one `Played` for each seed.
    statistic : function
        From an array [seeds, tasks] to a number.
    draws : int
        Number of bootstrap samples. The same arguments always give the same interval.
    """
    rng = np.random.default_rng(0)
    samples = []
    for task in played:
        scores = np.stack([seed.draws(draws, rng) for seed in task])  # [seeds, draws]
        chosen = rng.integers(0, len(task), (len(task), draws))
        samples.append(np.take_along_axis(scores, chosen, 0))
    table = np.stack(samples, -1)  # [seeds, draws, tasks]
    found = [statistic(table[:, i]) for i in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def worst_task(scores: np.ndarray) -> float:
    """The lowest mean over seeds, scores [seeds, tasks]."""
    return float(scores.mean(0).min())


def matrix(played: Sequence[Sequence[Played]]) -> np.ndarray:
    """Normalised scores [seeds, tasks]. All tasks must have the same number of seeds."""
    return np.array([[seed.score for seed in task] for task in played]).T


def task_row(name: str, seeds: Sequence[Played]) -> list[str]:
    """The row of a task: name, mean, worst seed, interval, episodes."""
    scores = [s.score for s in seeds]
    return [
        name,
        two(float(np.mean(scores))),
        two(min(scores)),
        span(interval([seeds])),
        str(sum(s.episodes for s in seeds)),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def two(value: float) -> str:
    """A score with two decimals, without a leading zero: .97, 1.00, −.05."""
    text = f"{abs(value):.2f}"
    return ("−" if value < -0.004 else "") + text.removeprefix("0")


def span(ends: tuple[float, float]) -> str:
    """An interval."""
    return f"{two(ends[0])} to {two(ends[1])}"
