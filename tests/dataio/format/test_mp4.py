"""The sample table of an MP4 equals what FFmpeg's demuxer finds. Other kinds are refused by name, damaged files safely."""

from __future__ import annotations

import itertools
import struct
import tracemalloc

import numpy as np
import pytest

from tests.dataio import videos
from tests.dataio.videos import CODECS, Clip, changed, make, track, with_co64
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.mp4 import Track, gops, read_track
from tiphys.dataio.format.mp4_writer import header
from tiphys.dataio.format.video_stream import Stream

pytest.importorskip("av")

FEW = [
    Clip("libx264"),
    Clip("libx264", b_frames=2, faststart=True, variable=True, start=1024, frames=30),
    Clip("libx265", b_frames=2, sound=True),
    Clip("libx265", b_frames=2, open_gop=True, frames=30, gop=10),
    Clip("libsvtav1", gop=2, start=700),
    Clip("libvpx-vp9", faststart=True, sound=True),
    Clip("libx264", pix_fmt="yuv444p", size=(45, 63), movflags="negative_cts_offsets", b_frames=1),
]


def assert_equals_the_demuxer(data: bytes) -> None:
    packets, (extradata, pix_fmt, width, height, tick) = videos.demuxed(data)
    found = track(data)
    assert [p.pts for p in packets] == found.pts.tolist()
    assert [p.pos for p in packets] == found.offsets.tolist()
    assert [bytes(p) for p in packets] == videos.payloads(data, found, range(len(found)))
    assert [p.is_keyframe for p in packets] == found.sync.tolist()
    assert [p.is_discard for p in packets] == (~found.shown).tolist()
    assert np.diff([p.dts for p in packets]).tolist() == np.diff(found.dts).tolist()
    assert tick * found.timescale == 1
    stream = found.stream
    assert (stream.extradata, stream.pix_fmt, stream.width, stream.height) == (extradata, pix_fmt, width, height)
    assert Stream.from_entry(stream.entry, "x") == stream


@pytest.mark.parametrize("clip", FEW, ids=lambda c: f"{c.codec}-{FEW.index(c)}")
def test_the_table_equals_that_of_the_demuxer(clip):
    data = make(clip)
    assert_equals_the_demuxer(data)
    if not clip.faststart:
        assert_equals_the_demuxer(with_co64(data))


def test_bit_rates_make_no_new_stream():
    """A muxer writes those of each file, so each file would need a sample description of its own in the index."""
    entry = track(make(Clip("libx264"))).stream.entry
    rated = []
    for rate in (1000, 2000):
        more = entry[8:] + struct.pack(">I4s3I", 20, b"btrt", 0, rate, rate)
        rated.append(struct.pack(">I4s", 8 + len(more), b"avc1") + more)
    assert b"btrt" not in entry
    assert {Stream.from_entry(one, "x").entry for one in rated} == {entry}


@pytest.mark.long
@pytest.mark.parametrize("codec", CODECS)
def test_every_combination_equals_the_demuxer(codec):
    product = itertools.product((1, 2, 10, 250), (0, 2), (False, True), (0, 1000), (False, True), (False, True))
    for gop, b_frames, faststart, start, variable, sound in product:
        clip = Clip(codec, 24, gop, b_frames, faststart, start, variable, sound)
        data = make.__wrapped__(clip)
        assert_equals_the_demuxer(data)
        if not faststart:
            assert_equals_the_demuxer(with_co64(data))


@pytest.mark.parametrize("faststart", [False, True])
def test_a_file_is_read_in_at_most_two_reads(faststart):
    data = make(Clip(frames=200, gop=250, faststart=faststart))
    for padding in (0, 1 << 20):
        free = struct.pack(">I4s", padding + 8, b"free") + bytes(padding)  # between the pictures and their table
        long = changed(data, b"mdat", lambda box: box + free)  # noqa: B023
        reads: list[tuple[int, int]] = []

        def read(offset: int, size: int, long: bytes = long, reads: list = reads) -> bytes:
            reads.append((offset, size))
            return long[offset : offset + size]

        assert len(read_track(read, len(long), "x")) == 200
        assert len(reads) <= 2


@pytest.mark.parametrize("clip", [c for c in FEW if c.b_frames], ids=lambda c: c.codec)
def test_groups_hold_each_display_position_once_and_begin_at_sync_samples(clip):
    found = track(make(clip))
    cut = gops(found)
    assert cut.first.tolist() == [0, *cut.last[:-1].tolist()]
    assert cut.last[-1] == len(found)
    assert found.sync[cut.begin].all()
    for begin, end, first, last, offset, size in zip(*(a.tolist() for a in cut), strict=True):
        assert set(range(first, last)) <= set(found.rank[begin:end].tolist())
        assert offset == found.offsets[begin:end].min()
        assert offset + size == (found.offsets + found.sizes)[begin:end].max()
    leading = found.rank[cut.first] != cut.first
    assert leading.any() == clip.open_gop
    assert (cut.begin[leading] < cut.first[leading]).all()


def written(found: Track, data: bytes, first: int, last: int, tick: int = 512) -> bytes:
    """The pictures at the display positions [first, last) as an MP4 of their own, whose edit list hides what else they need."""
    cut = gops(found)
    begin = int(cut.begin[np.searchsorted(cut.last, first, side="right")])
    samples = np.arange(begin, found.order[first:last].max() + 1)
    shown = (found.rank[samples] >= first) & (found.rank[samples] < last)
    parts = [a[samples] for a in (found.sizes, found.dts, found.pts, found.sync)]
    return header(found.stream, found.timescale, *parts, shown, tick) + b"".join(videos.payloads(data, found, samples))


@pytest.mark.parametrize("clip", FEW, ids=lambda c: f"{c.codec}-{FEW.index(c)}")
def test_a_part_of_a_video_is_a_video_of_the_same_samples_and_pictures(clip):
    data = make(clip)
    found = track(data)
    whole = videos.decoded(data)
    for first, last in ((0, 20), (5, 20), (7, 19), (6, 7)):
        part = written(found, data, first, last)
        assert_equals_the_demuxer(part)
        pictures = videos.decoded(part)
        assert min(pictures) == 0
        expected = [whole[t] for t in found.pts[found.order[first:last]].tolist()]
        assert np.array_equal([pictures[t] for t in sorted(pictures)], expected)


def test_a_large_file_has_offsets_of_64_bits():
    found = track(make(Clip()))
    sizes = np.full(len(found), 1 << 28)
    begin = header(found.stream, found.timescale, sizes, found.dts, found.pts, found.sync, found.shown)
    size = len(begin) + int(sizes.sum())
    again = read_track(lambda at, n: begin[at : at + n].ljust(n, b"\0") if at + n < 1 << 20 else b"", size, "x")
    assert again.offsets[0] == len(begin)
    assert again.offsets[-1] + again.sizes[-1] == size > 1 << 32


def test_videos_of_other_kinds_are_refused_by_name():
    data = make(Clip())
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    edits = struct.pack(">I4sII", 40, b"elst", 0, 2) + struct.pack(">IiHH", 100, 0, 1, 0) * 2
    fast = struct.pack(">I4sII", 28, b"elst", 0, 1) + struct.pack(">IiHH", 100, 0, 2, 0)
    cases = {
        "fragmented": make(Clip(movflags="frag_keyframe+empty_moov")),
        "encrypted": data.replace(b"avc1\0\0\0\0\0\0", b"encv\0\0\0\0\0\0"),
        "codec": data.replace(b"avc1\0\0\0\0\0\0", b"mp4v\0\0\0\0\0\0"),
        "turned": changed(data, b"tkhd", lambda box: box[:48] + turned + box[84:]),
        "2 edit segments": changed(data, b"elst", lambda _: edits),
        "speed": changed(data, b"elst", lambda _: fast),
        "10 bits": make(Clip(pix_fmt="yuv420p10le")),
        "another file": changed(data, b"dinf", lambda box: box[:-1] + b"\0"),
        "several sample descriptions": changed(changed(data, b"stsc", _two_descriptions), b"stco", _two_chunks),
        "cut off": data[:-100],
        "has no `moov`": data[: data.index(b"moov") - 4],
        "no MP4": b"RIFF" + data,
        "no video track": data.replace(b"vide", b"soun"),
        "two pictures": changed(data, b"stts", lambda _: struct.pack(">I4sIIII", 24, b"stts", 0, 1, 20, 0)),
    }
    for name, bad in cases.items():
        with pytest.raises(DataError, match=f"^x.mp4: .*{name}"):
            track(bad)


def _two_descriptions(box: bytes) -> bytes:
    return struct.pack(">I4sII", 40, b"stsc", 0, 2) + struct.pack(">6I", 1, 10, 1, 2, 10, 2)


def _two_chunks(box: bytes) -> bytes:
    return struct.pack(">I4sII", 24, b"stco", 0, 2) + box[16:20] * 2


@pytest.mark.parametrize("kind", [b"stsz", b"stco", b"stsc", b"stts", b"stss", b"elst", b"ctts"])
def test_a_count_beyond_its_box_allocates_nothing(kind):
    data = make(Clip(b_frames=1))
    at = 16 if kind == b"stsz" else 12
    for count in (0xFFFFFFFF, 0x10000000, 1 << 24):
        bad = changed(data, kind, lambda box: box[:at] + struct.pack(">I", count) + box[at + 4 :])  # noqa: B023
        _refused_with_little_memory(bad)
    # sizes that are all alike need no bytes in the box, and one run can count any number of samples
    same = changed(data, b"stsz", lambda _: struct.pack(">I4sIII", 20, b"stsz", 0, 1, 1 << 30))
    _refused_with_little_memory(same)
    runs = struct.pack(">I4sIIII", 24, b"stts", 0, 1, 0xFFFFFFFF, 1)
    _refused_with_little_memory(changed(data, b"stts", lambda _: runs))
    chunk = struct.pack(">I4sII", 28, b"stsc", 0, 1) + struct.pack(">3I", 1, 0xFFFFFFFF, 1)
    _refused_with_little_memory(changed(data, b"stsc", lambda _: chunk))


def _refused_with_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            track(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
