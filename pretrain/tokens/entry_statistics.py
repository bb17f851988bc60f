"""What the data of mixture entries say: statistics of fields, relative actions and returns, and the text tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import FieldSpec
from tiphys.pretrain.tokens import text_tokenizers
from tiphys.pretrain.tokens.clips import AFTER, are_clips
from tiphys.pretrain.tokens.frames import Frame
from tiphys.pretrain.tokens.mixture_entries import MixtureEntry

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.schema import Recipe

_RETURN_LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Returns:
    """The best return and the largest absolute return of a task's episodes. Returns that are not finite do not count.

    `quantiles`: at _RETURN_LEVELS; empty if unknown (objectives of an earlier version).
    """

    best: float
    largest: float
    quantiles: tuple[float, ...] = ()


def tokenizer_of(recipe: Recipe, entries: Sequence[MixtureEntry]) -> str:
    """The JSON of the text tokenizer that the recipe names, else of one trained on all texts of the datasets."""
    size = recipe.model.text_vocabulary
    if recipe.model.text_tokenizer:
        return text_tokenizers.load(recipe.model.text_tokenizer, size)
    texts: set[str] = set()
    for entry in entries:
        fields = {f.name for _, task in entry for f in task.fields if f.modality == "text" and f.per == "episode"}
        for field in sorted(fields):
            texts.update(entry.index.text(field)[1])
    return text_tokenizers.learn(texts, size or text_tokenizers.MOST_LEARNT)


def _needs_quantiles(entry: MixtureEntry) -> bool:
    """Whether it needs more quantiles than dataset.json has."""
    if entry.objective.head in ("l2", "l1", "flow") or entry.objective.horizon:
        return True
    fields = entry.objective.fields.values()
    coded = (tokens.encoding == "quantile" or tokens.normalise != "auto" for tokens in fields)
    return any(coded) or any(part.code == "quantile" for part in entry.paradigm.timestep)


def statistics_of(entries: Sequence[MixtureEntry]) -> dict[str, dict[str, FieldStatistics]]:
    """Task -> field -> statistics over all datasets that have the task."""
    from tiphys.dataio.statistics import pooled

    found: dict[str, dict[str, list[FieldStatistics]]] = {}
    seen = set()
    exact = any(map(_needs_quantiles, entries))
    for entry in entries:
        for i, task in entry:
            mine = found.setdefault(task.name, {})
            if (entry.index.fingerprint, i) not in seen:
                index = entry.index
                known = index.statistics_with_histograms if exact else index.statistics
                for field, statistics in known.get(task.name, {}).items():
                    mine.setdefault(field, []).append(statistics)
            seen.add((entry.index.fingerprint, i))
    return {task: {field: pooled(some) for field, some in fields.items()} for task, fields in found.items()}


class Measured:
    """Statistics of relative actions and of discounted returns, over all datasets that have the task. Each is computed once."""

    def __init__(self, entries: Sequence[MixtureEntry]) -> None:
        self._entries = entries
        self._known: dict[Any, FieldStatistics] = {}

    def framed(self, task: str, field: FieldSpec, frame: Frame, horizon: int) -> FieldStatistics:
        from tiphys.dataio.frame_statistics import frame_statistics

        def measure(index: EpisodeIndex, i: int) -> FieldStatistics:
            return frame_statistics(index, i, field.name, frame.to, frame.columns, horizon)

        return self._over_all(task, (field.name, frame, horizon), measure)

    def discounted(self, task: str, discount: float) -> FieldStatistics:
        from tiphys.dataio.return_statistics import return_statistics

        def measure(index: EpisodeIndex, i: int) -> FieldStatistics:
            return return_statistics(index, i, discount, AFTER if are_clips(index.tasks[i]) else None)

        return self._over_all(task, (discount,), measure)

    def _over_all(
        self, task: str, asked: tuple[Any, ...], measure: Callable[[EpisodeIndex, int], FieldStatistics]
    ) -> FieldStatistics:
        from tiphys.dataio.statistics import pooled

        key = (task, *asked)
        if key not in self._known:
            indexes = {(e.index.fingerprint, i): e.index for e in self._entries for i, t in e if t.name == task}
            self._known[key] = pooled([measure(index, i) for (_, i), index in indexes.items()])
        return self._known[key]


def returns_of(entries: Sequence[MixtureEntry], name: str) -> Returns:
    parts, seen = [], set()
    for entry in entries:
        for i, task in entry:
            if task.name == name and (entry.index.fingerprint, i) not in seen:
                seen.add((entry.index.fingerprint, i))
                parts.append(np.asarray(entry.index.total_return, np.float64)[np.asarray(entry.index.task) == i])
    returns = np.concatenate(parts)
    returns = returns[np.isfinite(returns)]  # one NaN would make all numbers NaN
    if not len(returns):
        return Returns(0.0, 0.0)
    quantiles = np.quantile(returns, _RETURN_LEVELS)
    return Returns(float(returns.max()), float(np.abs(returns).max()), tuple(quantiles.tolist()))
