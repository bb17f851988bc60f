"""What an episode is to look like as a whole: histograms that a reference trajectory gives, less what has been done so far.

Furuta et al. 2022, sec. 4: the policy is told at each step how a field is to be distributed from there to the episode's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiphys.dataio.episode import Window
from tiphys.pretrain.tokens.derived import derived, source_of
from tiphys.pretrain.tokens.timestep import Element

HISTOGRAM = "histogram:"  # how the rule of such an element begins


class Demand:
    """What one environment is still asked for.

    Parameters
    ----------
    element : Element
        The element of the layout that shows histograms.
    reference : Window
        A trajectory to match, as a whole episode.
    remainder : bool
        Show what is left of the reference after the environment's own steps. False: what the reference itself had left at this
        step, whatever the environment did.

    Raises
    ------
    DataError
        If the reference lacks the field.
    """

    def __init__(self, element: Element, reference: Window, remainder: bool = True) -> None:
        self.element, self.reference, self.remainder = element, reference, remainder
        self.field = source_of(element.rule)[1]
        self._shares = derived(reference, reference.steps, element.rule, element.options)  # [steps, entries · bins]
        self._left = self._shares[0].astype(np.float64) * reference.steps
        self._step = 0

    def again(self) -> Demand:
        """The same demand at the beginning of an episode."""
        return Demand(self.element, self.reference, self.remainder)

    def took(self, value: Any) -> None:
        """Count the field's value of a step that is done."""
        one = Window(
            entry=0,
            task=0,
            episode="",
            start=0,
            steps=1,
            episode_steps=1,
            fields={self.field: np.asarray(value)[None]},
            step=np.zeros(1, np.int64),
            returns_to_go=np.zeros(1, np.float32),
            valid=np.ones(1, bool),
        )
        self._left -= derived(one, 1, self.element.rule, self.element.options)[0]
        self._step += 1

    def shares(self) -> np.ndarray:
        """float32 [entries · bins]: the shares that are demanded from this step to the episode's end."""
        if not self.remainder:
            return self._shares[min(self._step, len(self._shares) - 1)]
        left = self._left.clip(0).reshape(-1, int(self.element.options["bins"]))
        total = left.sum(axis=1, keepdims=True)
        even = np.full_like(left, 1 / left.shape[1])  # nothing is left: the episode is longer than the reference
        return np.divide(left, total, out=even, where=total > 0.5).reshape(-1).astype(np.float32)


def shows_histogram(element: Element) -> bool:
    """Whether an element shows the model what is demanded."""
    return element.shown and element.rule.startswith(HISTOGRAM)


def shows_return(element: Element) -> bool:
    """Whether an element shows the model a return that can be asked for."""
    return element.role == "return" and element.shown and not element.rule.startswith(HISTOGRAM)


def value_of(field: str, observation: Mapping[str, Any], action: Mapping[str, Any], reward: float) -> Any:
    """The field's value in a step."""
    return action[field] if field in action else observation.get(field, reward)
