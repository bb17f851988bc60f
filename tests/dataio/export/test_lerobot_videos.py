"""A LeRobot export copies kept videos: the samples are the source's bytes, and each row shows the same picture as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.dataio import videos
from tests.dataio.inplace.made import CAMERAS, LENGTHS, source
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.export import export, lerobot_videos
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot

pytest.importorskip("av")
KEEP = {"fields": {"observation.images.*": {"encoding": "keep"}}}


def payloads(folder: Path, camera: str) -> list[list[bytes]]:
    files = sorted((folder / f"videos/{camera}").rglob("*.mp4"))
    return [[bytes(p) for p in videos.demuxed(file.read_bytes())[0]] for file in files]


def assert_same(found: EpisodeIndex, wanted: EpisodeIndex) -> None:
    assert list(found.ids) == list(wanted.ids)
    assert found.tasks == wanted.tasks
    for e in range(wanted.episodes):
        mine, theirs = read_episode(found, e).fields, read_episode(wanted, e).fields
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("inplace", [False, True])
def test_videos_are_copied_and_show_the_same_pictures(
    inplace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot = source(tmp_path / "robot")
    if inplace:
        index = index_lerobot(str(robot), str(tmp_path / "data"))
    else:
        convert(str(robot), str(tmp_path / "data"), mapping=KEEP, processes=1)
        index = EpisodeIndex.open(str(tmp_path / "data"))
    sizes = [f.stat().st_size for f in robot.rglob("*.mp4")]
    monkeypatch.setattr(lerobot_videos, "FILE_BYTES", sum(sizes) // len(CAMERAS) // 2)
    export(index.url, str(tmp_path / "out"), format="lerobot")
    listed = pq.read_table(tmp_path / "out/meta/episodes").to_pylist()
    for camera in CAMERAS:
        sources = {sample for file in payloads(robot, camera) for sample in file}
        copies = payloads(tmp_path / "out", camera)
        assert 1 < len(copies) < len(LENGTHS)
        assert all(sample in sources for file in copies for sample in file)
        for row in listed:
            begin, end = (row[f"videos/{camera}/{name}"] for name in ("from_timestamp", "to_timestamp"))
            assert end - begin == pytest.approx(row["length"] / 10)
    assert_same(index_lerobot(str(tmp_path / "out"), str(tmp_path / "again")), index)
    convert(str(tmp_path / "out"), str(tmp_path / "back"), mapping=KEEP, processes=1)
    assert_same(EpisodeIndex.open(str(tmp_path / "back")), index)


@pytest.mark.parametrize("codec", videos.CODECS)
def test_ffmpeg_decodes_an_export_from_the_first_to_the_last_picture(codec: str, tmp_path: Path) -> None:
    robot = source(tmp_path / "robot", codec, 6)
    index = index_lerobot(str(robot), str(tmp_path / "data"))
    export(index.url, str(tmp_path / "out"), format="lerobot")
    listed = pq.read_table(tmp_path / "out/meta/episodes").to_pylist()
    for camera in CAMERAS:
        files = sorted((tmp_path / f"out/videos/{camera}").rglob("*.mp4"))
        assert len(files) == 1 or codec == "libx265"  # whose key frames need not be decodable after other pictures
        tracks = [videos.track(file.read_bytes()) for file in files]
        pictures = [videos.decoded(file.read_bytes()) for file in files]
        for track in tracks:  # time · fps is the picture's number
            assert np.array_equal(np.sort(track.pts), np.arange(len(track)) * track.timescale // 10)
        for e, row in enumerate(listed):
            begin, file = (row[f"videos/{camera}/{name}"] for name in ("from_timestamp", "file_index"))
            times = [round((begin + i / 10) * tracks[file].timescale) for i in range(row["length"])]
            assert np.array_equal([pictures[file][t] for t in times], read_episode(index, e).fields[camera])


def test_pictures_that_lerobot_cannot_find_by_their_time_become_png(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    robot = source(tmp_path / "robot")
    file = robot / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    stamps = table["timestamp"].to_numpy().copy()
    stamps[3] = stamps[2]
    column = table.schema.names.index("timestamp")
    pq.write_table(table.set_column(column, "timestamp", [stamps]), file)
    index = index_lerobot(str(robot), str(tmp_path / "data"))
    with caplog.at_level("WARNING", "tiphys"):
        export(index.url, str(tmp_path / "out"), format="lerobot")
    assert "stored as PNG, because row 3 of episode 'robot/000000' does not show" in caplog.text
    assert not (tmp_path / "out/videos").exists()
    convert(str(tmp_path / "out"), str(tmp_path / "back"), processes=1)
    assert_same(EpisodeIndex.open(str(tmp_path / "back")), index)
