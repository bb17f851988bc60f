"""Episodes and datasets for the tests of the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.rows import ONLY_WITH_ACTION
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter

RICH = TaskSpec(
    "rich",
    (
        FieldSpec("observation.state", "observation", "continuous", "float32", (5,)),
        FieldSpec("observation.grid", "observation", "discrete", "uint8", (3, 3), values=7),
        FieldSpec("observation.image", "observation", "image", "uint8", (8, 6, 3)),
        FieldSpec("observation.depth", "observation", "image", "float32", (4, 4), (-5.0,), (5.0,)),
        FieldSpec("observation.wide", "observation", "continuous", "float64", (600,)),
        FieldSpec("speech", "text", "text", "str"),
        FieldSpec("mission", "text", "text", "str", per="episode"),
        FieldSpec("goal", "info", "continuous", "float32", (2,), per="episode"),
        FieldSpec("action", "action", "continuous", "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
        FieldSpec("gripper", "action", "discrete", "int64", (), values=3),
        FieldSpec("reward", "reward", "continuous", "float32"),
        FieldSpec("terminated", "terminated", "discrete", "bool"),
    ),
    environment="rich-v0",
    random=0.0,
    expert=10.0,
)
SMALL = TaskSpec(
    "small",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (3,)),
        FieldSpec("action", "action", "discrete", "int32", (), values=4),
        FieldSpec("reward", "reward", "continuous", "float64"),
        FieldSpec("mission", "text", "text", "str", per="episode"),
    ),
)
CAPTION = TaskSpec(
    "captions",
    (
        FieldSpec("image", "observation", "image", "uint8", (5, 9, 3)),
        FieldSpec("text", "text", "text", "str", per="episode"),
    ),
)
WORDS = ("go", "näher", 'a "quoted" \\ word', "", "火\n, [,] ,")


def random_field(field: FieldSpec, rows: int, rng: np.random.Generator) -> Any:
    """Random values of a field: [rows, *shape], or one value for the whole episode."""
    shape = field.shape if field.per == "episode" else (rows, *field.shape)
    if field.dtype == "str":
        words = rng.choice(np.array(WORDS, dtype=np.dtypes.StringDType()), shape)
        return str(words) if field.per == "episode" else words
    if field.dtype == "bool":
        return rng.random(shape) < 0.5
    if field.dtype.startswith("float"):
        return rng.normal(size=shape).astype(field.dtype)
    return rng.integers(0, field.values or 256, shape).astype(field.dtype)


def random_episode(
    task: TaskSpec, name: str, steps: int, rng: np.random.Generator, extra: Sequence[str] = ()
) -> Episode:
    """An episode of T = `steps` actions. The observed fields in `extra` have T + 1 rows."""
    fields = {}
    for field in task.fields:
        more = field.name in extra and field.role not in ONLY_WITH_ACTION
        fields[field.name] = random_field(field, steps + int(more), rng)
    success = [None, True, False][int(rng.integers(3))]
    return Episode(name, task.name, fields, steps, success, agent=f"agent-{rng.integers(2)}", info={"seed": name})


def observed(task: TaskSpec) -> list[str]:
    """Names of the fields that may have a value after the last action."""
    return [f.name for f in task.fields if f.per == "step" and f.role not in ONLY_WITH_ACTION]


def write(url: str, episodes: Sequence[Episode], tasks: Sequence[TaskSpec], **options: Any) -> EpisodeIndex:
    with ShardWriter(url, tasks, **options) as writer:
        for episode in episodes:
            writer.write(episode)
    return EpisodeIndex.open(url)


def small_dataset(url: str, count: int = 30, seed: int = 0, **options: Any) -> tuple[list[Episode], EpisodeIndex]:
    """A dataset of `count` episodes of the task `small`, with a few episodes in each shard."""
    rng = np.random.default_rng(seed)
    episodes = [random_episode(SMALL, f"s{seed}-{i}", int(rng.integers(1, 12)), rng) for i in range(count)]
    return episodes, write(url, episodes, [SMALL], **{"shard_bytes": 16 << 10} | options)


def read_window(index: EpisodeIndex, episode: int, start: int, rows: int, fields: Sequence[str]) -> Mapping[str, Any]:
    """Read a window as a loader does: its ranges, their bytes, then decode."""
    ranges = index.ranges(episode, start, rows, fields)
    buffers = [index.store.read_ranges(index.shard_name(r.shard), [r.offset], [r.size])[0] for r in ranges]
    return index.decode(episode, start, rows, fields, buffers)


def assert_equal_fields(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if isinstance(value, str):
            assert got[name] == value, name
        else:
            assert got[name].shape == np.shape(value), name
            assert np.array_equal(got[name], value), name
