"""`tiphys mixture`: change the weights of a run's mixture while it trains.

A request is one line of `<run.dir>/mixture.jsonl`. Rank 0 of the run reads new lines after every step. All ranks then add the
change to the plan's log, in force from the same step on. Every checkpoint contains that log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiphys.recipes.load import load_recipe
from tiphys.recipes.schema import Recipe

REQUESTS = "mixture.jsonl"


def names(recipe: Recipe) -> list[str]:
    """The plan's names of the mixture entries: `0:datasets/a`, `1:s3://b`."""
    return [f"{i}:{entry.dataset}" for i, entry in enumerate(recipe.data.mixture)]


def request(run_dir: str, weights: Sequence[str], at: int = 0) -> str:
    """Ask a run for new weights. Returns a sentence that confirms it.

    weights  `entry=weight` each; an entry is the number of a mixture entry, its dataset, or both (`0:datasets/a`)
    at       first training step that uses them; 0: as soon as every rank can

    Raises ValueError if an entry is unknown or ambiguous, or a weight is not a number of at least 0; nothing is written then.
    """
    recipe = _recipe(run_dir)
    known = names(recipe)
    wanted: dict[str, float] = {}
    for item in weights:
        key, sign, value = item.rpartition("=")
        found = [n for i, n in enumerate(known) if key in (str(i), n, n.partition(":")[2])]
        if not sign or len(found) != 1:
            raise ValueError(
                f"{item!r}: write entry=weight; the entries are {', '.join(known)} (the number alone is enough)"
            )
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{item!r}: a weight must be a finite number of at least 0")
        wanted[found[0]] = weight
    if not wanted:
        raise ValueError("no weight was given; write for example: tiphys mixture RUN set 0=0.5 1=0.5")
    line = json.dumps({"step": at, "kind": "weights", "weights": wanted}) + "\n"
    with open(Path(run_dir) / REQUESTS, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return f"asked {run_dir} for {', '.join(f'{n} = {w:g}' for n, w in wanted.items())}" + (
        f" from step {at} on" if at else ""
    )


def show(run_dir: str) -> str:
    """The weights of the recipe and every change that was asked for, a line each."""
    recipe = _recipe(run_dir)
    lines = [f"{name}  {entry.weight:g}" for name, entry in zip(names(recipe), recipe.data.mixture)]
    lines += [f"asked: {json.dumps(event)}" for event in _read(Path(run_dir) / REQUESTS, 0)[0]]
    return "\n".join(lines)


def follow(run_dir: str) -> Callable[[], list[dict[str, Any]]]:
    """Returns a function that gives the requests made since its last call. Requests older than this call are never given."""
    path = Path(run_dir) / REQUESTS
    position = path.stat().st_size if path.is_file() else 0

    def fresh() -> list[dict[str, Any]]:
        nonlocal position
        found, position = _read(path, position)
        return found

    return fresh


def _read(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines from byte `start` on, parsed, and the byte at which the next read starts."""
    if not path.is_file() or path.stat().st_size <= start:
        return [], start
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], start + end


def _recipe(run_dir: str) -> Recipe:
    file = Path(run_dir) / "recipe.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{run_dir}: not the folder of a run: it has no recipe.yaml")
    return load_recipe(file)
