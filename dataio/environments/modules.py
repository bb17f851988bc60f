"""Python modules that the user names: `module:EnvId` for an environment, `module:name` for an expert.

Importing a module runs its code, so only a name that the user typed may do it, never one that stands in data. `allow` records
what was typed; a name in data whose module is not among it is refused.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from tiphys.dataio.environments.family import Environment
from tiphys.dataio.environments.gymnasium_family import GymnasiumFamily
from tiphys.dataio.episode import DataError

_NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<rest>.+)")
_allowed: set[str] = set()


def allow(modules: Iterable[str] = (), tasks: Iterable[str] = ()) -> None:
    """Allow this process to import modules for environments. Call it only with what the user typed.

    modules  names of modules
    tasks    names of tasks: of `module:EnvId` the module is allowed, other names allow nothing
    """
    _allowed.update(modules, filter(None, map(module_of, tasks)))


def allowed() -> tuple[str, ...]:
    """The modules that this process may import for environments, sorted."""
    return tuple(sorted(_allowed))


def module_of(task: str) -> str:
    """The module of `module:EnvId`; "" for another name."""
    found = _NAME.fullmatch(task)
    return found["module"] if found else ""


def load(module: str, wanted_by: str) -> ModuleType:
    """Import a module that is installed, on PYTHONPATH, or in the current folder, which is looked at last.

    Raises DataError, which names `wanted_by`, if the import fails.
    """
    top, here = module.partition(".")[0], os.getcwd()
    importlib.invalidate_caches()
    if top not in sys.modules and PathFinder.find_spec(top) is None and PathFinder.find_spec(top, [here]) is not None:
        sys.path.append(here)  # last, so that no file of the folder hides an installed module
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and f"{module}.".startswith(f"{error.name}.")
        )
        hint = f"; it must be installed, on PYTHONPATH, or in the current folder ({here})" if missing else ""
        raise DataError(f"{wanted_by}: {module!r} cannot be imported: {type(error).__name__}: {error}{hint}") from error


class ModuleFamily(GymnasiumFamily):
    """The environments that a module of the user registers with gymnasium, named `module:EnvId`."""

    extra = ""  # the user installs what it needs
    noise = 0.0  # not every environment can be disturbed

    def __init__(self, module: str) -> None:
        self._module = module

    def names(self) -> list[str]:
        import gymnasium

        load(self._module, f"environments {self._module}:…")
        return sorted(f"{self._module}:{name}" for name in gymnasium.registry)

    def make(self, task: str, **options: Any) -> Environment:
        load(self._module, f"environment {task!r}")
        return super().make(task.partition(":")[2], **options)


def family(task: str) -> ModuleFamily:
    """The family of `module:EnvId`. Raises DataError if the name is malformed or its module is not allowed."""
    module = module_of(task)
    if not module:
        raise DataError(
            f"environment {task!r}: `module:EnvId` is expected, with the name of a Python module before the colon"
        )
    if module not in _allowed:
        raise DataError(
            f"environment {task!r} would import the Python module {module!r}, but that name comes from data. If you trust the "
            f"module, name it yourself: `evaluate.modules: [{module}]` in the recipe, `tiphys evaluate --modules {module}`, or "
            f"`tiphys.dataio.environments.allow([{module!r}])`"
        )
    return ModuleFamily(module)
