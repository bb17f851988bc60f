"""Places of video samples in an index: whatever numbers it holds, it is refused or gives pictures, and nothing else happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataio.inplace.made import FIELDS, LENGTHS, source
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays
from tiphys.dataio.format.packet_table import PacketTable
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.storage import StoreError

TOP = "observation.images.top"
# those of which a file has the numbers: bounds and streams are made when it is decoded
PARTS = [f"packets.{TOP}~{name}" for name in PacketTable._fields if not name.endswith(("first", "bytes"))]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EpisodeIndex:
    folder = tmp_path_factory.mktemp("robot")
    return index_lerobot(str(source(folder / "robot")), str(folder / "indexed"))


def test_rows_are_found_in_their_chunks(index: EpisodeIndex) -> None:
    table = index.packets(TOP)
    assert table is not None
    for episode, length in enumerate(LENGTHS):
        first, end = (int(x) for x in table.first[episode : episode + 2])
        rows = np.arange(length)
        chunk = table.chunk_of(np.full(length, episode), rows)
        assert np.array_equal(chunk, first + np.searchsorted(table.row[first:end], rows, side="right") - 1)
        assert [c.rows for c in index.chunks(episode, index.tasks[0].field(TOP), 0, length)] == np.bincount(
            chunk - first
        ).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.sampled_from(PARTS),
    place=st.integers(0, 10_000),
    value=st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 40),
)
def test_any_number_is_refused_or_gives_pictures(index: EpisodeIndex, part: str, place: int, value: int) -> None:
    changed = dict(index._arrays)
    if not len(changed[part]):
        return
    changed[part] = changed[part].copy()
    changed[part][place % len(changed[part])] = np.array(value).astype(changed[part].dtype)
    try:
        arrays.check(changed, index.tasks, index.shards, "index")
    except DataError:
        return
    other = EpisodeIndex(index.url, index.document, changed, "changed")
    for episode, length in enumerate(LENGTHS):
        try:
            got = _decoded(other, episode, length)
        except (DataError, StoreError):
            continue
        assert got.shape == (length, 64, 64, 3)


def _decoded(index: EpisodeIndex, episode: int, length: int) -> Any:
    ranges = index.ranges(episode, 0, length, FIELDS)
    return index.decode(episode, 0, length, FIELDS, index.read(ranges))["fields"][TOP]
