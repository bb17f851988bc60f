"""Pictures decoded from a few samples equal those of a decoder that reads the whole file. Damage is reported."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataio import videos
from tests.dataio.videos import CODECS, Clip, make, track
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import packets
from tiphys.dataio.format.mp4 import Track, gops

av = pytest.importorskip("av")

CLIPS = [
    Clip("libx264", 30, 10, 2, variable=True),
    Clip("libx264", 30, 250, 2),
    Clip("libx264", 30, 10, 2, open_gop=True),
    Clip("libx265", 30, 10, 2, open_gop=True),
    Clip("libx265", 30, 2),
    Clip("libsvtav1", 30, 10, 2),
    Clip("libsvtav1", 30, 2),
    Clip("libvpx-vp9", 30, 10),
    Clip("libx264", 12, 4, pix_fmt="yuvj420p"),
    Clip("libx264", 12, 4, pix_fmt="yuv444p", size=(45, 63)),
]


@pytest.fixture(autouse=True)
def no_decoder_is_left():
    yield
    packets.close()


class OnlyTheseBytes:
    """A file of which only one range may be read."""

    def __init__(self, data: bytes, offset: int, size: int):
        self._data, self._offset, self._size = data, offset, size

    def read(self, offset: int, size: int) -> bytes:
        assert self._offset <= offset
        assert offset + size <= self._offset + self._size
        return self._data[offset : offset + size]


def window(data: bytes, found: Track, wanted: np.ndarray, format: str = "") -> np.ndarray:
    """The pictures at some display positions, group by group; in YUV if a format is given."""
    cut, out = gops(found), {}
    for begin, end, first, last, offset, size in zip(*(a.tolist() for a in cut), strict=True):
        here = wanted[(wanted >= first) & (wanted < last)]
        file = OnlyTheseBytes(data, offset, size)
        parts = [file.read(int(found.offsets[i]), int(found.sizes[i])) for i in range(begin, end)]
        if format and len(here):
            shown = packets.pictures(found.stream, parts, found.rank[begin:end], here.tolist())
            out |= {time: frame.to_ndarray() for time, frame in shown}
        elif len(here):
            out |= dict(
                zip(here.tolist(), packets.decode(found.stream, parts, found.rank[begin:end], here), strict=True)
            )
    return np.stack([out[p] for p in wanted.tolist()])


@pytest.mark.parametrize("clip", CLIPS, ids=lambda c: f"{c.codec}-{CLIPS.index(c)}")
@given(first=st.integers(0, 29), count=st.integers(1, 12), stride=st.integers(1, 7))
@settings(max_examples=6, deadline=None)
def test_any_window_is_a_slice_of_the_whole_video(clip, first, count, stride):
    data = make(clip)
    found = track(data)
    wanted = np.arange(first % clip.frames, clip.frames, stride)[:count]
    times = found.pts[found.order[wanted]].tolist()
    whole = videos.decoded(data)
    assert np.array_equal(window(data, found, wanted), [whole[t] for t in times])
    name = found.stream.pix_fmt
    if clip.pix_fmt == name:
        planes = videos.decoded(data, name)
        assert np.array_equal(window(data, found, wanted, name), [planes[t] for t in times])


GOLDEN = {
    "x264": "ae8cea591e3c7936",
    "x265": "507e82a6c07a3be9",
    "svtav1": "a020d32bba4646b1",
    "vpx-vp9": "773ef93a553b7ff1",
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_pictures_are_the_same_with_every_ffmpeg(name):
    data = (Path(__file__).parent / "data" / f"{name}.mp4").read_bytes()
    found = track(data)
    pictures = window(data, found, np.arange(len(found)))
    assert hashlib.sha256(pictures.tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_grey_pictures_have_one_channel():
    data = make(CLIPS[0])
    found = track(data)
    grey = packets.decode(
        found.stream, videos.payloads(data, found, range(3)), found.rank[:3], np.array([0]), grey=True
    )
    assert np.array_equal(grey[0, ..., 0], videos.decoded(data, "gray")[0])


def test_samples_after_the_last_one_that_is_needed_are_not_decoded():
    data = make(CLIPS[1])
    found = track(data)
    parts = videos.payloads(data, found, range(30))
    wanted = np.array([3])
    last = int(found.order[3])
    good = packets.decode(found.stream, parts, found.rank, wanted)
    parts[last + 1 :] = [b"\xff" * 9] * (29 - last)
    assert np.array_equal(packets.decode(found.stream, parts, found.rank, wanted), good)


def test_few_decoders_are_kept_and_none_that_failed():
    data = make(CLIPS[0])
    found = track(data)
    parts, times = videos.payloads(data, found, range(4)), found.rank[:4]
    for i in range(12):
        stream = dataclasses.replace(found.stream, colour=(2, 2, 2, 0), extradata=found.stream.extradata + bytes(i))
        packets.decode(stream, parts, times, times[:1])
    assert len(packets._decoders) == 8
    packets.close()
    with pytest.raises(DataError):
        packets.decode(found.stream, [b"\0" * 40], times[:1], times[:1])
    assert not packets._decoders


def test_a_decoder_that_read_other_parameter_sets_is_not_used_again():
    """Otherwise a file that reuses the extradata of another could change how the other is decoded."""
    data = make(CLIPS[0])
    found = track(data)
    stream, times = found.stream, found.rank[:1]
    (first,) = videos.payloads(data, found, [0])
    assert packets._decoders == {}
    sps = stream.extradata[8 : 8 + int.from_bytes(stream.extradata[6:8], "big")]
    packets.decode(stream, [len(sps).to_bytes(4, "big") + sps + first], times, times)
    assert list(packets._decoders) == [stream.digest]
    other = track(make(Clip("libx264", 3, 4, pix_fmt="yuvj420p"))).stream.extradata
    foreign = other[8 : 8 + int.from_bytes(other[6:8], "big")]
    assert foreign != sps
    packets.decode(stream, [len(foreign).to_bytes(4, "big") + foreign + first], times, times)
    assert not packets._decoders


def test_colours_that_cannot_be_converted_are_refused():
    data = make(CLIPS[0])
    found = track(data)
    parts, times = videos.payloads(data, found, range(2)), found.rank[:2]
    ((_, frame),) = packets.pictures(found.stream, parts, times, times[:1])
    frame.colorspace = 3  # a reserved number
    with pytest.raises(DataError, match=r"^shard, bytes 3–9: the colours of a picture cannot be converted to rgb24"):
        packets.to_array(frame, where="shard, bytes 3–9")


def test_what_a_stream_does_not_state_is_refused():
    data = make(CLIPS[0])
    found = track(data)
    parts, times = videos.payloads(data, found, range(2)), found.rank[:2]
    for change, reason in (({"width": 66}, "64×48 pixels"), ({"pix_fmt": "yuv444p"}, "pixel format yuv420p")):
        with pytest.raises(DataError, match=f"^shard, bytes 3–9: .*{reason}"):
            packets.decode(dataclasses.replace(found.stream, **change), parts, times, times[:1], "shard, bytes 3–9")
    with pytest.raises(DataError, match="do not hold"):
        packets.decode(found.stream, parts, times, np.array([29]))
    with pytest.raises(DataError, match="pixels; at most"):
        packets.decode(dataclasses.replace(found.stream, width=60000, height=60000), parts, times, times[:1])


@pytest.mark.parametrize("codec", CODECS)
def test_flipped_bits_are_reported_or_change_a_picture_but_never_its_size(codec):
    data = make(Clip(codec, 10, 5, size=(240, 320)))
    found = track(data)
    parts, times = videos.payloads(data, found, range(5)), found.rank[:5]
    good = packets.decode(found.stream, parts, times, times)
    rng, unseen, trials = np.random.default_rng(0), 0, 30
    for _ in range(trials):
        bad = [bytearray(p) for p in parts]
        sample = bad[rng.integers(5)]
        sample[rng.integers(len(sample))] ^= 1 << rng.integers(8)
        try:
            pictures = packets.decode(found.stream, bad, times, times)
        except DataError:
            continue
        assert pictures.shape == good.shape
        unseen += not np.array_equal(pictures, good)
    if codec in ("libx264", "libsvtav1"):  # nothing in HEVC and VP9 tells; the CRC of a chunk does
        assert unseen < 0.5 * trials  # with FFmpeg's defaults, nearly all in h264
    assert np.array_equal(packets.decode(found.stream, parts, times, times), good)
