"""`tiphys mixture`: change the mixture of a run while it trains.

A request is an event of the plan's log (`tiphys.dataio.plan.log`), appended to `<run.dir>/plan.jsonl`. Rank 0 of the run reads
new lines after every step. All ranks then add the event to their plan's log, with effect from the same step on. Every checkpoint
contains this log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import say
from tiphys.dataio.plan.log import PlanLog, described
from tiphys.paths import expand
from tiphys.pretrain.checkpoint_files import MANIFEST, folders
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
    known = names(_unfinished(run_dir))
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

    known = names(_unfinished(run_dir))
    log = _log(run_dir)
    number = len(known) + sum(event["kind"] == "dataset" for event in log.events)
    for item in datasets:
        dataset, sign, value = item.rpartition("=")
        if not sign:
            raise ValueError(f"{item!r}: write dataset=weight, for example: runs/more=0.5")
        dataset = expand(dataset)
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
    """The weights of all entries as the run has adopted them, and all requests with the step from which they apply."""
    recipe = _recipe(run_dir)
    given = {name: entry.weight for name, entry in zip(names(recipe), recipe.data.mixture, strict=True)}
    now, done = dict(given), adopted(run_dir)
    for event in done:
        now |= event["weights"] if event["kind"] == "weights" else {}
        now |= {event["entry"]: event["weight"]} if event["kind"] == "dataset" else {}
    lines = []
    for name, weight in now.items():
        was = "" if given.get(name) == weight else f"  (recipe: {given[name]:g})" if name in given else "  (added)"
        lines.append(f"{name}  {weight:g}{was}")
    for event, same in _matched(_log(run_dir).events, done):
        if event["kind"] == "data":
            lines.append(f"changed: {json.dumps(event)}")
        elif same is None:
            lines.append(f"asked{_from(event['step'])}: {described(event)}")
        else:
            lines.append(f"adopted from step {same['step']} on: {described(event)}")
    return "\n".join(lines)


def _matched(
    requests: Iterable[dict[str, Any]], done: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each request with the event that it became; None: it waits. Both differ in their steps only."""
    left = list(done)
    for request in requests:
        same = next((event for event in left if {**event, "step": request["step"]} == request), None)
        if same is not None:
            left.remove(same)
        yield request, same


def adopted(run_dir: str) -> list[dict[str, Any]]:
    """The events that the run has adopted, each with the first step to which it applies, from its metrics.jsonl."""
    file, found = Path(run_dir) / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if '"change"' in line:
            with suppress(ValueError):  # the run is writing this line
                value = json.loads(line)
                found += [value["event"]] if value.get("kind") == "change" else []
    return found


def _unfinished(run_dir: str) -> Recipe:
    """The recipe of a run. Raises ValueError if all its steps are done: nothing can change it."""
    recipe = _recipe(run_dir)
    done = max((step for step, folder in folders(run_dir) if (folder / MANIFEST).is_file()), default=0)
    if done >= recipe.train.steps:
        raise ValueError(
            f"{run_dir}: the run has finished its {recipe.train.steps} steps; its mixture cannot change. "
            "Start it again with more train.steps, then ask"
        )
    return recipe


def follow(
    run_dir: str, plan: SamplingPlan, known: Sequence[dict[str, Any]] = ()
) -> Callable[[], list[dict[str, Any]]]:
    """Returns a function that returns the requests since its last call; the first time all that the plan does not know.

    A request that was made while the run stood still is among these, and so is one that the run adopted after the checkpoint from
    which it resumes. The latter has the step from which it was in force, so that the run draws the same rows again.

    An event that does not fit the plan is ignored, with a message on stderr: a request never ends a run.

    known    events that the plan of the run has: those of the checkpoint and of the rollbacks
    """
    log = _log(run_dir)
    new = [event for event, same in _matched(log.events, known) if same is None and event["kind"] != "data"]
    waiting = [event if same is None else same for event, same in _matched(new, _without(adopted(run_dir), known))]

    def fresh() -> list[dict[str, Any]]:
        out = []
        events, waiting[:] = [*waiting, *log.follow()], []
        for event in events:
            try:
                plan.check(event)
            except Exception as error:  # a request never ends a run, whatever is wrong with it
                say(f"tiphys: a request in {log.path} is ignored: {error}", error=True)
            else:
                out.append(event)
        return out

    return fresh


def _without(events: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event not in known]


def _log(run_dir: str) -> PlanLog:
    """The requests made so far. Invalid lines are ignored, with a warning."""
    log = PlanLog.following(str(Path(run_dir) / REQUESTS))
    log.follow()
    return log


def _entry(key: str, known: Sequence[str]) -> str:
    """The plan's name of a mixture entry that is given by its number, its dataset, or both."""
    key = expand(key)
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
