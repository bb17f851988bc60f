"""Indexes and statistics that claim to hold much more than they have bytes are refused, and this process stays small."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c

from tests.dataio.making import SMALL, small_dataset
from tiphys.dataio.dataset import index_foreign, merge, verify
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import limited, table
from tiphys.dataio.format.document import INDEX, STATISTICS, sha256
from tiphys.dataio.format.tar import samples
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import merge_pieces


@contextmanager
def staying_small() -> Iterator[None]:
    """Fails if this process, at any moment of the block, has 500 MiB more than at its start."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size of earlier tests
    before = _largest()
    yield
    assert _largest() - before < 500


def _largest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10


def rows(count: int) -> pa.Table:
    """An index of `count` equal episodes, which takes few bytes as a file."""
    one = table._table([table.Record("e", "small", 2, 2, 0.0, "shards/000000.tar", 0, 100, 0)])
    return one.take(pa.array(np.zeros(count, np.int64)))


@pytest.fixture
def bomb(tmp_path: Path) -> str:
    """A dataset whose small index holds texts of 3 GiB: one of 100 KB, 30,000 times."""
    url = str(tmp_path / "bomb")
    small_dataset(url, 3)
    count = 30_000
    content = rows(count)
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * 100_000]))
    file = Path(url) / INDEX
    metadata = pq.read_metadata(file).metadata[b"tiphys"]
    schema = content.schema.append(pa.field("text.mission", text.type))
    with pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer:  # read again, it is a string
        writer.write_table(content.append_column("text.mission", text))
        writer.add_key_value_metadata({"tiphys": metadata.decode(), "tiphys.crc32c": str(crc32c(metadata))})
    assert file.stat().st_size < 1 << 20
    document = json.loads((Path(url) / "dataset.json").read_text())
    document["digests"][INDEX] = sha256(file)
    (Path(url) / "dataset.json").write_text(json.dumps(document))
    return url


def opened(url: str) -> Any:
    return EpisodeIndex.open(url, url + "-cache")


def merged(url: str) -> Any:
    return merge([url], url + "-merged")


@pytest.mark.parametrize("use", [opened, merged])
def test_a_bomb_in_an_index_is_refused(bomb: str, use: Callable[[str], Any]) -> None:
    with staying_small(), pytest.raises(DataError, match=r"index\.parquet"):
        use(bomb)


def test_verify_reports_a_bomb(bomb: str) -> None:
    with staying_small():
        assert any(f.kind == "index" for f in verify(bomb).findings)


def change_statistics(url: str, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = Path(url) / name
    content = pq.read_table(file)
    found = content.to_pylist()
    change(found[0])
    pq.write_table(pa.Table.from_pylist(found, content.schema), file)
    if name == STATISTICS:
        document = json.loads((Path(url) / "dataset.json").read_text())
        document["digests"][STATISTICS] = sha256(file)
        (Path(url) / "dataset.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "values",
    [
        {"shape": [2**31 - 1, 3], "mean": [], "square": [], "min": [], "max": []},
        {"shape": [-1]},
        {"mean": []},
        {"count": -5},
        {"cell_keys": [5, 4], "cell_counts": [1, 1]},
        {"cell_counts": None},
        {"task": None, "shape": None},
        {"task": None},
        {"field": None},
    ],
)
def test_statistics_that_are_not_possible_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    url = str(tmp_path / "d")
    small_dataset(url, 3)
    change_statistics(url, STATISTICS, lambda row: row.update(values))
    with pytest.raises(DataError, match=r"statistics\.parquet"):
        merge([url], str(tmp_path / "m"))


def test_pieces_are_checked_too(tmp_path: Path) -> None:
    url = str(tmp_path / "d")
    from tests.dataio.making import random_episode
    from tiphys.dataio.shards import ShardWriter

    with ShardWriter(url, [SMALL], piece="a") as writer:
        writer.write(random_episode(SMALL, "e", 3, np.random.default_rng(0)))
    change_statistics(url, "pieces/a.statistics.parquet", lambda row: row.update(shape=[2**31 - 1, 3], mean=[]))
    with pytest.raises(DataError, match=r"a\.statistics\.parquet"):
        merge_pieces(url)


@pytest.mark.parametrize("name", [INDEX, STATISTICS])
def test_merge_compares_the_digests(tmp_path: Path, name: str) -> None:
    url = str(tmp_path / "d")
    small_dataset(url, 3)
    file = Path(url) / name
    content = pq.read_table(file).replace_schema_metadata({"x": "y"})
    pq.write_table(content, file)
    with pytest.raises(DataError, match=f"{name} does not have the SHA-256"):
        merge([url], str(tmp_path / "m"))


def test_tars_are_parsed_in_the_reader_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, foreign = str(tmp_path / "d"), tmp_path / "foreign"
    small_dataset(url, 3)
    foreign.mkdir()
    with tarfile.open(foreign / "0.tar", "w") as tar:
        for name, content in (("a.png", b"\x89PNG\r\n\x1a\n"), ("a.txt", b"a picture")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (Path(url) / INDEX).unlink()  # so that --repair makes it from the tars

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tar was opened in this process")

    monkeypatch.setattr(tarfile, "open", refuse)
    assert verify(url, repair=True).repairs
    assert verify(url).ok
    assert index_foreign(str(foreign)).episodes == 1


def test_samples_in_the_reader_process_are_those_of_the_tar(tmp_path: Path) -> None:
    url = str(tmp_path / "d")
    small_dataset(url, 5)
    (file,) = (Path(url) / "shards").iterdir()
    assert list(limited.samples(file)) == list(samples(file))
    file.write_bytes(file.read_bytes()[: -(12 << 10)])
    read = limited.samples(file)
    assert next(read).begin == 0
    with pytest.raises(DataError, match="cut off"):
        list(read)
