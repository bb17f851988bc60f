"""Shared by the tests of the loader: a small dataset, and batches that are digests of their windows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec, Window
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import LoadedBatch
from tiphys.dataio.shards import ShardWriter

CONTROL = TaskSpec(
    "reach",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (7,)),
        FieldSpec("action", "action", "continuous", "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
        FieldSpec("reward", "reward", "continuous", "float32"),
        FieldSpec("instruction", "text", "text", "str", per="episode"),
    ),
)
PICTURES = TaskSpec(
    "look",
    (
        FieldSpec("observation.image", "observation", "image", "uint8", (12, 10, 3)),
        FieldSpec("observation.wrist", "observation", "image", "uint8", (5, 4, 3)),
        FieldSpec("observation.state", "observation", "continuous", "float32", (3,)),
        FieldSpec("action", "action", "discrete", "int64", (), values=5),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


def episode(number: int, task: TaskSpec, rng: np.random.Generator) -> Episode:
    steps = int(rng.integers(5, 60))
    fields: dict[str, Any] = {}
    for spec in task.fields:
        rows = steps + (spec.role == "observation")
        if spec.per == "episode":
            fields[spec.name] = f"do {number % 7}"
        elif spec.dtype == "float32":
            fields[spec.name] = rng.uniform(-1, 1, (rows, *spec.shape)).astype(np.float32)
        else:
            fields[spec.name] = rng.integers(0, spec.values or 256, (rows, *spec.shape)).astype(spec.dtype)
    return Episode(f"{task.name}-{number:05d}", task.name, fields, steps)


def dataset(
    url: str, episodes: int = 60, tasks: tuple[TaskSpec, ...] = (CONTROL, PICTURES), seed: int = 0
) -> EpisodeIndex:
    """A dataset of several small shards."""
    rng = np.random.default_rng(seed)
    with ShardWriter(url, tasks, shard_bytes=200_000, encodings={"observation.wrist": Encoding("raw")}) as writer:
        for number in range(episodes):
            writer.write(episode(number, tasks[number % len(tasks)], rng))
    return EpisodeIndex.open(url)


def digest_batch(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    """A batch of fingerprints of the windows: two batches are equal if and only if their windows are equal."""
    digests = [hashlib.sha256("".join(map(window_text, row)).encode()).digest() for row in windows]
    names = sorted({w.episode for row in windows for w in row})
    return {
        "row": np.asarray(rows, np.int64),
        "digest": np.frombuffer(b"".join(digests), np.uint8).reshape(len(rows), -1),
        "windows": np.array([len(row) for row in windows]),
        "episodes": np.array(names or [""]).view(np.uint8).copy(),
    }


def window_text(window: Window) -> str:
    """All that a window holds, as one line of text."""
    parts = [
        repr((window.entry, window.task, window.episode, window.start, window.steps, window.prompt, window.tokens))
    ]
    for name, value in sorted(window.fields.items()):
        parts.append(
            name + (value if isinstance(value, str) else hashlib.sha256(np.asarray(value).tobytes()).hexdigest())
        )
    for array in (window.step, window.returns_to_go, window.valid):
        parts.append(hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())
    return "|".join(parts)


def copied(batch: LoadedBatch) -> LoadedBatch:
    """A copy of a batch with its own arrays. The batch itself is released."""
    arrays = {name: array.copy() for name, array in batch.arrays.items()}
    batch.release()
    return LoadedBatch(step=batch.step, arrays=arrays, counters=batch.counters, quarantined=batch.quarantined)
