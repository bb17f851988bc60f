"""What an experiment measures: scores with their bars, and controls that must stay on the other side of theirs."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiphys.pretrain.tokens.paradigms import PARADIGMS

HERE = Path(__file__).parent
MORE = ("auto",)  # experiments with keys of a recipe, beside those of the paradigms


@dataclass(frozen=True)
class Bar:
    """A limit that a figure must reach: from above if `least`, else from below."""

    limit: float
    least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Bar:
    return Bar(limit)


def at_most(limit: float) -> Bar:
    return Bar(limit, least=False)


@dataclass(frozen=True)
class Mark:
    """One figure of an experiment.

    Attributes
    ----------
    measure : str
        What is measured, in a few words.
    score : float
        The figure.
    bar : Bar
        What it must reach.
    control : float or None
        The same figure with one thing broken that the idea needs; None: not measured.
    control_bar : Bar or None
        What the control must reach to count as failed.
    broken : str
        What is broken in the control.
    """

    measure: str
    score: float
    bar: Bar
    control: float | None = None
    control_bar: Bar | None = None
    broken: str = ""

    @property
    def fault(self) -> str:
        """What is wrong: the bar is missed, or the control passes; empty: nothing."""
        if not self.bar.met(self.score):
            return f"the bar is missed: {self.score:.3f} is not {self.bar}"
        if self.control is not None and self.control_bar is not None and not self.control_bar.met(self.control):
            return f"the control passes: {self.control:.3f} is not {self.control_bar}"
        return ""

    def to_dict(self, row: str, seed: int) -> dict[str, Any]:
        return {
            "row": row,
            "seed": seed,
            "measure": self.measure,
            "score": round(float(self.score), 4),
            "bar": str(self.bar),
            "control": None if self.control is None else round(float(self.control), 4),
            "control_bar": None if self.control_bar is None else str(self.control_bar),
            "broken": self.broken,
            "fault": self.fault,
        }


def rows() -> list[str]:
    """What has an experiment: the rows whose module exists, in the order of the table, and `MORE`."""
    return [name for name in (*PARADIGMS, *MORE) if (HERE / f"{_module(name)}.py").exists()]


def measure(row: str, seed: int, *, control: bool = True) -> Iterator[dict[str, Any]]:
    """The marks of one experiment, as plain values.

    Raises
    ------
    ValueError
        If the row has no experiment.
    """
    if row not in rows():
        raise ValueError(f"no experiment is called {row!r}; there are {', '.join(rows())}")
    experiment = importlib.import_module(f"benchmarks.ideas.{_module(row)}")
    with tempfile.TemporaryDirectory(prefix="tiphys-ideas-") as folder:
        for mark in experiment.marks(seed, Path(folder), control):
            yield mark.to_dict(row, seed)


def faults(found: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each mark that is wrong."""
    return [f"{m['row']}, seed {m['seed']}, {m['measure']}: {m['fault']}" for m in found if m["fault"]]


def _module(row: str) -> str:
    return row.replace("-", "_")
