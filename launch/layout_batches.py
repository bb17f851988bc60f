"""The largest micro-batches of a run, found in its sampling plan before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.objectives import Objectives
    from tiphys.recipes.schema import Recipe

STEPS = 256  # of the plan that are looked at
MOST_WINDOWS = 1 << 18  # rows that are looked at in all of these steps together


@dataclass(frozen=True)
class Batches:
    """Steps of a plan.

    worst   global batches: the step with most tokens, and for each mixture entry the one with most tokens of it; the rows of each
            are in descending order of their tokens
    tokens  mean tokens of a step
    bytes   mean bytes of a step's batch, as the loader hands it over
    steps   how many steps were looked at
    """

    worst: tuple[TokenBatch, ...]
    tokens: float
    bytes: float
    steps: int


def largest_rows(recipe: Recipe, plan: SamplingPlan, rows: int) -> tuple[int, int]:
    """Tokens of a row, the mean of the `rows` largest ones of a step, rounded up, in the step in which these have the most; and
    how many steps were looked at. Nothing is read.
    """
    steps = _steps(recipe, plan)
    sums = [
        np.sort(np.bincount(p.row, p.tokens, minlength=plan.rows))[-rows:].mean()
        for p in plan.many(range(steps), [np.arange(plan.rows)] * steps)
    ]
    return math.ceil(max(sums)), steps


def first_rows(batch: TokenBatch, rows: int) -> TokenBatch:
    """The first `rows` rows; all of them again and again if there are fewer."""
    times = -(-rows // max(1, batch.rows))
    return type(batch).concatenate([batch] * times).select(slice(0, rows))


def _steps(recipe: Recipe, plan: SamplingPlan) -> int:
    return max(1, min(STEPS, recipe.train.steps, MOST_WINDOWS // plan.rows))


def find_batches(recipe: Recipe, plan: SamplingPlan, objectives: Objectives) -> Batches:
    """Look at the first steps of a plan; read the windows of the largest ones."""
    steps = _steps(recipe, plan)
    planned = plan.many(range(steps), [np.arange(plan.rows)] * steps)
    sums = np.array(
        [np.bincount(p.entry, p.tokens, minlength=len(plan.entries)) for p in planned]
    )  # tokens by step and entry
    chosen = dict.fromkeys([int(sums.sum(1).argmax()), *(int(column.argmax()) for column in sums.T if column.any())])
    worst = tuple(_longest_first(_load(recipe, plan, objectives, step)) for step in list(chosen)[:4])
    size = np.mean([sum(a.nbytes for a in batch.to_arrays().values()) for batch in worst])
    return Batches(worst, float(sums.sum(1).mean()), float(size), steps)


def _load(recipe: Recipe, plan: SamplingPlan, objectives: Objectives, step: int) -> TokenBatch:
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.dataio.placement import Home
    from tiphys.launch.plan import loader_arguments

    home = Home(process=0, processes=1, weights=None)
    arguments = loader_arguments(recipe, objectives)
    with TrajectoryLoader(plan, home, **arguments, start=step, stop=step + 1) as loader:
        loaded = next(loader)
        copies = {name: array.copy() for name, array in loaded.arrays.items()}
        loaded.release()
    return TokenBatch.from_arrays(copies)


def _longest_first(batch: TokenBatch) -> TokenBatch:
    order = np.argsort(-(batch.segment > 0).sum(1), kind="stable")
    return TokenBatch.concatenate([batch.select(slice(int(i), int(i) + 1)) for i in order])
