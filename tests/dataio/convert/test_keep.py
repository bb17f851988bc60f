"""`encoding: keep`: an episode's video is a copy of the source's samples, playable, and read like stored pictures."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio import videos
from tests.dataio.convert.convert_sources import LENGTHS, lerobot_v2, lerobot_v3, npz
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.mapping import Mapping
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.chunks import Video
from tiphys.dataio.inplace.kept import KeptVideo, keep
from tiphys.dataio.upkeep.verify import verify

pytest.importorskip("av")
CAMERA = "observation.images.top"
KEEP = {"fields": {"observation.images.*": {"encoding": "keep"}}}


def kept_videos(index: EpisodeIndex) -> list[bytes]:
    """The member KEY.FIELD.mp4 of each episode, as the webdataset library reads it."""
    import webdataset as wds

    found = []
    for number in range(len(index.shards)):
        path = f"{index.url}/{index.shard_name(number)}"
        found += [bytes(s[f"{CAMERA}.mp4"]) for s in wds.WebDataset(path, shardshuffle=False, empty_check=False)]
    return found


@pytest.mark.parametrize("make", [lerobot_v2, lerobot_v3])
def test_a_kept_video_has_the_bytes_of_the_source_and_the_pictures_of_a_lossless_conversion(make, tmp_path: Path):
    make(tmp_path / "src")
    convert(str(tmp_path / "src"), str(tmp_path / "keep"), mapping=KEEP, processes=1)
    convert(
        str(tmp_path / "src"), str(tmp_path / "png"), mapping={"fields": {CAMERA: {"encoding": "png"}}}, processes=1
    )
    index, lossless = EpisodeIndex.open(str(tmp_path / "keep")), EpisodeIndex.open(str(tmp_path / "png"))
    assert list(index.ids) == list(lossless.ids)
    assert np.array_equal(index.steps, lossless.steps)
    for number in range(index.episodes):
        one, other = read_episode(index, number), read_episode(lossless, number)
        assert one.fields.keys() == other.fields.keys()
        for name, value in one.fields.items():
            assert np.array_equal(value, other.fields[name]), name
    sources = [p.read_bytes() for p in sorted((tmp_path / "src/videos").rglob("*.mp4"))]
    samples = [bytes(p) for data in sources for p in videos.demuxed(data)[0]]
    copies = kept_videos(index)
    assert len(copies) == len(LENGTHS)
    for data in copies:
        assert all(bytes(p) in samples for p in videos.demuxed(data)[0])
    assert sorted(len(videos.decoded(data)) for data in copies) == sorted(LENGTHS)
    assert not verify(str(tmp_path / "keep"), full=True).findings


def test_an_index_is_made_again_from_kept_videos(tmp_path: Path):
    lerobot_v3(tmp_path / "src")
    convert(str(tmp_path / "src"), str(tmp_path / "keep"), mapping=KEEP, processes=1)
    before = {n: read_episode(EpisodeIndex.open(str(tmp_path / "keep")), n).fields[CAMERA] for n in range(len(LENGTHS))}
    shutil.rmtree(tmp_path / "keep/pieces")
    (tmp_path / "keep/index.parquet").unlink()
    verify(str(tmp_path / "keep"), repair=True)
    index = EpisodeIndex.open(str(tmp_path / "keep"))
    assert all(np.array_equal(read_episode(index, n).fields[CAMERA], pictures) for n, pictures in before.items())


@pytest.mark.parametrize("codec", videos.CODECS)
@pytest.mark.parametrize("first", [0, 7])
def test_an_episode_that_begins_inside_a_group_hides_the_pictures_before_it(codec: str, first: int):
    data = videos.make(videos.Clip(codec, 30, 10, 2, variable=True, start=700))
    whole, track = videos.decoded(data), videos.track(data)
    rows = np.array([0, 1, 2, 2, 5, 9]) + first
    reads: list[tuple[int, int]] = []

    def read(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return data[offset : offset + size]

    made = keep(Video(track, "", "x"), rows, read)
    assert len(reads) == 1
    pictures = videos.decoded(made.data)
    assert min(pictures) == 0
    times = track.pts[track.order[first : first + 10]].tolist()
    assert np.array_equal([pictures[t] for t in sorted(pictures)], [whole[t] for t in times])
    shown = np.cumsum(made.track.shown[made.track.order]) - 1
    assert np.array_equal(shown[made.frames], rows - first)
    chunks = made.chunks()
    assert chunks.row[0] == 0
    assert len(chunks.crc) == len(chunks.offset)


def test_what_a_reader_process_sends_is_checked():
    data = videos.make(videos.Clip())
    good = KeptVideo(data, np.arange(20))
    assert good.chunks().row[0] == 0
    for frames in ([], [-1], [20], [3, 2]):
        with pytest.raises(DataError, match="do not fit its"):
            dataclasses.replace(good, frames=np.array(frames, np.int64)).chunks()
    with pytest.raises(DataError, match="it is damaged or cut off"):
        KeptVideo(data[:-50], good.frames).chunks()


def test_keep_is_refused_where_it_cannot_copy(tmp_path: Path):
    lerobot_v2(tmp_path / "src")
    npz(tmp_path / "other")

    def refused(source: str, mapping: dict[str, Any], reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            convert(str(tmp_path / source), str(tmp_path / "out"), mapping=mapping, processes=1)

    refused(
        "src", {**KEEP, "options": {"resize": [32, 32]}}, f"{CAMERA}: a video with `encoding: keep` cannot be resized"
    )
    refused("src", {"fields": {"observation.state": {"encoding": "keep"}}}, "is no video")
    refused("src", {"fields": {CAMERA: {"encoding": "keep", "frames": 4}}}, "copies a video; remove frames")
    refused(
        "other",
        {"fields": {"observation.image": {"encoding": "keep"}}},
        "copies videos of the format lerobot, not of npz",
    )
    assert Mapping.from_dict(KEEP).encodings([]) == {}


def test_a_damaged_kept_video_is_found(tmp_path: Path):
    lerobot_v2(tmp_path / "src")
    convert(str(tmp_path / "src"), str(tmp_path / "keep"), mapping=KEEP, processes=1)
    index = EpisodeIndex.open(str(tmp_path / "keep"))
    table = index.packets(CAMERA)
    assert table is not None
    file = tmp_path / "keep" / index.shard_name(0)
    raw = bytearray(file.read_bytes())
    raw[int(table.offset[0]) + int(table.size[0]) // 2] ^= 4
    file.write_bytes(raw)
    with pytest.raises(DataError, match=f"member {CAMERA} of episode .*CRC-32C does not match"):
        read_episode(index, 0)
