"""Whether the policy of a recipe can act in the environments of `evaluate.tasks`. Each is made once, in a child process."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tiphys.dataio.environments.fitting import misfits
from tiphys.dataio.environments.modules import module_of
from tiphys.dataio.environments.probe import declared
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.schema import Recipe

_AT_ONCE = 4  # children


def environment_errors(recipe: Recipe, objectives: Objectives, where: Callable[[str], str]) -> Iterator[str]:
    """The errors of `evaluate.tasks`: unknown tasks, and environments that cannot be made or whose spaces do not fit.

    where  place of a key in the recipe's file, for messages
    """
    names = recipe.evaluate.tasks
    if not names:
        return
    processor = Processor.from_dict(objectives.processor())
    modules = [*recipe.evaluate.modules, *filter(None, map(module_of, names))]

    def problems(name: str) -> list[str]:
        return list(_problems(name, processor, modules))

    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        for number, found in enumerate(pool.map(problems, names)):
            for problem in found:
                yield f"{where(f'evaluate.tasks[{number}]')}: {problem}"


def _problems(name: str, processor: Processor, modules: list[str]) -> Iterator[str]:
    known: dict[str, TaskSpec] = dict(processor.tasks)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The tasks are {', '.join(known)}."
        yield f"no task that is trained is called {name!r}. {hint}"
        return
    task = known[name]
    if not processor.layouts[processor.objective(name)][name].has_actions:
        yield f"task {name!r} has no actions, so no policy can act in it"
    elif not task.environment:
        yield f"task {name!r} has no environment; set `environment` in a mapping file and convert the data again"
    else:
        try:
            yield from misfits(task, processor.used_fields(name), declared(task.environment, modules).fields)
        except DataError as error:
            yield str(error)
