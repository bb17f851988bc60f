"""Writes samples of a video stream as an MP4 of one track, without changing a byte of them.

The file is `header(…)` followed by the samples. Times are exact: the movie has the track's ticks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.video_stream import Stream

_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_LARGE = 1 << 32


def header(
    stream: Stream,
    timescale: int,
    sizes: Sequence[int] | np.ndarray,
    dts: np.ndarray,
    pts: np.ndarray,
    sync: np.ndarray,
    shown: np.ndarray,
    tick: int = 1,
) -> bytes:
    """The bytes of an MP4 before its n samples.

    Parameters
    ----------
    stream : Stream
        Its sample description is copied.
    timescale : int
        Ticks per second.
    sizes : int [n]
        Bytes of each sample, in decode order.
    dts, pts : int64 [n]
        Ticks at which samples are decoded and shown. `dts` ascends.
    sync : bool [n]
        Whether decoding can start at a sample.
    shown : bool [n]
        Pictures to show. An edit list hides those before the first and after the last of them; at least one, and no others.
    tick : int
        Ticks for which the last picture is shown.

    Returns
    -------
    bytes
        An edit list makes 0 the time of the first picture that is shown.

    Raises
    ------
    DataError
        If the times do not ascend, or the pictures to show do not follow one another.
    """
    dts, pts, size = np.asarray(dts, np.int64), np.asarray(pts, np.int64), int(np.sum(sizes, dtype=np.int64))
    steps = np.diff(dts)
    visible = np.sort(pts[shown])
    if not len(visible) or (steps < 0).any() or (steps >= _LARGE).any():
        raise DataError("a video without a picture, or whose decode times do not ascend, cannot be written")
    hidden = pts[~np.asarray(shown)]
    if ((hidden > visible[0]) & (hidden < visible[-1])).any():
        raise DataError(
            "a video that hides pictures between others cannot be written: an MP4 of one edit segment cannot say so"
        )
    first, end = int(visible[0] - dts[0]), int(visible[-1] - visible[0]) + tick
    length = int(dts[-1] - dts[0]) + tick
    ftyp = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2mp41")
    wide = size + (1 << 20) + 32 * len(dts) >= _LARGE
    mdat = struct.pack(">I4sQ", 1, b"mdat", size + 16) if wide else struct.pack(">I4s", size + 8, b"mdat")

    def moov(begin: int) -> bytes:
        chunk = (
            _full(b"co64", 0, struct.pack(">IQ", 1, begin)) if wide else _full(b"stco", 0, struct.pack(">II", 1, begin))
        )
        table = _table(stream, sizes, np.append(steps, tick), pts - dts, np.asarray(sync), chunk)
        return _movie(stream, timescale, first, end, length, table)

    return ftyp + moov(len(ftyp) + len(moov(0)) + len(mdat)) + mdat


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def _full(kind: bytes, version_and_flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version_and_flags), *parts)


def _movie(stream: Stream, timescale: int, first: int, end: int, length: int, table: bytes) -> bytes:
    one = 1 << 24  # version 1: times of 64 bits
    mvhd = struct.pack(">QQIQIH10x", 0, 0, timescale, end, 1 << 16, 1 << 8) + _MATRIX + bytes(24) + struct.pack(">I", 2)
    tkhd = struct.pack(">QQII", 0, 0, 1, 0) + struct.pack(">Q8xhhhh", end, 0, 0, 0, 0) + _MATRIX
    tkhd += struct.pack(">II", stream.width << 16, stream.height << 16)
    elst = struct.pack(">IQqHH", 1, end, first, 1, 0)
    mdhd = struct.pack(">QQIQHH", 0, 0, timescale, length, 0x55C4, 0)
    hdlr = struct.pack(">I4s12x", 0, b"vide") + b"VideoHandler\0"
    dinf = _box(b"dinf", _full(b"dref", 0, struct.pack(">I", 1), _full(b"url ", 1)))
    minf = _box(b"minf", _full(b"vmhd", 1, bytes(8)), dinf, table)
    mdia = _box(b"mdia", _full(b"mdhd", one, mdhd), _full(b"hdlr", 0, hdlr), minf)
    trak = _box(b"trak", _full(b"tkhd", one | 3, tkhd), _box(b"edts", _full(b"elst", one, elst)), mdia)
    return _box(b"moov", _full(b"mvhd", one, mvhd), trak)


def _table(
    stream: Stream,
    sizes: Sequence[int] | np.ndarray,
    steps: np.ndarray,
    delays: np.ndarray,
    sync: np.ndarray,
    chunk: bytes,
) -> bytes:
    parts = [_full(b"stsd", 0, struct.pack(">I", 1), stream.entry), _runs(b"stts", 0, steps, ">u4")]
    if delays.any():
        parts.append(_runs(b"ctts", 1 << 24, delays, ">i4"))
    if not sync.all():
        numbers = np.flatnonzero(sync) + 1
        parts.append(_full(b"stss", 0, struct.pack(">I", len(numbers)), numbers.astype(">u4").tobytes()))
    parts.append(_full(b"stsc", 0, struct.pack(">IIII", 1, 1, len(steps), 1)))
    parts.append(_full(b"stsz", 0, struct.pack(">II", 0, len(steps)), np.asarray(sizes).astype(">u4").tobytes()))
    return _box(b"stbl", *parts, chunk)


def _runs(kind: bytes, version: int, values: np.ndarray, dtype: str) -> bytes:
    """(count, value) for each run of equal values."""
    begins = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    entries = np.empty(len(begins), [("count", ">u4"), ("value", dtype)])
    entries["count"], entries["value"] = np.diff(np.append(begins, len(values))), values[begins]
    return _full(kind, version, struct.pack(">I", len(entries)), entries.tobytes())
