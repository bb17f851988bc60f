"""Whether the policy of a recipe can act in the environments of `evaluate.tasks`. They are made once, in a child process."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from tiphys.dataio.environments.fitting import misfits
from tiphys.dataio.episode import DataError
from tiphys.launch.checks.opened import Opened
from tiphys.pretrain.acting.ask import Asking
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.schema import Recipe


def environment_errors(
    recipe: Recipe, opened: Opened, objectives: Objectives, where: Callable[[str], str]
) -> Iterator[str]:
    """The errors of `evaluate.tasks`: unknown tasks, and environments that cannot be made or whose spaces do not fit.

    opened  the recipe's datasets
    where   place of a key in the recipe's file, for messages
    """
    names = recipe.evaluate.tasks
    if not names:
        return
    processor = Processor.from_dict(objectives.processor())
    places: dict[str, str] = {}  # name of a task whose environment is to be made -> its place
    for number, name in enumerate(names):
        place = where(f"evaluate.tasks[{number}]")
        if problem := _problem(name, processor):
            yield f"{place}: {problem}"
        else:
            places.setdefault(name, place)
    asking = Asking.from_recipe(recipe.evaluate)
    for key, reason in asking.problems(processor, list(places)):
        yield f"{where(f'evaluate.{key}')}: {reason}"
    tasks = [processor.tasks[name] for name in places]
    for task, found in zip(tasks, opened.declared([t.environment for t in tasks]), strict=True):
        if isinstance(found, DataError):
            yield f"{places[task.name]}: {found}"
        else:
            plays = asking.plays(processor, [task.name])
            used = {name for _, objective in plays for name in processor.used_fields(task.name, objective)}
            for problem in misfits(task, used, found.fields):
                yield f"{places[task.name]}: {problem}"


def _problem(name: str, processor: Processor) -> str:
    """Why no environment can be made for a task; empty if one can be tried."""
    if name not in processor.tasks:
        near = difflib.get_close_matches(name, processor.tasks, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The tasks are {', '.join(processor.tasks)}."
        return f"no task that is trained is called {name!r}. {hint}"
    if not processor.layouts[processor.objective(name)][name].has_actions:
        return f"task {name!r} has no actions, so no policy can act in it"
    if not processor.tasks[name].environment:
        return f"task {name!r} has no environment; set `environment` in a mapping file and convert the data again"
    return ""
