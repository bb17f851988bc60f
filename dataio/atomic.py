"""Atomic writes: a temporary file beside the target, fsync, rename, fsync of the folder. And values as valid JSON.

A crash at any moment leaves either the old file or the whole new one. Temporary names are random, so no two writers share one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# Names of the temporary files; a killed writer may leave one behind
TEMPORARY = re.compile(r"\.[^/]*\.[0-9a-f]{16}\.tmp$")


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path to write to. The file becomes `target` if the block ends without an exception, else it is removed.

    The target's folder is created. The target's mode follows the umask, even if the block sets another one. An OSError that names
    no file is raised again with the target's name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
    folder = os.open(target.parent, os.O_RDONLY)  # the rename too must survive a power failure
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """Like `atomic_path`, but gives an open binary file."""
    with atomic_path(target) as temporary, open(temporary, "r+b") as file:
        yield file


def write_text(target: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_file(Path(target)) as file:
        file.write(text.encode())


def to_json(value: Any, *, exact: bool = False, default: Callable[[Any], Any] | None = None, **options: Any) -> str:
    """Any value as valid JSON. JSON has no NaN and no infinity: null stands for them.

    exact    the strings "NaN", "Infinity" and "-Infinity" stand for them instead; `float` and NumPy read these
    default, options   as of `json.dumps`
    """

    def plain(item: Any) -> Any:
        if default is None:
            raise TypeError(f"{type(item).__name__} is not a JSON value")
        return finite(default(item), exact)

    return json.dumps(finite(value, exact), allow_nan=False, default=plain, **options)


def write_json(target: str | Path, value: Any, *, indent: int | None = None) -> None:
    """Write a JSON file, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    separators = None if indent else (",", ":")
    write_text(target, json.dumps(value, indent=indent, separators=separators, allow_nan=False))


def finite(value: Any, exact: bool = False) -> Any:
    """A copy of a JSON value in which None (or, if `exact`, a string) replaces NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item, exact) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item, exact) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if not exact else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
