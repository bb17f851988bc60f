"""Scores of a policy from its episodes: means, intervals, expert-normalised scores, and the share of demonstrated states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiphys.dataio.collect import Outcome, score
from tiphys.dataio.episode import TaskSpec


def summary(spec: TaskSpec, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The entry of a task in evaluation.json.

    Its keys: episodes, mean_return, success_rate (None if the task has no success), random and expert (scores that are stored in
    the dataset), normalise (which score they are: return or success), expert_normalized = (score − random) / (expert − random),
    std_return, mean_length, and 95 % intervals `…_interval` (bootstrap over episodes; Wilson 1927 for the success rate).
    """
    returns = np.array([o.total_return for o in outcomes])
    known = [o.success for o in outcomes if o.success is not None]
    scores = np.array([score(spec, o) for o in outcomes])
    normalized = interval = None
    if spec.random is not None and spec.expert is not None and spec.expert != spec.random:
        scale = spec.expert - spec.random
        normalized = (float(scores.mean()) - spec.random) / scale
        if spec.normalise == "success":
            ends = wilson(int(scores.sum()), len(scores))
        else:
            ends = bootstrap(scores)
        interval = [(end - spec.random) / scale for end in ends]
    return {
        "episodes": len(outcomes),
        "mean_return": float(returns.mean()),
        "success_rate": float(np.mean(known)) if known else None,
        "random": spec.random,
        "expert": spec.expert,
        "expert_normalized": normalized,
        "normalise": spec.normalise,
        "std_return": float(returns.std()),
        "mean_length": float(np.mean([o.steps for o in outcomes])),
        "mean_return_interval": bootstrap(returns),
        "success_rate_interval": wilson(sum(known), len(known)) if known else None,
        "expert_normalized_interval": interval,
    }


def by_objective(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(task, objective, scores) of everything in an evaluation.json. The objective is "" in one of an earlier version."""
    for task, scores in evaluation["tasks"].items():
        yield task, scores.get("objective", ""), scores
        for objective, others in scores.get("objectives", {}).items():
            yield task, objective, others


def wilson(successes: int, trials: int) -> list[float]:
    """95 % score interval of a rate (Wilson 1927)."""
    z2, rate = 1.96**2, successes / trials
    middle, half = rate + z2 / (2 * trials), (z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) ** 0.5
    return [(middle - half) / (1 + z2 / trials), (middle + half) / (1 + z2 / trials)]


def bootstrap(values: np.ndarray, draws: int = 2000) -> list[float]:
    """95 % percentile interval of a mean (Efron 1979). The same values always give the same interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def seen_share(visited: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> float | None:
    """Share of an evaluation's states that are among the known ones. Both are hashes. None if no state was hashed."""
    states = np.concatenate([np.asarray(v, np.uint64) for v in visited])
    return float(np.isin(states, np.concatenate(known)).mean()) if len(states) else None
