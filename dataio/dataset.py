"""What one does with a whole dataset: read an episode back, look at it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dataio.episode import DataError, Episode
from dataio.index import EpisodeIndex
from dataio.rows import ONLY_WITH_ACTION


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
