"""What one does with a whole dataset: read an episode, look at it, and make datasets of datasets without copying shards."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format.document import DATASET, INDEX, STATISTICS, exists, fetch, parse, publish
from tiphys.dataio.format.rows import ONLY_WITH_ACTION
from tiphys.dataio.format.table import Part, Shard, batches, combine
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import merge_tasks
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep.foreign import absolute, index_foreign
from tiphys.dataio.upkeep.verify import Finding, Report, verify

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


def read_episode(index: EpisodeIndex, episode: int) -> Episode:
    """One whole episode from its shard, equal to what was written (lossy encodings apart)."""
    task = index.tasks[index.task[episode]]
    steps, rows, shard = int(index.steps[episode]), int(index.rows[episode]), int(index.shard[episode])
    names = [f.name for f in task.fields]
    ranges = index.ranges(episode, 0, rows, names)
    starts, sizes = [r.offset for r in ranges], [r.size for r in ranges]
    begin, length = (int(index.arrays[n][episode]) for n in ("json", "json_bytes"))
    buffers = index.store.read_ranges(index.shard_name(shard), [*starts, begin], [*sizes, length])
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
        info=_info(index, episode, memoryview(buffers[-1])) if index.arrays["offset"][episode] >= 0 else {},
    )


def _info(index: EpisodeIndex, episode: int, data: memoryview) -> dict[str, Any]:
    """`info` of the sample's .json member, which must speak of this episode."""
    try:
        described = json.loads(bytes(data))
        if described["id"] != index.id(episode):
            raise ValueError(f"it is of episode {described['id']!r}")
        return dict(described["info"])
    except (ValueError, KeyError, TypeError) as error:
        shard = index.shard_name(int(index.shard[episode]))
        raise DataError(f"{shard}: the .json member of episode {index.id(episode)!r} is damaged: {error}") from None


def inspect(url: str, cache_dir: str = "") -> dict[str, Any]:
    """A summary of a dataset as JSON values: episodes, steps, bytes, tasks, and by task fields, lengths and returns."""
    index = EpisodeIndex.open(url, cache_dir)
    task = np.asarray(index.task)
    tasks = {}
    for number, spec in enumerate(index.tasks):
        mine = np.flatnonzero(task == number)
        known = index.success[mine] >= 0
        tasks[spec.name] = {
            "episodes": len(mine),
            "steps": int(index.steps[mine].sum(dtype=np.int64)),
            "environment": spec.environment,
            "lengths": _spread(index.steps[mine]),
            "returns": _spread(index.total_return[mine]),
            "success": float(index.success[mine][known].mean()) if known.any() else None,
            "fields": [f.name for f in spec.fields],
        }
    fields: dict[str, Any] = {}
    for spec in index.tasks:
        for field in spec.fields:
            described = {
                "role": field.role,
                "modality": field.modality,
                "dtype": field.dtype,
                "shape": list(field.shape),
            }
            fields.setdefault(field.name, {**described, "per": field.per, "tasks": 0})["tasks"] += 1
    return {
        "url": url,
        "episodes": index.episodes,
        "steps": int(index.steps.sum(dtype=np.int64)),
        "bytes": sum(s.size for s in index.shards),
        "shards": len(index.shards),
        "fingerprint": index.fingerprint,
        "tasks": tasks,
        "fields": fields,
        "quarantined": len(index.document.get("quarantine", [])),
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Extremes, mean and a histogram of 20 equal bins."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return {"min": None, "mean": None, "max": None, "histogram": [], "edges": []}
    counts, edges = np.histogram(finite, bins=20)
    low, mean, high = float(finite.min()), float(finite.mean()), float(finite.max())
    return {"min": low, "mean": mean, "max": high, "histogram": counts.tolist(), "edges": edges.tolist()}


def merge(urls: Sequence[str], destination: str) -> EpisodeIndex:
    """A dataset of the episodes of several. Its index points at their shards; no shard is copied, so they must stay.

    Raises DataError where one task's name stands for two things.
    """
    return _assemble([_Source(url) for url in urls], destination)


def append(url: str, sources: Sequence[str]) -> EpisodeIndex:
    """Add the episodes of other datasets to one, by reference."""
    return _assemble([_Source(url), *(_Source(s) for s in sources)], url)


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
    """A dataset of those episodes that meet every condition given; its index points at the shards of the first.

    tasks, agents            names or globs
    min_return, max_return   undiscounted return, inclusive
    top                      share in (0, 1] with the highest returns of each task, of what the other conditions leave
    success                  only episodes that are known to have succeeded
    min_steps, max_steps     actions of the episode, inclusive
    """
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
            raise ValueError(f"top is a share in (0, 1], not {top}")
        keep &= _top(index, keep, top)
    return _assemble([_Source(url, keep)], destination)


def split(url: str, first: str, second: str, share: float) -> tuple[EpisodeIndex, EpisodeIndex]:
    """Two datasets; `share` of the episodes go to the second one, by the hash of their ids: the same id goes the same way
    in every dataset. It is the rule of `EpisodeIndex.held_out`."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is in [0, 1], not {share}")
    chosen = EpisodeIndex.open(url).held_out(share)
    return _assemble([_Source(url, ~chosen)], first), _assemble([_Source(url, chosen)], second)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
    """bool [len(names)]: which match a pattern. Raises DataError for a pattern that matches none."""
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
    """Write a dataset whose index holds episodes of others. The statistics of a part are those of the whole that it is of."""
    from tiphys.dataio.storage import Store

    target = Store(destination)
    own = absolute(destination)
    if all(absolute(s.url) != own for s in sources) and exists(target, DATASET):
        raise FileExistsError(f"{destination} is a dataset already; choose another destination")
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
                shards[rename[shard.name]] = Shard(rename[shard.name], shard.size, shard.crc)
            parts.append(Part(file, source.keep, rename))
            broken = document.get("quarantine", [])
            quarantine += [q | {"shard": rename.get(q["shard"], q["shard"])} for q in broken]
            statistics.merge(Statistics.read(scratch / "statistics.parquet"))
            partial = partial or source.keep is not None or bool(document.get("statistics_of_superset"))
        used = _used(parts)
        combine(parts, scratch / INDEX, list(tasks.values()), [s for n, s in shards.items() if n in used])
        more: dict[str, Any] = {"quarantine": quarantine} if quarantine else {}
        if partial:
            more["statistics_of_superset"] = True
        publish(target, scratch / INDEX, statistics, **more)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EpisodeIndex.open(destination)


def _fetch_whole(url: str, file: Path, sketches: Path) -> dict[str, Any]:
    """Index and statistics of a dataset as local files; they must be those that its dataset.json names."""
    from tiphys.dataio.storage import Store

    store = Store(url)
    document = parse(store.read(DATASET), f"{url}/{DATASET}")
    if fetch(store, INDEX, file) != document["digests"][INDEX]:
        raise DataError(f"{url}/{INDEX} is not the one that {DATASET} names; run `tiphys verify --repair`")
    fetch(store, STATISTICS, sketches)
    return document


def _used(parts: Sequence[Part]) -> set[str]:
    """Names of the shards that the parts' episodes lie in."""
    used: set[str] = set()
    for part in parts:
        for batch in batches(part):
            used.update(batch.column("shard").unique().to_pylist())
    return used
