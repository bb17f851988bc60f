"""The datasets of a recipe, opened once for all checks; meanwhile a child process makes the environments of `evaluate.tasks`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tiphys.dataio.environments.modules import module_of
from tiphys.dataio.environments.probe import declared
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.prepare import is_waiting, prepare

if TYPE_CHECKING:
    from tiphys.dataio.episode import DataError, TaskSpec
    from tiphys.recipes.schema import Recipe


class Opened:
    """Opens the datasets. `close` ends the child process.

    Parameters
    ----------
    recipe : Recipe
    index : bool
        Make the indexes that raw LeRobot folders lack; otherwise such folders are left out.
    environments : bool
        Begin to make the environments.

    Attributes
    ----------
    indexes : list of EpisodeIndex
        In the order of the mixture, without those that could not be opened or were left out.
    errors : list of (str, str)
        Key and reason of each dataset that could not be opened.
    """

    def __init__(self, recipe: Recipe, *, index: bool = False, environments: bool = True) -> None:
        self.indexes: list[EpisodeIndex] = []
        self.errors: list[tuple[str, str]] = []
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(1)
        self._names: list[str] = []
        self._made: Future[list[TaskSpec | DataError]] | None = None
        for i, entry in enumerate(recipe.data.mixture):
            try:
                if index:
                    prepare(entry.dataset)
                elif is_waiting(entry.dataset):
                    continue
                self.indexes.append(EpisodeIndex.open(entry.dataset))
            except (ValueError, OSError) as error:
                self.errors.append((f"data.mixture[{i}].dataset", str(error)))
        self.modules = [*recipe.evaluate.modules, *filter(None, map(module_of, recipe.evaluate.tasks))]
        if environments:
            known = {task.name: task.environment for one in self.indexes for task in one.tasks}
            self._names = list(dict.fromkeys(filter(None, (known.get(name) for name in recipe.evaluate.tasks))))
        if self._names:
            self._made = self._pool.submit(declared, self._names, self.modules, stop=self._stop)

    def declared(self, names: Sequence[str]) -> list[TaskSpec | DataError]:
        """What each environment declares, or why it cannot be made (`tiphys.dataio.environments.probe.declared`)."""
        made = dict(zip(self._names, self._made.result(), strict=True)) if self._made is not None else {}
        if other := [name for name in dict.fromkeys(names) if name not in made]:
            made |= dict(zip(other, declared(other, self.modules), strict=True))
        return [made[name] for name in names]

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown()
