"""What `tiphys check` says of the datasets of a recipe: values that cannot be learned from, missing rewards, too few texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.demand import shows_return
from tiphys.pretrain.acting.processor import ANSWERS_RETURN, Processor
from tiphys.pretrain.objectives import LEAVE_OUT
from tiphys.pretrain.tokens.agent_statistics import statistics_of_one_agent
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.paradigms import PARADIGMS
from tiphys.pretrain.tokens.picture_codecs import Grid
from tiphys.pretrain.tokens.return_codecs import without_rewards
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.objective import Objective

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.tokens.codec import Codec

QUOTA = "TIPHYS_HUB_QUOTA"  # files that a hub resolves in five minutes
_QUOTA = 5000  # of a free account
_PAIRS = 8  # windows of a row that are told apart by their texts, at least
_PLANNED = 4  # steps whose rows are looked at
_SHOWN = 5  # episodes that a message names
_BY_RETURN = ("return", "top")  # values of `prefer` that need rewards


@dataclass(frozen=True)
class BadField:
    """A field of a task with values that an entry of the mixture cannot learn from.

    entry  number of the mixture entry
    what   how many values are bad, and how
    ids    ids of the first episodes that have them; empty: unknown
    """

    entry: int
    dataset: str
    task: str
    field: str
    what: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        ids = f" (first: {', '.join(self.ids[:_SHOWN])})" if self.ids else ""
        return f"{self.dataset}: task {self.task!r}, field {self.field!r}: {self.what}{ids}"


def data_errors(
    recipe: Recipe, indexes: Sequence[EpisodeIndex], objectives: Objectives, where: Callable[[str], str]
) -> Iterator[str]:
    """Everything in the datasets that the recipe refuses."""
    if recipe.data.on_bad_value == "refuse":
        for found in bad_fields(recipe, indexes, objectives):
            name = recipe.data.mixture[found.entry].objective
            yield (
                f"{where(f'data.mixture[{found.entry}]')}: {found}, and objective {name!r} uses it. Correct or remove the "
                f"episodes, or {LEAVE_OUT}"
            )
    for i, entry in enumerate(recipe.data.mixture):
        without = [t.name for t in _trained(indexes[i], objectives, i) if not _has_rewards(t)]
        if entry.prefer in _BY_RETURN and without:
            yield (
                f"{where(f'data.mixture[{i}].prefer')}: {entry.prefer!r} prefers episodes by their returns, but these tasks of "
                f"{entry.dataset} have no rewards: {', '.join(without[:20])}; leave them out with `tasks`, or set prefer: uniform"
            )


def hub_errors(recipe: Recipe, indexes: Sequence[EpisodeIndex], where: Callable[[str], str]) -> Iterator[str]:
    """Datasets whose files on a hub are more than its quota lets be resolved."""
    quota = int(os.environ.get(QUOTA) or _QUOTA)
    for number, index in enumerate(indexes):
        files = sum(shard.name.startswith("hf://") for shard in index.shards)
        if files > quota:
            yield (
                f"{where(f'data.mixture[{number}].dataset')}: {index.url} reads {files:,} files of a hub, which resolves "
                f"{quota:,} in five minutes: training would wait for it again and again. Copy the dataset to a bucket or a disk "
                f"(`hf download OWNER/NAME --repo-type dataset --local-dir FOLDER`), and index the copy; or set {QUOTA} to the "
                "quota that you have"
            )


def pairing_errors(
    recipe: Recipe, objectives: Objectives, plan: SamplingPlan, where: Callable[[str], str]
) -> Iterator[str]:
    """Objectives that learn which texts fit, in rows that have too few windows to tell apart."""
    learnt = [layout for by_task in objectives.layouts for layout in by_task.values()]
    if not any(layout.loss == "pairs" or layout.swap for layout in learnt):
        return
    first = [plan.windows(step) for step in range(min(_PLANNED, recipe.train.steps))]
    for i, entry in enumerate(recipe.data.mixture):
        layouts = objectives.layouts[i]
        pairs = any(layout.loss == "pairs" for layout in layouts.values())
        if not pairs and not any(layout.swap for layout in layouts.values()):
            continue
        least, count = (_PAIRS if pairs else 2), 0.0
        rows = [w.row[(w.entry == i) & ~w.prompt] + (n << 32) for n, w in enumerate(first)]
        if len(flat := np.concatenate(rows)):
            count = float(np.unique(flat, return_counts=True)[1].mean())
        if count < least:
            yield (
                f"{where(f'objectives.{entry.objective}.context')}: a row of {objectives.length} tokens has {count:.1f} windows "
                f"of this objective on average, but it learns by telling them apart and needs at least {least}; raise `context`, "
                "lower `window`, or give it a run of its own"
            )


def reward_errors(recipe: Recipe, indexes: Sequence[EpisodeIndex], where: Callable[[str], str]) -> Iterator[str]:
    """Entries of the mixture whose objective requires rewards that a task's data lack."""
    for i, (entry, index) in enumerate(zip(recipe.data.mixture, indexes, strict=True)):
        objective = recipe.objectives.get(entry.objective, Objective())
        paradigm = PARADIGMS[objective.paradigm or entry.objective]
        mine = (t for t in index.tasks if any(fnmatchcase(t.name, pattern) for pattern in entry.tasks or ["*"]))
        for reason in filter(None, (without_rewards(task, objective, paradigm) for task in mine)):
            yield f"{where(f'data.mixture[{i}].objective')}: {entry.dataset}: {reason}"


def target_errors(recipe: Recipe, objectives: Objectives, where: Callable[[str], str]) -> Iterator[str]:
    """Target returns of objectives that make no sense for a task's data, or that its policy could not be told."""
    processor = Processor.from_dict(objectives.processor())
    for name, by_task in processor.layouts.items():
        given = recipe.objectives.get(name, Objective()).target_return
        for task, layout in by_task.items():
            if any(map(shows_return, layout.elements)) and processor.rule(name)[0] != ANSWERS_RETURN:
                try:
                    processor.asked(task, name, given)
                except DataError as error:
                    yield f"{where(f'objectives.{name}.target_return')}: {error}"


def requirement_errors(
    recipe: Recipe, indexes: Sequence[EpisodeIndex], objectives: Objectives, where: Callable[[str], str]
) -> Iterator[str]:
    """What the paradigms of a recipe require of the data, and the data lack."""
    hidden: dict[str, set[str]] = {}  # objective -> tasks that only the prompt tells apart
    for i, (entry, index) in enumerate(zip(recipe.data.mixture, indexes, strict=True)):
        objective = recipe.objectives.get(entry.objective)
        paradigm = PARADIGMS[(objective.paradigm if objective else "") or entry.objective]
        at = where(f"data.mixture[{i}].objective")
        for task in _trained(index, objectives, i):
            mine = np.asarray(index.task) == index.tasks.index(task)
            if "text" in paradigm.requires and not _texts_differ(index, task, mine):
                yield (
                    f"{at}: {entry.objective!r} learns what an instruction means, but task {task.name!r} of {entry.dataset} has "
                    "no text that differs between its episodes; use another paradigm, or leave it out with `tasks`"
                )
            if "hidden task" in paradigm.requires:
                hidden.setdefault(entry.objective, set()).add(task.name)
                if mine.sum() < 2:
                    yield (
                        f"{at}: {entry.objective!r} shows another episode of the same task, but task {task.name!r} of "
                        f"{entry.dataset} has {mine.sum()}; leave it out with `tasks`"
                    )
    for name, tasks in hidden.items():
        if len(tasks) < 2:
            yield (
                f"{where(f'objectives.{name}')}: it tells tasks apart by a demonstration, but there is only {', '.join(tasks)}; "
                "train it on several tasks, or use dt"
            )
        if recipe.model.moe.experts and recipe.model.moe.task:
            yield (
                f"{where('model.moe.task')}: the router sees the task, so objective {name!r} need not look at its demonstration; "
                "set it to false"
            )


def _texts_differ(index: EpisodeIndex, task: Any, mine: np.ndarray) -> bool:
    """Whether a text of the task differs between its episodes."""
    for field in task.with_role("observation", "text"):
        if field.modality == "text" and (field.per == "step" or len(np.unique(index.text(field.name)[0][mine])) > 1):
            return True
    return False


def bad_fields(recipe: Recipe, indexes: Sequence[EpisodeIndex], objectives: Objectives) -> Iterator[BadField]:
    """The fields with bad values, as far as the datasets' statistics know them. A field of a dataset is named once."""
    seen = set()
    for i, (entry, index) in enumerate(zip(recipe.data.mixture, indexes, strict=True)):
        for task in _trained(index, objectives, i):
            layout = objectives.layouts[i][objectives.number(task.name)]
            used: dict[str, Codec | None] = {e.field: e.codec for e in layout.elements if e.field}
            if _has_rewards(task) and (entry.prefer in _BY_RETURN or any(e.role == "return" for e in layout.elements)):
                used["reward"] = None
            statistics = index.statistics.get(task.name, {})
            if layout.agents:
                statistics = statistics_of_one_agent(statistics, layout.agent_fields, layout.agents)
            for field, codec in used.items():
                key = index.fingerprint, task.name, field
                found = statistics.get(field)
                what, ids = _bad(index, found, codec)
                if not what and field == "reward":
                    what, ids = _bad_returns(index, task.name)
                if what and key not in seen:
                    seen.add(key)
                    yield BadField(i, entry.dataset, task.name, field, what, ids)


def _trained(index: EpisodeIndex, objectives: Objectives, entry: int) -> list[Any]:
    return [t for t, n in zip(index.tasks, objectives.task_numbers(entry).tolist(), strict=True) if n >= 0]


def _has_rewards(task: Any) -> bool:
    return any(field.name == "reward" for field in task.fields)


def _bad(index: EpisodeIndex, found: FieldStatistics | None, codec: Codec | None) -> tuple[str, tuple[str, ...]]:
    """(what is bad, ids of the episodes); empty if nothing is known to be bad."""
    if found is None:
        return "", ()
    counted = isinstance(codec, Discrete | Grid)  # other codecs clamp what is beyond their range
    what = found.bad(beyond=counted)
    if not what and counted and found.count:
        what = _outside(found, codec)
    if not what or not index.document.get("statistics_of_superset"):
        return what, found.first_bad
    ids = tuple(name for name in found.first_bad if index.has(name))
    if not ids and len(found.first_bad) == found.bad_episodes:
        return "", ()  # the dataset was filtered, and the bad episodes are gone
    return f"{what}, counted in the dataset from which this one was filtered", ids


def _outside(found: FieldStatistics, codec: Any) -> str:
    low = np.asarray(codec.low, np.float64)
    high = low + np.asarray(codec.values, np.float64) - 1
    least, most = (np.asarray(v, np.float64).reshape(-1) for v in (found.min, found.max))
    if (least >= low).all() and (most <= high).all():
        return ""
    return (
        f"values from {least.min():g} to {most.max():g}, of which only {low.min():g} to {high.max():g} can be learned"
    )


def _bad_returns(index: EpisodeIndex, task: str) -> tuple[str, tuple[str, ...]]:
    mine = np.array([t.name == task for t in index.tasks])[np.asarray(index.task)]
    bad = np.flatnonzero(mine & ~np.isfinite(np.asarray(index.total_return)))
    if not len(bad):
        return "", ()
    return f"the return of {len(bad)} episodes is not finite", tuple(index.id(int(e)) for e in bad[:_SHOWN])
