"""Mixture entries with their objectives, datasets and tasks. Errors name what does not fit together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.stored import number as within
from tiphys.pretrain.tokens.clips import without_clip
from tiphys.pretrain.tokens.encoding import OPTIONS
from tiphys.pretrain.tokens.paradigm import ACTING_OPTIONS, Paradigm
from tiphys.pretrain.tokens.paradigms import PARADIGMS, hiding_errors, paradigm_errors

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.recipes.schema import Recipe
    from tiphys.recipes.sections.data import Entry
    from tiphys.recipes.sections.objective import Objective


@dataclass(frozen=True)
class MixtureEntry:
    """One entry of the mixture, with its objective, its dataset and the tasks that are trained."""

    settings: Entry  # of the recipe
    name: str  # of the objective
    objective: Objective
    paradigm: Paradigm
    index: EpisodeIndex
    tasks: tuple[int, ...]  # the tasks that are trained, as numbers in the index

    def __iter__(self) -> Iterator[tuple[int, TaskSpec]]:
        return ((i, self.index.tasks[i]) for i in self.tasks)


def mixture_entry(recipe: Recipe, entry: Entry, index: EpisodeIndex) -> MixtureEntry:
    from tiphys.recipes.sections.objective import Objective

    name = entry.objective
    objective = recipe.objectives[name] if name in recipe.objectives else Objective()
    for key, reason in paradigm_errors(name, objective.paradigm):
        raise DataError(f"{key}: {reason}")
    paradigm = PARADIGMS[objective.paradigm or name]
    for key, reason in hiding_errors(name, paradigm, objective.options):
        raise DataError(f"{key}: {reason}")
    wanted = list(entry.tasks) or ["*"]
    tasks = tuple(i for i, t in enumerate(index.tasks) if any(fnmatchcase(t.name, pattern) for pattern in wanted))
    if not tasks:
        has = ", ".join(t.name for t in index.tasks)
        raise DataError(f"data.mixture: no task of {entry.dataset} matches {', '.join(wanted)}; it has {has}")
    return MixtureEntry(entry, name, objective, paradigm, index, tasks)


def tasks_of(entries: Sequence[MixtureEntry]) -> tuple[TaskSpec, ...]:
    """Tasks in order of appearance. Raises DataError if two datasets have a task of the same name with different fields."""
    found: dict[str, tuple[TaskSpec, str]] = {}
    for entry in entries:
        for _, declared in entry:
            task = without_clip(declared)
            known, where = found.setdefault(task.name, (task, entry.settings.dataset))
            one, other = ({f.name: f for f in t.fields} for t in (known, task))
            differ = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
            if differ:
                raise DataError(
                    f"task {task.name!r} has other fields in {entry.settings.dataset} than in {where}: {', '.join(differ)}; "
                    "rename one of the tasks, or make the fields equal"
                )
    return tuple(task for task, _ in found.values())


def check_names(entries: Sequence[MixtureEntry]) -> None:
    """Raises DataError for an unknown option, and for a pattern that matches no field, because both are typing errors."""
    fields: dict[str, set[str]] = {}
    for entry in entries:
        fields.setdefault(entry.name, set()).update(f.name for _, task in entry for f in task.fields)
    for entry in entries:
        rule, acting = entry.paradigm.acting
        for option, value in entry.objective.options.items():
            if option not in OPTIONS:
                raise DataError(
                    f"objectives.{entry.name}.options: no option {option!r}; the options are {', '.join(OPTIONS)}"
                )
            if option in ACTING_OPTIONS:
                where = f"objectives.{entry.name}.options.{option}"
                if option not in acting:
                    raise DataError(
                        f"{where}: paradigm {entry.paradigm.name!r} acts by {rule!r}, which has no such option"
                    )
                within(value, where, *ACTING_OPTIONS[option][1:])
        for pattern in entry.objective.fields:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in fields[entry.name]):
                has = ", ".join(sorted(fields[entry.name]))
                near = difflib.get_close_matches(pattern, fields[entry.name], n=1)
                hint = (
                    f"did you mean {near[0]!r}? The tasks have" if near else "write one of those that the tasks have:"
                )
                raise DataError(f"objectives.{entry.name}.fields: no field matches {pattern!r}; {hint} {has}")


def task_numbers(entry: MixtureEntry, number: Mapping[str, int]) -> np.ndarray:
    out = np.full(len(entry.index.tasks), -1, np.int32)
    for i, task in entry:
        out[i] = number[task.name]
    return out


def prompt_share(line: MixtureEntry) -> float:
    return line.paradigm.prompt.share if line.objective.prompt < 0 else line.objective.prompt
