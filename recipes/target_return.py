"""The return that a policy is asked for, as people write it: `450` in rewards, `1.2x` of the best, `q0.9` as a quantile."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_MULTIPLE, _QUANTILE = re.compile(rf"({_NUMBER})x"), re.compile(rf"q({_NUMBER})")
FORMS = (
    "a return in rewards (450), a multiple of the best return in the data (1.2x), or a quantile of its returns (q0.9)"
)


@dataclass(frozen=True)
class TargetReturn:
    """The return of an episode to ask for.

    Attributes
    ----------
    kind : str
        rewards: `value` itself; best: `value` times the best return of the task's episodes; quantile: the quantile `value` of
        their returns.
    value : float
        A finite number; in [0, 1] for a quantile.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, given: float | str) -> TargetReturn:
        """The target return that a number or a text stands for.

        Parameters
        ----------
        given : float or str
            A number, or a text in one of the `FORMS`; `best` is short for `1x`.

        Raises
        ------
        ValueError
            If it is none of them, is not finite, or is a quantile outside [0, 1].
        """
        text = "1x" if given == "best" else str(given).strip()
        multiple, quantile = _MULTIPLE.fullmatch(text), _QUANTILE.fullmatch(text)
        if found := multiple or quantile:
            out = cls("best" if multiple else "quantile", float(found[1]))
        else:
            try:
                out = cls("rewards", float(text))
            except ValueError:
                raise ValueError(f"{given!r} is not a target return; write {FORMS}") from None
        if not math.isfinite(out.value):
            raise ValueError(f"{given!r} is not a target return, because it is not finite; write {FORMS}")
        if out.kind == "quantile" and not 0 <= out.value <= 1:
            raise ValueError(f"{given!r} is not a quantile: it must lie between q0, the worst return, and q1, the best")
        return out

    def __str__(self) -> str:
        if self == TargetReturn("best", 1.0):
            return "best"
        return {"rewards": f"{self.value:g}", "best": f"{self.value:g}x", "quantile": f"q{self.value:g}"}[self.kind]

    def problem(self, best: float) -> str:
        """Why it makes no sense for a task whose best return is `best`; empty if it does."""
        if self.kind == "best" and self.value != 1 and best <= 0:
            return (
                f"the best return in the data is {best:g}, so {self} of it, {self.value * best:g}, is not what it seems; give a "
                "return in rewards or a quantile, such as q0.9"
            )
        return ""

    def of(self, best: float, quantiles: Sequence[float] = ()) -> float:
        """The return in rewards.

        Parameters
        ----------
        best : float
            Best return of the task's episodes.
        quantiles : sequence of float
            Quantiles of their returns, at equally spaced levels from 0 to 1; empty: unknown.

        Raises
        ------
        ValueError
            If it is a quantile and these are unknown.
        """
        if self.kind == "rewards":
            return self.value
        if self.kind == "best":
            return self.value * best
        if not len(quantiles):
            raise ValueError(
                f"{self}: the policy does not know the quantiles of its data's returns; give a return in rewards or a multiple "
                "of the best, such as 1x"
            )
        place = self.value * (len(quantiles) - 1)
        low = min(int(place), len(quantiles) - 2) if len(quantiles) > 1 else 0
        high = min(low + 1, len(quantiles) - 1)
        return float(quantiles[low] + (quantiles[high] - quantiles[low]) * (place - low))
