"""The video track of an MP4 as arrays: where each sample (a compressed picture) lies, and when it is shown.

Only the `moov` box is read (ISO/IEC 14496-12), with NumPy alone. The file may come from someone who is not trusted: each count is
compared with the bytes of its box before anything is allocated, and each sample must lie inside the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.mp4_boxes import Box, Boxes, array, boxes, integer, refused
from tiphys.dataio.format.video_stream import Stream

MAX_MOOV = 32 << 20  # bytes of a `moov` box; a picture takes 4 to 13 bytes of it, so this is more than a day of video
_HEAD = 64 << 10  # bytes of the first read
_MAX_TOP_LEVEL = 64  # boxes that are passed over until `moov` is found
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"styp", b"sidx")
_PLAIN_MATRIX = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0"  # the first five of a track's matrix: neither turned nor scaled

Read = Callable[[int, int], "bytes | bytearray | memoryview"]


@dataclass(frozen=True)
class Track:
    """The n samples of a video track, in decode order.

    stream         what a decoder needs to know
    timescale      ticks per second of `dts` and `pts`
    offsets, sizes int64 [n], bytes of the file
    dts            int64 [n], ticks at which samples are decoded
    pts            int64 [n], ticks at which pictures are shown, after the edit list; no two are alike
    sync           bool [n], whether decoding can start at the sample
    shown          bool [n], False for pictures that the edit list hides
    """

    stream: Stream
    timescale: int
    offsets: np.ndarray
    sizes: np.ndarray
    dts: np.ndarray
    pts: np.ndarray
    sync: np.ndarray
    shown: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [n]: the sample at each display position. Hidden pictures have positions too."""
        return np.argsort(self.pts, kind="stable")

    @cached_property
    def rank(self) -> np.ndarray:
        """int64 [n]: the display position of each sample."""
        rank = np.empty(len(self), np.int64)
        rank[self.order] = np.arange(len(self))
        return rank


class Gops(NamedTuple):
    """The m groups of pictures of a track, each of which can be decoded alone. All are int64 [m].

    begin, end    samples that a decoder is given, in decode order. If pictures that are shown before the group's sync sample
                  need the group before it (leading pictures), `begin` is the sync sample before, so groups may overlap
    first, last   display positions [first, last) of the group. Together, the groups have each position once
    offset, size  bytes of the file from the first to the last of the samples; other bytes may lie between them
    """

    begin: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray
    size: np.ndarray


def gops(track: Track) -> Gops:
    """Cut a track into groups of pictures.

    A group begins at a sync sample before which, in decode order, lie exactly the pictures that are shown before the group. Other
    sync samples stay inside a group.
    """
    sync = np.flatnonzero(track.sync)
    before = np.concatenate([[-1], np.maximum.accumulate(track.rank)])  # last display position of the samples before
    first = sync[before[sync] == sync - 1]
    last = np.append(first[1:], len(track))
    begin = first.copy()
    leading = np.flatnonzero(track.rank[first] != first)
    begin[leading] = sync[np.maximum(np.searchsorted(sync, first[leading]) - 1, 0)]
    ends = track.offsets + track.sizes
    low, high = np.minimum.reduceat(track.offsets, first), np.maximum.reduceat(ends, first)
    for group in leading.tolist():
        samples = slice(int(begin[group]), int(last[group]))
        low[group], high[group] = track.offsets[samples].min(), ends[samples].max()
    return Gops(begin=begin, end=last, first=first, last=last, offset=low, size=high - low)


def read_track(read: Read, size: int, where: str) -> Track:
    """The first video track of an MP4, in at most two reads, unless the file has several large boxes.

    Parameters
    ----------
    read : Callable[[int, int], bytes]
        Gives `size` bytes from an offset of the file.
    size : int
        Bytes of the file.
    where : str
        The file's name, for messages.

    Raises
    ------
    DataError
        If the file is no MP4, is damaged, or is of a kind that cannot be read in place: fragmented, encrypted, turned, with
        several edit segments, several sizes, more than 8 bits per colour, or an unknown codec.
    """
    moov = _moov(read, size, where)
    parts = Boxes(moov, 0, len(moov), where)
    if b"cmov" in parts.names:
        raise refused(where, "its tables are compressed (`cmov`)")
    if b"mvex" in parts.names:
        raise refused(where, "it is fragmented (`mvex`, `moof`): each fragment has tables of its own")
    movie_scale = _time_scale(parts.one(b"mvhd"), moov, where)
    tracks = [Boxes(moov, b.begin, b.end, where) for b in parts.all(b"trak")]
    for trak in tracks:
        mdia = trak.inside(b"mdia")
        kind = mdia.one(b"hdlr")
        if integer(moov, kind, 8, 4, where).to_bytes(4, "big") == b"vide":
            return _track(trak, mdia, moov, movie_scale, size, where)
    raise DataError(f"{where}: has no video track ({len(tracks)} tracks)")


def _moov(read: Read, size: int, where: str) -> memoryview:
    """The content of the `moov` box."""

    def fetch(at: int, count: int) -> memoryview:
        data = memoryview(read(at, count)).cast("B")
        if len(data) != count:
            raise DataError(f"{where}: {len(data)} bytes arrived instead of bytes {at}–{at + count - 1}")
        return data

    begin, data = 0, fetch(0, min(size, _HEAD))
    if bytes(data[4:8]) not in _FIRST:
        raise DataError(f"{where}: is no MP4: it begins with {bytes(data[:8])!r}")
    at = 0
    for _ in range(_MAX_TOP_LEVEL):
        if size - at < 8:
            break
        if at + 16 > begin + len(data) and begin + len(data) < size:
            rest = size - at
            begin, data = at, fetch(at, rest if rest <= MAX_MOOV else _HEAD)
        header = data[at - begin : at - begin + 16]
        length, kind, head = int.from_bytes(header[:4], "big"), bytes(header[4:8]), 8
        if length == 1 and len(header) == 16:
            length, head = int.from_bytes(header[8:16], "big"), 16
        elif length == 0:
            length = size - at
        if length < head or length > size - at:
            raise DataError(
                f"{where}: the box {kind!r} at byte {at} claims {length:,} bytes, but the file has {size - at:,} from "
                "there on; it is damaged or cut off"
            )
        if kind in (b"moof", b"styp", b"sidx"):
            raise refused(
                where, f"it is fragmented ({kind.decode()!r} at byte {at}): each fragment has tables of its own"
            )
        if kind == b"moov":
            if length > MAX_MOOV:
                raise DataError(
                    f"{where}: its `moov` box has {length:,} bytes; at most {MAX_MOOV:,} are read: split the video"
                )
            if at + length > begin + len(data):
                begin, data = at, fetch(at, length)
            return data[at - begin + head : at - begin + length]
        at += length
    raise DataError(
        f"{where}: has no `moov` box, which lists the pictures; the recording was not finished, or is cut off"
    )


def _time_scale(box: Box, moov: memoryview, where: str) -> int:
    """Ticks per second of `mvhd` or `mdhd`."""
    version = integer(moov, box, 0, 1, where)
    scale = integer(moov, box, 20 if version == 1 else 12, 4, where)
    if not 0 < scale < 1 << 31:
        raise DataError(f"{where}: the box {box.kind.decode()!r} states {scale} ticks per second")
    return scale


def _track(trak: Boxes, mdia: Boxes, moov: memoryview, movie_scale: int, size: int, where: str) -> Track:
    header = trak.one(b"tkhd")
    matrix = header.begin + (52 if integer(moov, header, 0, 1, where) == 1 else 40)
    if header.end - matrix >= 36 and bytes(moov[matrix : matrix + 20]) != _PLAIN_MATRIX:
        raise refused(where, "its pictures are turned, mirrored or scaled when they are shown (the matrix of `tkhd`)")
    scale = _time_scale(mdia.one(b"mdhd"), moov, where)
    minf = mdia.inside(b"minf")
    _check_same_file(minf, moov, where)
    table = _Table(minf.inside(b"stbl"), moov, where)
    sizes = table.sizes(size)
    n = len(sizes)
    offsets, description = table.offsets(sizes, size)
    dts = table.decode_times(n)
    pts = dts + table.display_delays(n)
    edit = _edit(trak, moov, where)
    shift, shown = 0, np.ones(n, bool)
    if edit is not None:
        shift = _rescale(edit.empty, scale, movie_scale) - edit.start
        shown = pts >= edit.start
        if edit.duration:
            shown &= pts < edit.start + _rescale(edit.duration, scale, movie_scale)
    sync = table.sync(n)
    pts += shift
    ordered = np.sort(pts)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise DataError(
            f"{where}: two pictures have the time {ordered[twice[0]]}/{scale} s, so that rows have no one picture"
        )
    return Track(
        stream=Stream.from_entry(table.entry(description), where),
        timescale=scale,
        offsets=offsets,
        sizes=sizes,
        dts=dts + shift,
        pts=pts,
        sync=sync,
        shown=shown,
    )


def _check_same_file(minf: Boxes, moov: memoryview, where: str) -> None:
    """Raises DataError if the track's samples lie in another file."""
    if b"dinf" not in minf.names:
        return
    dref = minf.inside(b"dinf").one(b"dref")
    for entry in boxes(moov, dref.begin + 8, dref.end, where):
        if not integer(moov, entry, 0, 4, where) & 1:
            raise refused(where, "its pictures lie in another file (`dref`)")


class _Edit(NamedTuple):
    """The one edit segment of a track. `empty` and `duration` (0: to the end) are in ticks of the movie, `start` of the track."""

    empty: int
    start: int
    duration: int


def _edit(trak: Boxes, moov: memoryview, where: str) -> _Edit | None:
    if b"edts" not in trak.names:
        return None
    edits = trak.inside(b"edts")
    if b"elst" not in edits.names:
        return None
    box = edits.one(b"elst")
    wide = integer(moov, box, 0, 1, where) == 1
    count = integer(moov, box, 4, 4, where)
    dtype = np.dtype([("duration", ">u8" if wide else ">u4"), ("start", ">i8" if wide else ">i4"), ("rate", ">i4")])
    entries = array(moov, box, 8, count, dtype, where)
    if not count:
        return None
    empty = 0
    parts: list[tuple[int, int, int]] = []
    for entry in entries[:16].tolist():
        if entry[1] == -1 and not parts:
            empty += entry[0]
        else:
            parts.append(entry)
    if len(parts) != 1 or count > 16:
        raise refused(where, f"it has {count} edit segments; one is read")
    duration, start, rate = parts[0]
    if rate != 1 << 16:
        raise refused(where, "its edit list changes the speed")
    if start < 0 or max(empty, start, duration) >= 1 << 56:
        raise DataError(f"{where}: its edit list has the times {empty}, {start} and {duration}")
    return _Edit(empty, start, duration)


def _rescale(value: int, to: int, of: int) -> int:
    """`value · to / of`, rounded to the nearest integer, halves upwards, as FFmpeg rounds it."""
    return (2 * value * to + of) // (2 * of)


class _Table:
    """The sample table of a track (`stbl`)."""

    def __init__(self, parts: Boxes, moov: memoryview, where: str):
        self._parts, self._moov, self._where = parts, moov, where

    def _entries(self, kind: bytes, columns: int, dtype: str = ">u4") -> np.ndarray:
        """int64 [count, columns]: the entries of a box that has a count at byte 4."""
        box = self._parts.one(kind)
        count = integer(self._moov, box, 4, 4, self._where)
        found = array(self._moov, box, 8, count, np.dtype((dtype, (columns,))), self._where)
        return found.astype(np.int64).reshape(count, columns)

    def _bad(self, text: str) -> DataError:
        return DataError(f"{self._where}: {text}")

    def sizes(self, file_size: int) -> np.ndarray:
        """int64 [n]: bytes of each sample."""
        if b"stsz" not in self._parts.names and b"stz2" in self._parts.names:
            raise refused(self._where, "it has compact sizes (`stz2`)")
        box = self._parts.one(b"stsz")
        same, count = (integer(self._moov, box, at, 4, self._where) for at in (4, 8))
        if count == 0:
            raise self._bad("its video track has no pictures")
        if same:  # nothing in the box bounds such a count
            if count > 1024 + len(self._moov) // 4:
                raise self._bad(
                    f"the box 'stsz' claims {count:,} samples of {same} bytes, more than its tables can describe"
                )
            sizes = np.full(count, same, np.int64)
        else:
            sizes = array(self._moov, box, 12, count, np.dtype(">u4"), self._where).astype(np.int64)
        if not sizes.all():
            raise self._bad(f"sample {int(np.argmin(sizes))} has no bytes")
        if int(sizes.sum()) > file_size:
            raise self._bad(f"its samples take {int(sizes.sum()):,} bytes, but the file has {file_size:,}")
        return sizes

    def offsets(self, sizes: np.ndarray, file_size: int) -> tuple[np.ndarray, int]:
        """int64 [n]: first byte of each sample; and the number of the sample description that all of them have."""
        wide = b"co64" in self._parts.names
        box = self._parts.one(b"co64" if wide else b"stco")
        chunks = integer(self._moov, box, 4, 4, self._where)
        begins = array(self._moov, box, 8, chunks, np.dtype(">u8" if wide else ">u4"), self._where)
        if chunks and int(begins.max()) > file_size:
            raise self._bad(f"a chunk begins at byte {int(begins.max()):,}, but the file has {file_size:,} bytes")
        runs = self._entries(b"stsc", 3)
        firsts = runs[:, 0] - 1
        lengths = np.diff(np.append(firsts, chunks))
        if not len(runs) or firsts[0] != 0 or (lengths <= 0).any():
            raise self._bad(f"the box 'stsc' does not count the {chunks:,} chunks of 'stco'")
        n, stated = len(sizes), int((lengths * runs[:, 1]).sum())
        if stated != n:
            raise self._bad(f"the box 'stsc' counts {stated:,} samples, but 'stsz' {n:,}")
        if (runs[:, 2] != runs[0, 2]).any():
            raise refused(self._where, "its pictures change their format or size (several sample descriptions)")
        counts = np.repeat(runs[:, 1], lengths)  # samples of each chunk
        before = np.cumsum(sizes) - sizes
        first = np.cumsum(counts) - counts
        filled = counts > 0
        shift = begins.astype(np.int64)[filled] - before[first[filled]]
        offsets = before + np.repeat(shift, counts[filled])
        if int((offsets + sizes).max()) > file_size:
            worst = int(np.argmax(offsets + sizes))
            raise self._bad(
                f"sample {worst} ends at byte {int(offsets[worst] + sizes[worst]):,}, but the file has {file_size:,} bytes; "
                "it is cut off"
            )
        return offsets, int(runs[0, 2])

    def _runs(self, kind: bytes, n: int, dtype: str = ">u4") -> np.ndarray:
        """int64 [n]: the value of each sample, from runs of (count, value)."""
        runs = self._entries(kind, 2, dtype)
        counts = runs[:, 0] & 0xFFFFFFFF
        if int(counts.sum()) != n:
            raise self._bad(f"the box {kind.decode()!r} counts {int(counts.sum()):,} samples, but 'stsz' {n:,}")
        return np.repeat(runs[:, 1], counts)

    def decode_times(self, n: int) -> np.ndarray:
        steps = self._runs(b"stts", n)
        return np.cumsum(steps) - steps

    def display_delays(self, n: int) -> np.ndarray | int:
        """Ticks from decoding to showing. Writers use negative ones in both versions of the box."""
        return self._runs(b"ctts", n, ">i4") if b"ctts" in self._parts.names else 0

    def sync(self, n: int) -> np.ndarray:
        """bool [n]. Without a list, decoding can start at each sample."""
        if b"stss" not in self._parts.names:
            return np.ones(n, bool)
        numbers = self._entries(b"stss", 1)[:, 0] - 1
        if not len(numbers) or numbers[0] != 0 or (np.diff(numbers) <= 0).any() or numbers[-1] >= n:
            raise self._bad("the box 'stss' does not list key frames in order, or the first picture is none")
        out = np.zeros(n, bool)
        out[numbers] = True
        return out

    def entry(self, number: int) -> bytes:
        """The sample description with this number, counted from 1."""
        box = self._parts.one(b"stsd")
        for at, entry in enumerate(self._within(box), 1):
            if at == number:
                return bytes(self._moov[entry.start : entry.end])
        raise self._bad(f"there is no sample description {number}")

    def _within(self, box: Box) -> Iterator[Box]:
        return boxes(self._moov, box.begin + 8, box.end, self._where)
