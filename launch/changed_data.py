"""A run whose datasets were corrected after it began: what must be the same, and how its continuation is accepted.

`<run.dir>/objectives.json` records, when a run begins, what its datasets look like and how their values become tokens. The tokens
must keep their meaning while a model learns, so a run that continues with corrected datasets keeps the recorded encoding: the
means, ranges and best returns of the data as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.atomic import finite, write_json
from tiphys.dataio.messages import say
from tiphys.dataio.plan.log import PlanLog
from tiphys.launch.mixture import REQUESTS, names
from tiphys.launch.submit import ACCEPT_CHANGED_DATA
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.recipes.schema import Recipe

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims

RECORD = "objectives.json"
_VERSION = 1


def settle(
    recipe: Recipe,
    indexes: Sequence[EpisodeIndex],
    objectives: Objectives,
    *,
    resume: Checkpoint | None,
    accept: bool,
    world: ParallelDims | None = None,
) -> list[list[str]]:
    """The fingerprints that the datasets had earlier in this run, oldest first; empty if they have not changed. Collective.

    Writes the run's record. If the datasets have changed, `objectives` is set to the recorded encoding.

    resume  the checkpoint that the run continues; None: the run begins
    accept  the user accepts that the datasets have changed; an event in `plan.jsonl` says so

    Raises CheckpointError if the checkpoint belongs to another recipe, or if the datasets changed in more than their values.
    """
    from tiphys.pretrain.checkpoint import check_recipe

    if resume is not None:
        check_recipe(resume.state(), recipe, str(resume.path))
    file = Path(recipe.run.dir) / RECORD
    now = [index.fingerprint for index in indexes]
    record = _read(file) if resume is not None else None
    if world is not None:
        world.barrier()  # rank 0 does not replace the record before the others have read it
    writes = world is None or world.rank == 0
    if record is None:
        if resume is not None and accept and resume.state()["datasets"] != now:
            raise CheckpointError(
                f"{file}: missing or of another version, so it is not known what the datasets looked like when the run began; "
                f"restore the old datasets, or use another run.dir instead of {ACCEPT_CHANGED_DATA}"
            )
        if writes and resume is None:
            described = [describe(index) for index in indexes]
            content = {"version": _VERSION, "datasets": now, "earlier": [], "data": described}
            write_json(file, finite({**content, "objectives": objectives.state()}))
        return []
    if record["datasets"] != now:
        if not accept:
            return list(record["earlier"])  # the trainer refuses to continue
        found = [line for i, index in enumerate(indexes) for line in differences(record["data"][i], index)]
        if found:
            raise CheckpointError(
                f"{recipe.run.dir}: {ACCEPT_CHANGED_DATA} is for datasets of which only values were corrected, but\n  "
                + "\n  ".join(found)
            )
        earlier = [*record["earlier"], record["datasets"]]
        if writes:
            _log(recipe, resume.step if resume is not None else 0, record["datasets"], now)
            write_json(file, {**record, "datasets": now, "earlier": earlier})
        record = {**record, "earlier": earlier}
    if record["earlier"]:
        objectives.restore(record["objectives"])
    return list(record["earlier"])


def describe(index: EpisodeIndex) -> dict[str, Any]:
    """What must stay the same when values of a dataset are corrected: fields, and the episodes with their lengths, by task."""
    task, hashes = np.asarray(index.task), np.asarray(index.hash)
    steps, rows = np.asarray(index.steps), np.asarray(index.rows)
    tasks = {}
    for number, spec in enumerate(index.tasks):
        mine = np.flatnonzero(task == number)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(a[mine]).tobytes() for a in (hashes, steps, rows)))
        digest.update(mine.astype(np.int64).tobytes())  # the plan knows episodes by their numbers
        fields = {f["name"]: f for f in json.loads(json.dumps(finite(spec.to_dict())))["fields"]}
        total = int(steps[mine].sum(dtype=np.int64))
        tasks[spec.name] = {"fields": fields, "episodes": len(mine), "steps": total, "digest": digest.hexdigest()}
    return {"url": index.url, "tasks": tasks}


def differences(old: Mapping[str, Any], index: EpisodeIndex) -> Iterator[str]:
    """In words, how a dataset differs from what `describe` said of it, apart from values."""
    tasks = describe(index)["tasks"]
    for name in sorted(old["tasks"].keys() ^ tasks.keys()):
        yield f"{index.url}: task {name!r} is {'new' if name in tasks else 'gone'}"
    for name in sorted(old["tasks"].keys() & tasks.keys()):
        was, now = old["tasks"][name], tasks[name]
        for field in sorted(was["fields"].keys() | now["fields"].keys()):
            if was["fields"].get(field) != now["fields"].get(field):
                yield f"{index.url}: task {name!r}, field {field!r}: {_change(was['fields'], now['fields'], field)}"
        if was["digest"] != now["digest"]:
            yield (
                f"{index.url}: task {name!r}: the ids, the order or the lengths of its episodes differ "
                f"({was['episodes']} episodes of {was['steps']} steps -> {now['episodes']} of {now['steps']})"
            )


def _change(was: Mapping[str, Any], now: Mapping[str, Any], field: str) -> str:
    if field not in was or field not in now:
        return "new" if field in now else "gone"
    keys = [k for k in now[field] if was[field].get(k) != now[field][k]]
    return ", ".join(f"{k} {was[field].get(k)} -> {now[field][k]}" for k in keys)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{file}: it is damaged ({error}); restore it, or use another run.dir") from None
    return record if record.get("version") == _VERSION else None


def _log(recipe: Recipe, step: int, old: Sequence[str], new: Sequence[str]) -> None:
    log = PlanLog.following(str(Path(recipe.run.dir) / REQUESTS))
    log.follow()
    for name, before, after in zip(names(recipe), old, new, strict=True):
        if before != after:
            log.append({"step": step, "kind": "data", "entry": name, "old": before, "new": after})
            say(f"changed data {name}: fingerprint {before} -> {after}, accepted from step {step} on")
