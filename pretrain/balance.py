"""Balance: each mixture line's share of the gradient, and the weights of lines with `loss_weight: auto`.

Everything follows from the sums of losses by task, which the ranks exchange at every step anyway, so it is the same on every
layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.batch import SPARSE, TokenBatch

if TYPE_CHECKING:
    from tiphys.recipes.schema import Recipe

AUTO = "auto"
_KEPT = 0.99  # of the sums of earlier steps, at each step
_LOW, _HIGH = 1e-3, 1e3  # bounds of a weight that is chosen


@dataclass(frozen=True)
class Line:
    """One mixture line; or several that share tasks, whose losses are summed by task and so cannot be told apart.

    name     of the mixture entry, as in the plan; joined by " + "
    entries  the names of the entries
    tasks    numbers of its tasks
    auto     its weight is chosen
    """

    name: str
    entries: tuple[str, ...]
    tasks: tuple[int, ...]
    auto: bool


class Balance:
    """Watches Σ weight · loss of each line, and chooses the weights of some.

    The weight of a line with `loss_weight: auto` is such that the line's share of Σ weight · loss, averaged over about a hundred
    steps, equals its share of the mixture's weights. If no line has a fixed weight, the whole sum stays what it would be
    with weights of 1.

    Parameters
    ----------
    lines : sequence of Line
        The lines. No task is in two of them.
    weights : mapping of str to float
        Weight of each entry in the mixture.
    tasks : int
        Number of tasks.

    Attributes
    ----------
    factors : ndarray, float64 [lines]
        What the loss of each line is multiplied by at the next step; 1 for lines with a fixed weight.
    """

    def __init__(self, lines: Sequence[Line], weights: Mapping[str, float], tasks: int) -> None:
        self.lines, self._weights = list(lines), dict(weights)
        self._events: list[dict[str, Any]] = []
        self._line = np.zeros(tasks, np.int64)
        for number, line in enumerate(self.lines):
            self._line[list(line.tasks)] = number
        self._auto = np.array([line.auto for line in self.lines], bool)
        self._sums = np.zeros(len(self.lines))
        self.factors = np.ones(len(self.lines))

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str], tasks_of: Sequence[Iterable[int]], tasks: int) -> Balance:
        """The balance of a recipe.

        names     of the mixture entries
        tasks_of  the numbers of the tasks of each entry
        tasks     number of tasks

        Raises DataError if an entry is `auto` and another one that shares a task with it is not.
        """
        groups: list[tuple[list[int], set[int]]] = []
        for number, mine in enumerate(map(set, tasks_of)):
            together = [group for group in groups if group[1] & mine]
            groups = [group for group in groups if not group[1] & mine]
            groups.append((sorted(sum((g[0] for g in together), [number])), mine.union(*(g[1] for g in together))))
        lines = []
        for numbers, known in sorted(groups):
            chosen = {recipe.data.mixture[n].loss_weight == AUTO for n in numbers}
            entries = tuple(names[n] for n in numbers)
            if len(chosen) > 1:
                raise DataError(
                    f"entries {' and '.join(entries)} have tasks in common, so their `loss_weight` must be `auto` for all "
                    "of them or for none"
                )
            lines.append(Line(" + ".join(entries), entries, tuple(sorted(known)), chosen == {True}))
        weights = {name: float(entry.weight) for name, entry in zip(names, recipe.data.mixture, strict=True)}
        return cls(lines, weights, tasks)

    @property
    def chooses(self) -> bool:
        """Whether it chooses any weight."""
        return bool(self._auto.any())

    def follow(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take note of changes of the mixture's weights, from the plan's log."""
        new = [dict(e) for e in events if e["kind"] == "weights"]
        self._events += [e for e in new if e not in self._events]

    def weighted(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the loss weights of the next step."""
        if (self.factors == 1).all():
            return batch
        factor = self.factors[self._line]
        task = batch.task.reshape(-1)

        def scaled(part: Any) -> Any:
            if not hasattr(part, "weight"):
                return part
            return replace(part, weight=(part.weight * factor[task[part.index]]).astype(np.float32))

        parts: dict[str, Any] = {
            kind: {name: scaled(part) for name, part in getattr(batch, kind).items()} for kind in SPARSE
        }
        return replace(batch, weight=(batch.weight * factor[batch.task]).astype(np.float32), **parts)

    def observe(self, step: int, by_task: np.ndarray) -> dict[str, float]:
        """Choose the weights of the next step.

        Parameters
        ----------
        step : int
            Number of steps done, this one included.
        by_task : ndarray [tasks]
            Σ weight · loss of each task at this step, over all ranks.

        Returns
        -------
        dict of str to float
            Each line's share of the sum at this step; lines without any loss are left out.
        """
        now = np.bincount(self._line, by_task, len(self.lines))
        total = now.sum()
        shares = {line.name: float(s / total) for line, s in zip(self.lines, now, strict=True) if s} if total else {}
        if self.chooses and np.isfinite(now).all():
            self._sums = _KEPT * self._sums + now / self.factors
            self.factors = self._chosen(step)
        return shares

    def chosen(self) -> dict[str, float]:
        """The weights of the next step of those lines whose weight is chosen."""
        return {line.name: float(f) for line, f in zip(self.lines, self.factors, strict=True) if line.auto}

    def _chosen(self, step: int) -> np.ndarray:
        weights = dict(self._weights)
        for event in sorted(self._events, key=lambda e: int(e["step"])):
            if event["step"] <= step:
                weights |= event["weights"]
        wanted = np.array([sum(weights[name] for name in line.entries) for line in self.lines])
        seen = (self._sums > 0) & (wanted > 0)
        fixed = seen & ~self._auto
        of = fixed if fixed.any() else seen
        each = self._sums[of].sum() / max(wanted[of].sum(), 1e-300)  # Σ weight · loss for a mixture weight of 1
        out = np.ones(len(self.lines))
        mine = seen & self._auto
        out[mine] = np.clip(wanted[mine] * each / self._sums[mine], _LOW, _HIGH)
        return out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": self._sums.tolist(), "factors": self.factors.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums, self.factors = (np.array(state[key], np.float64) for key in ("sums", "factors"))
