"""Every JSON of a dataset and of its exports is valid, also if the data hold NaN and infinities, and nothing of these is lost."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode, verify
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.export import export
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter

TASK = TaskSpec(
    "wild",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (2,), (-np.inf, 0.0), (np.inf, np.inf)),
        FieldSpec("goal", "info", "continuous", "float32", (3,), per="episode"),
        FieldSpec("action", "action", "continuous", "float64", (1,)),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EpisodeIndex:
    url = str(tmp_path_factory.mktemp("data") / "set")
    with ShardWriter(url, [TASK]) as writer:
        for number in range(3):
            fields: dict[str, Any] = {
                "observation": np.full((4, 2), [np.nan, np.inf], np.float32),
                "goal": np.array([np.nan, -np.inf, number], np.float32),
                "action": np.full((4, 1), 1e300),  # squares overflow
                "reward": np.array([0, np.nan, np.inf, 1], np.float32),
            }
            writer.write(
                Episode(f"e{number}", "wild", fields, 4, info={"score": float("nan"), "best": np.float32(np.inf)})
            )
    return EpisodeIndex.open(url)


def documents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every JSON text in a folder: files, members of tars, metadata of Parquet files."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        if file.suffix == ".json":
            yield file.name, file.read_bytes()
        elif file.suffix == ".jsonl":
            yield from ((file.name, line) for line in file.read_bytes().splitlines())
        elif file.suffix == ".tar":
            with tarfile.open(file) as tar:
                yield from ((m.name, tar.extractfile(m).read()) for m in tar if m.name.endswith(".json"))  # type: ignore[union-attr]
        elif file.suffix == ".parquet":
            metadata = pq.read_metadata(file).metadata or {}
            yield from ((f"{file.name}:{k!r}", v) for k, v in metadata.items() if v.startswith(b"{"))


def refuse(word: str) -> None:
    raise ValueError(word)


def assert_valid(folder: Path, least: int) -> None:
    found = list(documents(folder))
    assert len(found) >= least
    for name, text in found:
        try:
            json.loads(text, parse_constant=refuse)
        except ValueError as error:
            pytest.fail(f"{name}: {error}")


def test_a_dataset(index: EpisodeIndex):
    assert_valid(Path(index.url), 5)
    assert index.tasks == (TASK,)
    found = read_episode(index, 1)
    assert np.array_equal(found.fields["goal"], np.array([np.nan, -np.inf, 1], np.float32), equal_nan=True)
    assert found.info == {"score": "NaN", "best": "Infinity"}
    assert np.isfinite(index.statistics["wild"]["action"].std).all()


def test_an_index_that_is_made_again_has_the_same_values(index: EpisodeIndex, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(index.url, copy)
    (copy / "index.parquet").unlink()
    verify(str(copy), repair=True)
    again = EpisodeIndex.open(str(copy))
    assert_valid(copy, 5)
    found = read_episode(again, 2).fields["goal"]
    assert np.array_equal(found, np.array([np.nan, -np.inf, 2], np.float32), equal_nan=True)


@pytest.mark.parametrize("format", ["npz", "lerobot"])
def test_an_export(index: EpisodeIndex, tmp_path: Path, format: str):
    export(index.url, str(tmp_path / "out"), format=format)
    assert_valid(tmp_path / "out", 1)
    convert(str(tmp_path / "out"), str(tmp_path / "back"), format=format)
    found = read_episode(EpisodeIndex.open(str(tmp_path / "back")), 2).fields["goal"]
    assert np.array_equal(found, np.array([np.nan, -np.inf, 2], np.float32), equal_nan=True)
