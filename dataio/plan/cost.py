"""How many tokens the steps of an episode take, by stratum: exactly, even if some elements are not shown at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepCost:
    """Tokens of the steps of one task.

    In a window that starts at step s, an element with period p is shown at those steps t for which t − (s mod chunk) is a
    multiple of p. Elements with period 1 are shown at every step.

    Attributes
    ----------
    elements : tuple of (int, int)
        (tokens, period) of each element.
    chunk : int
        Steps of an action chunk. The periods of elements that are shown once in a chunk are multiples of it.
    """

    elements: tuple[tuple[int, int], ...]
    chunk: int = 1

    @classmethod
    def plain(cls, tokens: int) -> StepCost:
        """Every step takes the same number of tokens."""
        return cls(((tokens, 1),))

    def most(self, steps: NDArray) -> Ints:
        """Most tokens that so many consecutive steps can take, wherever they start."""
        total = sum((tokens * -(-np.asarray(steps, np.int64) // period) for tokens, period in self.elements))
        return np.asarray(total, np.int64)


@dataclass(frozen=True)
class Savings:
    """How many tokens fewer than their `StepCost` says the steps of E episodes take, because some texts are short.

    Attributes
    ----------
    first : int64 [E]
        Where each episode begins in `running`.
    running : int32 [steps of all episodes + E]
        running[first[e] + t]: tokens that the steps [0, t) of episode e save together.
    """

    first: Ints
    running: NDArray[np.int32]


class Costs:
    """The step costs of all strata, computed for whole arrays.

    Parameters
    ----------
    costs : sequence of StepCost
        One for each stratum.
    budget : int
        Tokens of a row. `fit` takes no room above this.
    """

    def __init__(self, costs: Sequence[StepCost], budget: int) -> None:
        width = max((len(c.elements) for c in costs), default=1)
        self.tokens = np.zeros((width, len(costs)), np.int64)
        self.period = np.ones((width, len(costs)), np.int64)
        self.chunk = np.array([c.chunk for c in costs], np.int64)
        for i, cost in enumerate(costs):
            for j, (tokens, period) in enumerate(cost.elements):
                self.tokens[j, i], self.period[j, i] = tokens, period
        self.first = np.array([int(c.most(np.ones(1))[0]) for c in costs], np.int64)  # most tokens of a single step
        # A window of n steps takes at most n · each + once tokens, and exactly so many if all steps cost the same.
        self.each = np.asarray(-(-self.tokens // self.period)).sum(0)
        self.once = np.asarray(-(-self.tokens * (self.period - 1) // self.period)).sum(0)
        self.plain = bool((self.period == 1).all())
        self._fit: Ints | None = None
        if not self.plain:
            rooms = np.arange(budget + 1)
            self._fit = np.stack([np.searchsorted(c.most(1 + rooms), rooms, side="right") for c in costs])

    def cost(self, stratum: Ints, start: Ints, steps: Ints) -> Ints:
        """Tokens of the steps [start, start + steps)."""
        if self.plain:
            return steps * self.first[stratum]
        begin = start - start % self.chunk[stratum]
        total: Any = np.zeros(np.broadcast(stratum, start, steps).shape, np.int64)
        for tokens, period in zip(self.tokens, self.period):
            p = period[stratum]
            times: Any = (begin + steps - 1) // p - (begin - 1) // p
            total = total + tokens[stratum] * times
        return np.asarray(total, np.int64)

    def fit(self, stratum: Ints, room: Ints) -> Ints:
        """Most steps that always fit into so many tokens, wherever they start; 0 if `room` is negative."""
        room = np.maximum(room, 0)
        if self._fit is None:
            return np.asarray(room // self.first[stratum], np.int64)
        return self._fit[stratum, np.minimum(room, self._fit.shape[1] - 1)]
