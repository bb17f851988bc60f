"""Is training healthy? A rule that finds steps whose loss shows that the model is damaged, from losses and gradient norms alone.

All ranks see the same numbers, so all come to the same verdict, and a resumed run comes to the verdict of a run that was never
stopped: the state of the rule is in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tiphys.recipes.schema import Recipe

WINDOW = 128  # finite losses that the next one is compared with
FAR = 10.0  # median absolute deviations above the median
ROW = 3  # steps in a row that are so far above
TRUST = 32  # healthy steps after a checkpoint that make it trusted
_LEAST = 1e-3  # the deviation counts as at least this share of the median, so that a constant loss may move


@dataclass(frozen=True)
class Spike:
    """Steps whose loss is not that of a healthy model. They are done, so the model is damaged.

    first, last  training steps, counted from 1
    why          for people
    tasks        numbers of the tasks whose loss stands out at the last step
    """

    first: int
    last: int
    why: str
    tasks: tuple[int, ...] = ()


class Health:
    """Watches losses and gradient norms.

    A step is unhealthy if its loss or gradient norm is not finite, or if its loss is more than `FAR` median absolute deviations
    above the median of the last `WINDOW` finite losses. Finite losses of the warm-up are always healthy. One value that is not
    finite, or `ROW` unhealthy steps in a row, are a spike.

    Parameters
    ----------
    warmup : int
        Steps of the warm-up.

    Attributes
    ----------
    proven : int
        A checkpoint of this step or an earlier one is trusted: `TRUST` healthy steps in a row came after it. -1: none is.
    """

    def __init__(self, warmup: int = 0) -> None:
        self.warmup, self.proven = warmup, -1
        self._losses: list[float] = []
        self._healthy, self._high = 0, 0  # healthy steps in a row; steps in a row that are far above

    @classmethod
    def of(cls, recipe: Recipe) -> Health:
        """For a recipe, whose scheduler may have a warm-up."""
        steps = ((recipe.deepspeed.get("scheduler") or {}).get("params") or {}).get("warmup_num_steps", 0)
        return cls(steps if isinstance(steps, int) else 0)

    def observe(
        self, step: int, loss: float, norm: float, by_task: Mapping[int, tuple[float, int]] | None = None
    ) -> Spike | None:
        """Take the numbers of a step. Returns a spike if there is one.

        Parameters
        ----------
        step : int
            Training step, counted from 1.
        loss, norm : float
        by_task : mapping, optional
            Task -> (sum of losses, number of targets), to name the tasks that stand out.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            why = f"the {what} is {loss if what == 'loss' else norm}"
            self._healthy = 0
            return Spike(step, step, why, _standing_out(by_task or {}))
        limit = self._limit(step)
        self._losses = [*self._losses[1 - WINDOW :], loss]
        if loss <= limit:
            self._healthy, self._high = self._healthy + 1, 0
            if self._healthy >= TRUST:
                self.proven = step - TRUST
            return None
        self._healthy, self._high = 0, self._high + 1
        if self._high < ROW:
            return None
        # The update of the step before the first high loss did the damage, so its rows are suspect too.
        why = f"the loss is {loss:.4g}, {ROW} steps in a row above {limit:.4g} ({FAR:g} deviations above the median)"
        return Spike(max(1, step - ROW), step, why, _standing_out(by_task or {}))

    def forget(self) -> None:
        """The mixture has changed, so earlier losses say nothing about the next ones."""
        self._losses, self._high = [], 0

    def trusts(self, step: int) -> bool:
        """Whether a checkpoint of this step is trusted."""
        return step <= self.proven

    def state_dict(self) -> dict[str, Any]:
        """Its state, as JSON."""
        return {"losses": self._losses, "healthy": self._healthy, "high": self._high, "proven": self.proven}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._losses = [float(loss) for loss in state["losses"]]
        self._healthy, self._high, self.proven = int(state["healthy"]), int(state["high"]), int(state["proven"])

    def _limit(self, step: int) -> float:
        """The highest loss that is healthy at a step."""
        if step <= self.warmup or len(self._losses) < WINDOW:
            return math.inf
        losses = np.array(self._losses)
        median = float(np.median(losses))
        return median + FAR * max(float(np.median(np.abs(losses - median))), _LEAST * abs(median))


def _standing_out(by_task: Mapping[int, tuple[float, int]]) -> tuple[int, ...]:
    """The tasks whose loss is not finite; if all are finite, the one with the highest mean loss."""
    means = {task: total / count for task, (total, count) in by_task.items() if count}
    bad = tuple(task for task, mean in means.items() if not math.isfinite(mean))
    return bad or ((max(means, key=means.__getitem__),) if means else ())
