"""`tiphys mixture`: change the mixture of a run while it trains.

A request is an event of the plan's log (`tiphys.dataio.plan.log`), appended to `<run.dir>/plan.jsonl`. Rank 0 of the run reads
new lines after every step. All ranks then add the event to their plan's log, with effect from the same step on. Every checkpoint
contains this log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.log import PlanLog
from tiphys.recipes.load import load_recipe
from tiphys.recipes.schema import Recipe

if TYPE_CHECKING:
    from tiphys.dataio.sampling import SamplingPlan

REQUESTS = "plan.jsonl"


def names(recipe: Recipe) -> list[str]:
    """The plan's names of the mixture entries: `0:datasets/a`, `1:s3://b`."""
    return [f"{i}:{entry.dataset}" for i, entry in enumerate(recipe.data.mixture)]


def request(run_dir: str, weights: Sequence[str], at: int = 0) -> str:
    """Ask a run for new weights. Returns a sentence that confirms the request.

    weights  `entry=weight` each; an entry is given by its number, its dataset, or both (`0:datasets/a`)
    at       first training step that uses the weights; 0: the first step at which all ranks can

    Raises ValueError if an entry is unknown or ambiguous, or a weight is not a finite number of at least 0. Then nothing is
    written.
    """
    recipe = _recipe(run_dir)
    known = names(recipe)
    wanted: dict[str, float] = {}
    for item in weights:
        key, sign, value = item.rpartition("=")
        if not sign:
            raise ValueError(f"{item!r}: write entry=weight; the entries are {', '.join(known)} (the number is enough)")
        wanted[_entry(key, known)] = _weight(value, item)
    if not wanted:
        raise ValueError("no weight was given; write for example: tiphys mixture RUN set 0=0.5 1=0.5")
    _log(run_dir).append({"step": at, "kind": "weights", "weights": wanted})
    return f"asked {run_dir} for {', '.join(f'{n} = {w:g}' for n, w in wanted.items())}{_from(at)}"


def add(run_dir: str, datasets: Sequence[str], like: str, at: int = 0) -> str:
    """Ask a run to add datasets to its mixture. Returns a sentence that confirms the request.

    datasets  `dataset=weight` each
    like      the mixture entry whose objective they get: its number, its dataset, or both
    at        first training step that may draw from them; 0: the first step at which all ranks can

    Raises ValueError if `like` is unknown or a weight is not a finite number of at least 0, and any error of opening a dataset.
    """
    from tiphys.dataio.index import EpisodeIndex

    known = names(_recipe(run_dir))
    log = _log(run_dir)
    number = len(known) + sum(event["kind"] == "dataset" for event in log.events)
    for item in datasets:
        dataset, sign, value = item.rpartition("=")
        if not sign:
            raise ValueError(f"{item!r}: write dataset=weight, for example: runs/more=0.5")
        event = {"step": at, "kind": "dataset", "entry": f"{number}:{dataset}", "dataset": dataset}
        event |= {
            "digest": EpisodeIndex.open(dataset).fingerprint,
            "like": _entry(like, known),
            "weight": _weight(value, item),
        }
        log.append(event)
        number += 1
    return f"asked {run_dir} to add {', '.join(datasets)} with the objective of entry {like}{_from(at)}"


def show(run_dir: str) -> str:
    """The weights of the recipe and all requests, one line each."""
    recipe = _recipe(run_dir)
    lines = [f"{name}  {entry.weight:g}" for name, entry in zip(names(recipe), recipe.data.mixture)]
    events = _log(run_dir).events
    lines += [f"{'changed' if e['kind'] == 'data' else 'asked'}: {json.dumps(e)}" for e in events]
    return "\n".join(lines)


def follow(run_dir: str, plan: SamplingPlan) -> Callable[[], list[dict[str, Any]]]:
    """Returns a function that returns the events appended since its last call, or, the first time, since this call.

    An event that does not fit the plan is ignored, with a message on stderr: a request never ends a run.
    """
    log = _log(run_dir)

    def fresh() -> list[dict[str, Any]]:
        out = []
        for event in log.follow():
            try:
                plan.check(event)
            except (DataError, OSError) as error:
                print(f"tiphys: a request in {log.path} is ignored: {error}", file=sys.stderr, flush=True)
            else:
                out.append(event)
        return out

    return fresh


def _log(run_dir: str) -> PlanLog:
    """The requests made so far. Invalid lines are ignored, with a warning."""
    log = PlanLog.following(str(Path(run_dir) / REQUESTS))
    log.follow()
    return log


def _entry(key: str, known: Sequence[str]) -> str:
    """The plan's name of a mixture entry that is given by its number, its dataset, or both."""
    found = [n for i, n in enumerate(known) if key in (str(i), n, n.partition(":")[2])]
    if len(found) != 1:
        raise ValueError(f"{key!r} is not one of the entries {', '.join(known)}; name one entry (its number is enough)")
    return found[0]


def _weight(value: str, item: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{item!r}: a weight must be a finite number of at least 0")
    return weight


def _from(at: int) -> str:
    return f" from step {at} on" if at else ""


def _recipe(run_dir: str) -> Recipe:
    file = Path(run_dir) / "recipe.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{run_dir}: not the folder of a run: it has no recipe.yaml")
    return load_recipe(file)
