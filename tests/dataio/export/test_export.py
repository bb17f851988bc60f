"""Export followed by convert gives the same dataset, and the formats' own libraries can read the export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.dtypes import StringDType

from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.export import FORMATS, export
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter

ROBOT = TaskSpec(
    "robots/pick up",
    (
        FieldSpec("observation.image", "observation", "image", "uint8", (20, 24, 3)),
        FieldSpec("observation.grey", "observation", "image", "uint8", (20, 24, 1)),
        FieldSpec("observation", "observation", "continuous", "float64", (3,), (-1.0,), (1.0,)),
        FieldSpec("observation.said", "text", "text", "str"),
        FieldSpec("joints", "observation", "continuous", "float16", (2, 2)),
        FieldSpec("action.move", "action", "continuous", "float32", (2,), (-1.0, -2.0), (1.0, 2.0)),
        FieldSpec("action.grip", "action", "discrete", "int64", (), values=3),
        FieldSpec("reward", "reward", "continuous", "float32"),
        FieldSpec("terminated", "terminated", "discrete", "bool", values=2),
        FieldSpec("instruction", "text", "text", "str", per="episode"),
        FieldSpec("info.flag", "info", "discrete", "bool", values=2),
        FieldSpec("info.pose", "info", "continuous", "float32", (4,), per="episode"),
    ),
    environment="robots/x",
    random=-1.5,
    expert=20.0,
    max_steps=50,
)
PLAIN = TaskSpec(
    "plain",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (4,)),
        FieldSpec("action", "action", "discrete", "int64", (), values=2),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


def robot_episode(number: int, steps: int, last: bool) -> Episode:
    r = np.random.default_rng(number)
    seen = steps + last
    fields: dict[str, Any] = {
        "observation.image": r.integers(0, 256, (seen, 20, 24, 3), np.uint8),
        "observation.grey": r.integers(0, 256, (seen, 20, 24, 1), np.uint8),
        "observation": r.normal(size=(seen, 3)),
        "observation.said": np.array([f"ü{i}\n" * (i % 3) for i in range(seen)], dtype=StringDType()),
        "joints": r.normal(size=(steps, 2, 2)).astype(np.float16),
        "action.move": r.normal(size=(steps, 2)).astype(np.float32),
        "action.grip": r.integers(0, 3, steps),
        "reward": r.normal(size=steps).astype(np.float32),
        "terminated": np.arange(steps) == steps - 1,
        "instruction": f"pick {number}",
        "info.flag": r.integers(0, 2, steps).astype(bool),
        "info.pose": r.normal(size=4).astype(np.float32),
    }
    return Episode(
        f"e/{number}",
        ROBOT.name,
        fields,
        steps,
        success=[True, False, None][number % 3],
        agent="me",
        info={"n": [number]},
    )


def plain_episode(number: int, steps: int) -> Episode:
    r = np.random.default_rng(number)
    fields = {
        "observation": r.normal(size=(steps + 1, 4)).astype(np.float32),
        "action": r.integers(0, 2, steps),
        "reward": np.ones(steps, np.float32),
    }
    return Episode(f"p{number}", "plain", fields, steps)


def dataset(folder: Path, tasks: tuple[TaskSpec, ...], episodes: list[Episode]) -> dict[str, Episode]:
    with ShardWriter(str(folder), tasks) as writer:
        for episode in episodes:
            writer.write(episode)
    return read(folder)


def read(folder: Path) -> dict[str, Episode]:
    index = EpisodeIndex.open(str(folder))
    return {index.id(e): read_episode(index, e) for e in range(index.episodes)}


def assert_equal(found: dict[str, Episode], wanted: dict[str, Episode]) -> None:
    assert list(found) == list(wanted)
    for key, a in wanted.items():
        b = found[key]
        assert (b.task, b.steps, b.success, b.agent, dict(b.info)) == (
            a.task,
            a.steps,
            a.success,
            a.agent,
            dict(a.info),
        )
        assert set(b.fields) == set(a.fields)
        for name, value in a.fields.items():
            if isinstance(value, str):
                assert b.fields[name] == value
            else:
                assert np.asarray(b.fields[name]).dtype == np.asarray(value).dtype
                np.testing.assert_array_equal(np.asarray(b.fields[name]), np.asarray(value), err_msg=name)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_export_and_convert_back(format: str, tmp_path: Path) -> None:
    wanted = dataset(
        tmp_path / "a",
        (ROBOT,),
        [robot_episode(i, s, last) for i, (s, last) in enumerate([(5, True), (1, False), (7, True)])],
    )
    report = export(str(tmp_path / "a"), str(tmp_path / "out"), format=format)
    assert report.episodes == 3
    back = convert(str(tmp_path / "out"), str(tmp_path / "b"), processes=1)
    assert (back.format, back.episodes) == (format, 3)
    assert_equal(read(tmp_path / "b"), wanted)
    before, after = (EpisodeIndex.open(str(tmp_path / n)).tasks for n in "ab")
    assert before == after


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=3),
    format=st.sampled_from(sorted(FORMATS)),
)
def test_export_and_convert_back_with_any_lengths(
    shapes: list[tuple[int, bool]], format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    wanted = dataset(folder / "a", (ROBOT,), [robot_episode(i, s, last) for i, (s, last) in enumerate(shapes)])
    export(str(folder / "a"), str(folder / "out"), format=format)
    convert(str(folder / "out"), str(folder / "b"), format=format, processes=1)
    assert_equal(read(folder / "b"), wanted)


def test_several_tasks_become_several_folders(tmp_path: Path) -> None:
    wanted = dataset(
        tmp_path / "a", (ROBOT, PLAIN), [robot_episode(0, 3, True), plain_episode(0, 4), plain_episode(1, 2)]
    )
    for format in ("minari", "lerobot"):
        report = export(str(tmp_path / "a"), str(tmp_path / format), format=format)
        assert report.folders == ("robots-pick-up", "plain")
        convert(str(tmp_path / format / "plain"), str(tmp_path / f"{format}-back"), processes=1)
        assert_equal(read(tmp_path / f"{format}-back"), {k: v for k, v in wanted.items() if v.task == "plain"})
    export(str(tmp_path / "a"), str(tmp_path / "npz"), format="npz")
    convert(str(tmp_path / "npz"), str(tmp_path / "npz-back"), processes=1)
    assert_equal(read(tmp_path / "npz-back"), wanted)


def test_minari_library_reads_the_export(tmp_path: Path) -> None:
    from minari import MinariDataset

    episodes = [robot_episode(i, 4 + i, True) for i in range(2)]
    dataset(tmp_path / "a", (ROBOT,), episodes)
    export(str(tmp_path / "a"), str(tmp_path / "out"), format="minari")
    found = MinariDataset(tmp_path / "out/data")
    assert found.total_episodes == 2
    assert found.total_steps == 9
    for ours, theirs in zip(episodes, found.iterate_episodes(), strict=True):
        np.testing.assert_array_equal(theirs.rewards, ours.fields["reward"])
        np.testing.assert_array_equal(theirs.observations["image"], ours.fields["observation.image"])
        np.testing.assert_array_equal(theirs.actions["move"], ours.fields["action.move"])
        assert list(theirs.observations["said"]) == [str(t) for t in ours.fields["observation.said"]]
        assert found.observation_space["image"].contains(theirs.observations["image"][0])
        assert found.action_space["grip"].contains(theirs.actions["grip"][0])


def test_pyarrow_and_pillow_read_the_lerobot_export(tmp_path: Path) -> None:
    """LeRobot cannot be installed with this version of torch; its own code also reads with pyarrow and Pillow."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    episodes = [robot_episode(i, 4 + i, True) for i in range(2)]
    dataset(tmp_path / "a", (ROBOT,), episodes)
    export(str(tmp_path / "a"), str(tmp_path / "out"), format="lerobot", fps=20)
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_episodes"], info["total_frames"]) == ("v3.0", 20, 2, 11)
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    assert set(info["features"]) == set(table.column_names)
    listed = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for episode, row in zip(episodes, listed, strict=True):
        part = table.slice(row["dataset_from_index"], row["length"])
        assert row["tasks"] == [episode.fields["instruction"]]
        steps = episode.steps
        moves = np.array(part.column("action.move").to_pylist(), np.float32)
        np.testing.assert_array_equal(moves[:steps], episode.fields["action.move"])
        assert part.column("valid").to_pylist() == [True] * steps + [False]
        first = Image.open(io.BytesIO(part.column("observation.image")[0].as_py()["bytes"]))
        np.testing.assert_array_equal(np.array(first), episode.fields["observation.image"][0])
        np.testing.assert_allclose(part.column("timestamp").to_pylist(), np.arange(steps + 1) / 20, rtol=1e-6)
    statistics = json.loads((tmp_path / "out/meta/stats.json").read_text())
    everything = np.concatenate([e.fields["observation"] for e in episodes])
    np.testing.assert_allclose(statistics["observation.state"]["mean"], everything.mean(0))
    np.testing.assert_allclose(statistics["observation.state"]["std"], everything.std(0))
    assert np.shape(statistics["observation.image"]["mean"]) == (3, 1, 1)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    captions = TaskSpec("captions", (FieldSpec("text", "text", "text", "str", per="episode"),))
    dataset(tmp_path / "a", (captions,), [Episode("c", "captions", {"text": "hello"}, 0)])
    with pytest.raises(DataError, match="no observations or no actions"):
        export(str(tmp_path / "a"), str(tmp_path / "m"), format="minari")
    assert not os.path.exists(tmp_path / "m/data/metadata.json")
    with pytest.raises(DataError, match="known: minari, lerobot, npz"):
        export(str(tmp_path / "a"), str(tmp_path / "m"), format="csv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        export(str(tmp_path / "a"), str(tmp_path / "full"), format="npz")
    export(str(tmp_path / "a"), str(tmp_path / "n"), format="npz")
    convert(str(tmp_path / "n"), str(tmp_path / "b"), processes=1)
    assert read(tmp_path / "b")["c"].fields == {"text": "hello"}
