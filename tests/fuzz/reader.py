"""What a fuzzed reader is, and damage that several readers share."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.dataio.convert import mutate
from tiphys.dataio.episode import DataError

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """One reader.

    seeds   valid inputs
    damage  a damaged copy of an input
    read    reads an input; the folder is empty and may be written to
    errors  what it may raise
    """

    seeds: tuple[bytes, ...]
    damage: Damage
    read: Callable[[bytes, Path], Any]
    errors: tuple[type[Exception], ...] = (DataError,)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    return mutate.flipped(data, rng)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    return mutate.mutate("x.json", data, rng)


def damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    return yaml.safe_dump(mutate.tree(yaml.safe_load(data), rng)).encode()


def packed(files: dict[str, bytes]) -> bytes:
    """Several files as one input."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return out.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The inverse of `packed`."""
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        return {name: made.read(name) for name in made.namelist()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Path within the folder -> content of each file below it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
