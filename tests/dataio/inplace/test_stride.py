"""Of a field that is shown at every n-th step only, no other groups of pictures are fetched or decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.inplace.made import LENGTHS, make_plan, source
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Needs
from tiphys.dataio.format import packets
from tiphys.dataio.format.places import Range
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import IndexOptions, index_lerobot
from tiphys.dataio.loading.assemble import Assembler
from tiphys.dataio.loading.gather import copy_from
from tiphys.dataio.loading.units import UnitMap

TOP, WRIST = "observation.images.top", "observation.images.wrist"
STRIDE = 4


def windows(index: EpisodeIndex, needs: Needs) -> tuple[list[Any], set[int], Any]:
    """The windows of a step, made of the units that they need and nothing else."""
    units, planned = UnitMap([index], [needs], 2), make_plan(index).windows(0)
    spans = units.spans(planned)
    ranges = [units.ranges(span.units) for span in spans]
    data = {}
    for span, where in zip(spans, ranges, strict=True):
        for unit, shard, offset, size in zip(span.units.tolist(), where.shard, where.offset, where.size, strict=True):
            data[unit] = memoryview(index.read([Range(int(shard), int(offset), int(size), "")])[0])
    made = Assembler(units).windows(planned, spans, ranges, copy_from(data.__getitem__))
    for one in made:
        if isinstance(one, DataError):
            raise one
    return made, set(data), planned


def test_other_groups_are_neither_fetched_nor_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_lerobot(str(source(tmp_path / "robot", gop=2)), str(tmp_path / "indexed"), IndexOptions(crc=True))
    fields = ("action", TOP, WRIST)
    decoded = []
    decode = packets.decode

    def counted(stream: Any, payloads: Any, pts: Any, wanted: Any, *more: Any) -> Any:
        decoded.append(len(wanted))
        return decode(stream, payloads, pts, wanted, *more)

    monkeypatch.setattr(packets, "decode", counted)
    full, every, _ = windows(index, Needs(fields))
    groups = np.count_nonzero(decoded)
    decoded.clear()
    some, fewer, _ = windows(index, Needs(fields, strides=((TOP, STRIDE),)))
    assert len(fewer) < 0.85 * len(every)
    assert np.count_nonzero(decoded) < 0.85 * groups
    for one, other in zip(some, full, strict=True):
        shown = one.step % STRIDE == 0
        assert np.array_equal(one.fields[TOP][shown], other.fields[TOP][shown])
        assert not one.fields[TOP][~shown].any()
        assert np.array_equal(one.fields[WRIST], other.fields[WRIST])
        assert np.array_equal(one.fields["action"], other.fields["action"])


def test_any_window_and_stride_gives_the_needed_rows(tmp_path: Path) -> None:
    index = index_lerobot(str(source(tmp_path / "robot", gop=5)), str(tmp_path / "indexed"))
    whole = [read_episode(index, e).fields[TOP] for e in range(index.episodes)]
    rng = np.random.default_rng(0)
    for _ in range(40):
        e, stride = int(rng.integers(index.episodes)), int(rng.integers(1, 9))
        start = int(rng.integers(LENGTHS[e]))
        rows = int(rng.integers(1, LENGTHS[e] - start + 1))
        data = index.read(index.ranges(e, start, rows, [TOP]))
        got = index.decode(e, start, rows, [TOP], data, strides={TOP: stride})["fields"][TOP]
        shown = np.arange(start, start + rows) % stride == 0
        assert np.array_equal(got[shown], whole[e][start : start + rows][shown])
        assert not got[~shown].any()
