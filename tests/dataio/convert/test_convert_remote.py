"""Sources and destinations in a store give the same episodes. A failing store never makes a malformed episode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.dataio.convert.test_convert_formats import assert_same, read_all, reader
from tests.servers import moto_server, s3_environment
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.converter import BUILT_IN, converters, recognise
from tiphys.dataio.convert.process import _answer
from tiphys.dataio.convert.source import Source, SourceUnavailable
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.storage import Store


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto_server() as endpoint, s3_environment(endpoint):
        yield "s3://bucket"


def put(folder: Path, url: str) -> None:
    store = Store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(str(path.relative_to(folder)), str(path))


@pytest.mark.parametrize("name", ["lerobot-v3", "robomimic", "zarr.zarr"])
def test_a_source_in_a_store_gives_the_same_episodes(made: Any, bucket: str, name: str) -> None:
    source, format, expected = made(name)
    url = f"{bucket}/{source.name}"
    put(source, url)
    assert recognise(Source(url), converters()) == format
    found = read_all(reader(url, format))  # type: ignore[arg-type]
    assert sorted(found) == sorted(expected)
    for key, (_, fields) in expected.items():
        for field, wanted in fields.items():
            assert_same(found[key].fields[field], wanted, f"{key} {field}")


def test_a_single_file_in_a_store(made: Any, bucket: str) -> None:
    source, _, expected = made("robomimic")
    Store(f"{bucket}/single").upload("low_dim.hdf5", str(source / "low_dim.hdf5"))
    assert sorted(read_all(reader(f"{bucket}/single/low_dim.hdf5", "robomimic"))) == sorted(expected)  # type: ignore[arg-type]


def test_convert_from_store_to_store(made: Any, bucket: str) -> None:
    source, format, expected = made("npz")
    put(source, f"{bucket}/from/npz")
    report = convert(f"{bucket}/from/npz", f"{bucket}/to", processes=1)
    assert (report.format, report.episodes) == (format, len(expected))
    index = EpisodeIndex.open(f"{bucket}/to")
    for number in range(index.episodes):
        episode = read_episode(index, number)
        assert_same(episode.fields["action"], expected[episode.id][1]["action"], episode.id)
    assert convert(f"{bucket}/from/npz", f"{bucket}/to", processes=1) == report


def test_a_failing_store_does_not_make_a_bad_episode(made: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """h5py replaces an error of its stream by its own. If such episodes were skipped, data would be lost silently."""
    source, _, _ = made("robomimic")
    url = f"{bucket}/failing"
    put(source, url)
    piece = reader(url, "robomimic").pieces()[0]  # type: ignore[arg-type]
    request = {
        "source": url,
        "target": BUILT_IN["robomimic"],
        "options": {},
        "fields": {},
        "operation": "episodes",
        "piece": asdict(piece),
        "start": 0,
    }
    original, reads_left = Store.read_ranges, 0

    def read_ranges(self: Store, *args: Any) -> Any:
        nonlocal reads_left
        reads_left -= 1
        if reads_left < 0:
            raise OSError("503 Slow Down")
        return original(self, *args)

    monkeypatch.setattr(Store, "read_ranges", read_ranges)
    for allowed in (0, 1):
        reads_left = allowed
        with pytest.raises(SourceUnavailable, match="503"):
            _answer(request, BytesIO())
