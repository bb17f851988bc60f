"""The plan of the next steps, made for several steps at a time: one step at a time would cost many times as much."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tiphys.dataio.loading.units import Span, UnitMap
    from tiphys.dataio.placement import Placement
    from tiphys.dataio.sampling import PlannedWindows, SamplingPlan

_ROWS = 2048  # most rows that are planned together
_STEPS = 32  # most steps


class PlannedStep(NamedTuple):
    rows: np.ndarray  # of the global batch that are at home here
    windows: PlannedWindows
    spans: list[Span]  # the bytes that the windows need


class Ahead:
    """The steps of a plan, for one home. Recent answers are kept, because each step is asked for twice: when the cache's
    look-ahead reaches it, and when its bytes are fetched. Steps near each other are asked for one after the other.

    near  least number of steps whose answers are kept
    """

    def __init__(self, plan: SamplingPlan, placement: Placement, units: UnitMap, near: int):
        self.plan, self.placement, self.units = plan, placement, units
        self._together = max(1, min(_STEPS, _ROWS // max(len(placement.rows(0)), 1)))
        self._kept = -(-near // self._together) + 3
        self._groups: OrderedDict[int, list[tuple[np.ndarray, PlannedWindows]]] = OrderedDict()
        self._spans: OrderedDict[int, PlannedStep] = OrderedDict()
        self._near = near

    def step(self, step: int) -> PlannedStep:
        known = self._spans.get(step)
        if known is None:
            rows, windows = self._group(step // self._together)[step % self._together]
            known = self._spans[step] = PlannedStep(rows, windows, self.units.spans(windows))
            if len(self._spans) > self._near:
                self._spans.popitem(last=False)
        return known

    def wanted(self, step: int) -> np.ndarray:
        """Units that a step needs, in any order, some more than once."""
        spans = self.step(step).spans
        return np.concatenate([span.units for span in spans]) if spans else np.zeros(0, np.int64)

    def _group(self, number: int) -> list[tuple[np.ndarray, PlannedWindows]]:
        group = self._groups.get(number)
        if group is None:
            steps = range(number * self._together, (number + 1) * self._together)
            rows = [self.placement.rows(step) for step in steps]
            group = self._groups[number] = list(zip(rows, self.plan.many(steps, rows)))
            if len(self._groups) > self._kept:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(number)
        return group

    def forget(self) -> None:
        """Drop all answers. To be called when the plan has changed."""
        self._groups.clear()
        self._spans.clear()
