"""Environments by task name: make an environment, get its TaskSpec, get its expert.

A family of environments is a module of this package, which is imported when one of its tasks is used. Users add environments by
the name `module:EnvId` (see `modules`), and families by the entry-point group `tiphys.environments` (see `Family`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tiphys.dataio.environments import modules
from tiphys.dataio.environments.family import (
    Environment,
    Expert,
    ExpertLost,
    Family,
    MissingExtra,
    NoExpert,
    Stateless,
    UnknownEnvironment,
    render_without_display,
)
from tiphys.dataio.environments.modules import allow
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.observation import observation_fields

__all__ = [
    "Environment",
    "Expert",
    "ExpertLost",
    "Family",
    "MissingExtra",
    "NoExpert",
    "Stateless",
    "UnknownEnvironment",
    "allow",
    "expert",
    "family",
    "make",
    "names",
    "observation_fields",
    "spec",
]

GROUP = "tiphys.environments"
# The first family that owns a name gets it; the last one owns every id that gymnasium has registered.
_BUILT_IN = ("memory", "babyai", "metaworld", "atari", "classic", "multi_agent", "gymnasium_family")


def make(task: str, **options: Any) -> Environment:
    """An environment of this task. Options such as `render_mode="rgb_array"` are given to its constructor.

    Raises UnknownEnvironment, which suggests similar names, or MissingExtra, which gives the command that installs the missing
    package.
    """
    owner = family(task)
    render_without_display()
    with _Installed(owner, task):
        if task not in owner.names():
            raise _unknown(task, owner.names())
        return owner.make(task, **options)


@cache
def spec(task: str) -> TaskSpec:
    """Fields, horizon and kind of score of a task, as its environment declares them. `collect` measures the scores."""
    owner = family(task)
    with _Installed(owner, task):
        if task not in owner.names():
            raise _unknown(task, owner.names())
        return owner.spec(task)


def expert(task: str, env: Environment) -> Expert:
    """The expert of a task, for acting in `env`. Raises NoExpert if its family has none."""
    return family(task).expert(task, env)


def names() -> list[str]:
    """All tasks whose families are installed, sorted."""
    found: set[str] = set()
    for each in _families():
        try:
            found.update(each.names())
        except ImportError:
            continue  # the family's extra is not installed, so it has no tasks here
    return sorted(found)


def family(task: str) -> Family:
    """The family that owns this name.

    Raises UnknownEnvironment, which suggests similar names, or DataError for a `module:EnvId` whose module was not allowed.
    """
    if ":" in task:
        return modules.family(task)
    for point in _users():
        if task == point.name or task.startswith(point.name + "/"):
            return _user_family(point)
    for module in _BUILT_IN:
        found = _built_in(module)
        with _Installed(found, task):
            if found.owns(task):
                return found
    raise _unknown(task, names())


def _families() -> Iterator[Family]:
    yield from (_user_family(point) for point in _users())
    yield from (_built_in(module) for module in _BUILT_IN)


@cache
def _users() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))  # cached, because it reads the metadata of every installed package


@cache
def _built_in(module: str) -> Family:
    return importlib.import_module(f"{__name__}.{module}").FAMILY


@cache
def _user_family(point: EntryPoint) -> Family:
    try:
        loaded = point.load()
        found = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        raise DataError(f"entry point {point.name} = {point.value} ({GROUP}) cannot be loaded: {error!r}") from error
    if not isinstance(found, Family):
        raise DataError(
            f"entry point {point.name} = {point.value} ({GROUP}) is not a tiphys.dataio.environments.Family"
        )
    return found


def _unknown(task: str, known: list[str]) -> UnknownEnvironment:
    near = get_close_matches(task, known, n=5, cutoff=0.5)
    if not near:
        lower = {name.lower(): name for name in known}
        near = [lower[n] for n in get_close_matches(task.lower(), lower, n=5, cutoff=0.3)]
    hint = f"did you mean {', '.join(near)}?" if near else "`tiphys environments` lists what is installed"
    return UnknownEnvironment(f"unknown environment {task!r}: {hint}")


class _Installed:
    """Turns an ImportError of a family's packages into a MissingExtra with the command that installs them."""

    def __init__(self, owner: Family, task: str) -> None:
        self._owner, self._task = owner, task

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):
            missing = (error.name or str(error)).split(".")[0]
            command = f": pip install 'tiphys[{self._owner.extra}]'" if self._owner.extra else f" ({error})"
            raise MissingExtra(
                f"environment {self._task!r} needs {missing}, which is not installed{command}"
            ) from error
