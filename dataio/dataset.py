"""Operations on whole datasets: read an episode, inspect, merge, append, filter and split. No shard is ever copied."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format.document import DATASET, INDEX, STATISTICS, check_shard, fetch, parse, publish
from tiphys.dataio.format.limited import check_table, read_statistics
from tiphys.dataio.format.places import Range
from tiphys.dataio.format.rows import ONLY_WITH_ACTION
from tiphys.dataio.format.table import Part, Shard, batches, combine, shards_of
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.place import resolve
from tiphys.dataio.inplace.summary import videos
from tiphys.dataio.shards import merge_tasks
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep.foreign import index_foreign
from tiphys.dataio.upkeep.verify import Finding, Report, verify
from tiphys.paths import absolute

__all__ = [
    "Finding",
    "Report",
    "append",
    "filter",
    "index_foreign",
    "inspect",
    "merge",
    "read_episode",
    "split",
    "verify",
]


def read_episode(index: EpisodeIndex, episode: int, without: Collection[str] = ()) -> Episode:
    """Read one whole episode from its shard. It equals what was written, except for fields with a lossy encoding.

    without   names of fields that are left out
    """
    task = index.tasks[index.task[episode]]
    steps, rows = int(index.steps[episode]), int(index.rows[episode])
    names = [f.name for f in task.fields if f.name not in without]
    ranges = index.ranges(episode, 0, rows, names)
    buffers = index.read([*ranges, Range(int(index.shard[episode]), *index.json_range(episode), "json")])
    fields = index.decode(episode, 0, rows, names, buffers[:-1])["fields"]
    short = index.short(episode)
    for field in task.fields:
        if field.per == "step" and field.name in fields and (field.role in ONLY_WITH_ACTION or field.name in short):
            fields[field.name] = fields[field.name][:steps]
    codes, agents = index.agents()
    outcome = int(index.success[episode])
    return Episode(
        id=index.id(episode),
        task=task.name,
        fields=fields,
        steps=steps,
        success=None if outcome < 0 else bool(outcome),
        agent=agents[int(codes[episode])] if codes[episode] >= 0 else "",
        info=_info(index, episode, memoryview(buffers[-1])) if index.rows_offset[episode] >= 0 else {},
    )


def read_field(index: EpisodeIndex, episode: int, field: str) -> Any:
    """Read all rows of one field of an episode from its shard."""
    rows = int(index.rows[episode])
    ranges = index.ranges(episode, 0, rows, [field])
    return index.decode(episode, 0, rows, [field], index.read(ranges))["fields"][field]


def _info(index: EpisodeIndex, episode: int, data: memoryview) -> dict[str, Any]:
    """`info` of the sample's .json member, after checking that the member belongs to this episode."""
    try:
        sample = json.loads(bytes(data))
        if sample["id"] != index.id(episode):
            raise ValueError(f"it belongs to episode {sample['id']!r}")
        return dict(sample["info"])
    except (ValueError, KeyError, TypeError) as error:
        shard = index.shard_name(int(index.shard[episode]))
        raise DataError(
            f"{shard}: the .json member of episode {index.id(episode)!r} is damaged: {error}; run `tiphys verify`"
        ) from None


def inspect(url: str, cache_dir: str = "") -> dict[str, Any]:
    """A summary of a dataset as JSON values: episodes, steps, bytes, fields, and the lengths and returns of each task.

    `bad_values`, task -> field: steps with values that are not finite (`invalid`) or beyond the declared range (`beyond`), the
    number of their `episodes`, and the ids of the `first`; only of fields that have any. A count that is null is unknown, because
    an earlier version wrote the dataset. The returns of a task without rewards are null. `videos` describes those that were not
    stored anew (`tiphys.dataio.inplace.summary`).
    """
    index = EpisodeIndex.open(url, cache_dir)
    task = np.asarray(index.task)
    tasks = {}
    for number, spec in enumerate(index.tasks):
        mine = np.flatnonzero(task == number)
        known = index.success[mine] >= 0
        rewards = any(f.name == "reward" for f in spec.fields)
        tasks[spec.name] = {
            "episodes": len(mine),
            "steps": int(index.steps[mine].sum(dtype=np.int64)),
            "environment": spec.environment,
            "lengths": _spread(index.steps[mine]),
            "returns": _spread(index.total_return[mine] if rewards else np.zeros(0)),
            "success": float(index.success[mine][known].mean()) if known.any() else None,
            "fields": [f.name for f in spec.fields],
        }
    fields: dict[str, Any] = {}
    for spec in index.tasks:
        for field in spec.fields:
            summary = {
                "role": field.role,
                "modality": field.modality,
                "dtype": field.dtype,
                "shape": list(field.shape),
                "per": field.per,
                "low": None if field.low is None else list(field.low),
                "high": None if field.high is None else list(field.high),
                "values": field.values or None,
                "unit": field.unit,
            }
            known = fields.setdefault(field.name, {**summary, "tasks": 0})
            known["tasks"] += 1
            for key in ("low", "high", "values", "unit"):
                if known[key] != summary[key]:
                    known[key] = "differs by task"
    bad_values: dict[str, Any] = {}
    for name, by_field in index.statistics.items():
        for small, found in by_field.items():
            counts = {"invalid": found.invalid, "beyond": found.beyond, "episodes": found.bad_episodes}
            if found.invalid != 0 or found.beyond:
                bad_values.setdefault(name, {})[small] = {**counts, "first": list(found.first_bad), "text": found.bad()}
    return {
        "url": url,
        "episodes": index.episodes,
        "steps": int(index.steps.sum(dtype=np.int64)),
        "bytes": sum(s.size for s in index.shards),
        "shards": len(index.shards),
        "fingerprint": index.fingerprint,
        "tasks": tasks,
        "fields": fields,
        "bad_values": bad_values,
        "quarantined": len(index.document.get("quarantine", [])),
        "skipped": int(index.document.get("skipped", 0)),
        "videos": videos(index),
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Minimum, mean, maximum and a histogram of 20 equal bins."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return {"min": None, "mean": None, "max": None, "histogram": [], "edges": []}
    counts, edges = np.histogram(finite, bins=20)
    low, mean, high = float(finite.min()), float(finite.mean()), float(finite.max())
    return {"min": low, "mean": mean, "max": high, "histogram": counts.tolist(), "edges": edges.tolist()}


def merge(urls: Sequence[str], destination: str) -> EpisodeIndex:
    """Make one dataset of the episodes of several. Its index points to their shards, which must stay where they are.

    Raises DataError if two datasets declare a task of the same name differently, or if there is no episode at all.
    """
    if not urls:
        raise DataError(f"{destination}: there is nothing to merge; name at least one dataset")
    return _assemble([_Source(resolve(url)) for url in urls], destination)


def append(url: str, sources: Sequence[str]) -> EpisodeIndex:
    """Add the episodes of other datasets to a dataset. Its index then points to their shards, which must stay."""
    return _assemble([_Source(url), *(_Source(resolve(s)) for s in sources)], url)


def filter(
    url: str,
    destination: str,
    *,
    tasks: Sequence[str] = (),
    agents: Sequence[str] = (),
    min_return: float | None = None,
    max_return: float | None = None,
    top: float | None = None,
    success: bool = False,
    min_steps: int | None = None,
    max_steps: int | None = None,
) -> EpisodeIndex:
    """Make a dataset of the episodes that meet every given condition. Its index points to the shards of `url`.

    tasks, agents            names or globs
    min_return, max_return   bounds of the undiscounted return, inclusive
    top                      keep this share, in (0, 1], of each task's episodes: those with the highest returns; the other
                             conditions are applied first
    success                  keep only episodes that are known to have succeeded
    min_steps, max_steps     bounds of the number of actions, inclusive

    Raises DataError if a name or glob matches nothing, or if no episode meets all conditions.
    """
    given = {
        "tasks": list(tasks),
        "agents": list(agents),
        "min_return": min_return,
        "max_return": max_return,
        "top": top,
        "success": success,
        "min_steps": min_steps,
        "max_steps": max_steps,
    }
    url = resolve(url)
    index = EpisodeIndex.open(url)
    keep = np.ones(index.episodes, bool)
    if tasks:
        keep &= _matching([t.name for t in index.tasks], tasks)[index.task]
    if agents:
        codes, names = index.agents()
        keep &= (codes >= 0) & np.append(_matching(list(names), agents), False)[codes]
    if min_return is not None:
        keep &= index.total_return >= min_return
    if max_return is not None:
        keep &= index.total_return <= max_return
    if success:
        keep &= index.success == 1
    if min_steps is not None:
        keep &= index.steps >= min_steps
    if max_steps is not None:
        keep &= index.steps <= max_steps
    if top is not None:
        if not 0 < top <= 1:
            raise ValueError(f"top must be a share in (0, 1], not {top}")
        keep &= _top(index, keep, top)
    if not keep.any():
        conditions = ", ".join(f"{k}={v}" for k, v in given.items() if v not in (None, False, []))
        raise DataError(
            f"{url}: none of its {index.episodes:,} episodes meets {conditions or 'an empty filter'}, so {destination} is not "
            "written; `tiphys inspect` shows returns and lengths"
        )
    return _assemble([_Source(url, keep)], destination)


def split(url: str, first: str, second: str, share: float) -> tuple[EpisodeIndex, EpisodeIndex]:
    """Make two datasets of one; about `share` of the episodes go to the second.

    The hash of an episode's id decides, by the rule of `EpisodeIndex.held_out`: the same id goes to the same side in every
    dataset. Raises DataError if one of the two would have no episode; nothing is written then.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    url = resolve(url)
    index = EpisodeIndex.open(url)
    chosen = index.held_out(share)
    if chosen.all() or not chosen.any():
        raise DataError(
            f"{url}: with share {share}, {int(chosen.sum()):,} of {index.episodes:,} episodes go to {second} and "
            f"{int((~chosen).sum()):,} to {first}; both need at least one, so nothing is written. Choose another share"
        )
    return _assemble([_Source(url, ~chosen)], first), _assemble([_Source(url, chosen)], second)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
    """bool [len(names)]: which names match any pattern. Raises DataError for a pattern that matches no name."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise DataError(f"{pattern!r} matches none of {', '.join(names[:20])}")
    return np.array([any(fnmatch.fnmatchcase(n, p) for p in patterns) for n in names], bool)


def _top(index: EpisodeIndex, keep: np.ndarray, share: float) -> np.ndarray:
    best = np.zeros(index.episodes, bool)
    for task in range(len(index.tasks)):
        mine = np.flatnonzero(keep & (index.task == task))
        order = np.argsort(-index.total_return[mine], kind="stable")
        best[mine[order[: math.ceil(share * len(mine))]]] = True
    return best


@dataclass(frozen=True)
class _Source:
    url: str
    keep: np.ndarray | None = None  # bool [E]; None: all


def _assemble(sources: Sequence[_Source], destination: str) -> EpisodeIndex:
    """Write a dataset whose index holds episodes of others. A filtered source contributes the statistics of all its episodes."""
    from tiphys.dataio.storage import Store

    target = Store(destination)
    own = absolute(destination)
    if all(absolute(s.url) != own for s in sources) and target.exists(DATASET):
        raise FileExistsError(f"{destination} is already a dataset; choose another destination")
    scratch = Path(tempfile.mkdtemp(prefix="tiphys-dataset-"))
    tasks: dict[str, TaskSpec] = {}
    shards: dict[str, Shard] = {}
    statistics, parts, partial = Statistics(), list[Part](), False
    quarantine: list[dict[str, Any]] = []
    try:
        for number, source in enumerate(sources):
            file = scratch / f"{number:06d}.parquet"
            document = _fetch_whole(source.url, file, scratch / "statistics.parquet")
            merge_tasks(tasks, document["tasks"], source.url)
            here = absolute(source.url) == own
            base = absolute(source.url)
            rename = {s.name: s.name if here or "://" in s.name else f"{base}/{s.name}" for s in document["shards"]}
            for shard in document["shards"]:
                shards[rename[shard.name]] = replace(shard, name=rename[shard.name])
            parts.append(Part(file, source.keep, rename))
            broken = document.get("quarantine", [])
            quarantine += [q | {"shard": rename.get(q["shard"], q["shard"])} for q in broken]
            statistics.merge(read_statistics(scratch / "statistics.parquet", f"{source.url}/{STATISTICS}"))
            partial = partial or source.keep is not None or bool(document.get("statistics_of_superset"))
        used = _used(parts)
        if not used:
            raise DataError(
                f"{destination}: {', '.join(s.url for s in sources)} hold no episode; an empty dataset is not written"
            )
        for name in used & shards.keys():
            check_shard(shards[name], f"{destination}/{DATASET}")
        combine(parts, scratch / INDEX, list(tasks.values()), [s for n, s in shards.items() if n in used])
        more: dict[str, Any] = {"quarantine": quarantine} if quarantine else {}
        if partial:
            more["statistics_of_superset"] = True
        publish(target, scratch / INDEX, statistics, **more)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EpisodeIndex.open(destination)


def _fetch_whole(url: str, file: Path, sketches: Path) -> dict[str, Any]:
    """Download index and statistics of a dataset; returns its dataset.json. Raises DataError if one has another digest."""
    from tiphys.dataio.storage import Store

    store = Store(url)
    document = parse(store.read(DATASET), f"{url}/{DATASET}")
    for name, target in ((INDEX, file), (STATISTICS, sketches)):
        if fetch(store, name, target) != document["digests"].get(name):
            raise DataError(
                f"{url}/{name} does not have the SHA-256 that {DATASET} names; run `tiphys verify --repair`"
            )
    check_table(file, f"{url}/{INDEX}")
    return document


def _used(parts: Sequence[Part]) -> set[str]:
    """Names of the shards that hold the parts' episodes."""
    used: set[str] = set()
    for part in parts:
        for batch in batches(part):
            used |= shards_of(batch)
    return used
