"""No code of the current folder: what Tiphys and the Python processes that it starts may import.

A folder of data may hold a `select.py` or a `numpy.py`. With `-m` and `-c`, Python would import them instead of the modules of
these names, because it puts the current folder first on its path; an empty entry of PYTHONPATH means the current folder too.
Here both are left out. A folder that PYTHONPATH names stays. This file imports only what Python has loaded before it searches.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["tiphys"].__file__ or "")))


def leave_current_folder() -> None:
    """Take the current folder off the path of this process, and of all Python processes that it will start."""
    here, named = os.getcwd(), _named_folders()
    library = os.path.dirname(os.path.abspath(os.__file__))
    places = [os.path.abspath(place) for place in sys.path]
    own = places.index(library) if library in places else 1  # Python's own folders begin here
    sys.path[:] = [
        folder
        for i, (folder, place) in enumerate(zip(sys.path, places, strict=True))
        if i >= own or place != here or place in named
    ]
    if here == _ROOT and not {_ROOT, *named} & set(sys.path):  # a checkout that is not installed: after all others
        sys.path.append(_ROOT)
        os.environ["PYTHONPATH"] = os.pathsep.join([*named, _ROOT])
    os.environ.update(child_environment())
    if not _named_folders():
        os.environ.pop("PYTHONPATH", None)


def child_environment() -> dict[str, str]:
    """The environment for a Python process: the current folder is not on its path, and entries of PYTHONPATH are absolute."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    named = _named_folders()
    return {**environment, "PYTHONPATH": os.pathsep.join(named)} if named else environment


def python(*words: str) -> list[str]:
    """A command line of this Python that does not put the current folder on its path."""
    return [sys.executable, "-P", *words]


def _named_folders() -> list[str]:
    """The folders that PYTHONPATH names."""
    return [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
