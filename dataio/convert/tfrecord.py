"""Reads TFRecord files and tf.Example messages without TensorFlow. Every length is checked before it is used.

A record of a TFRecord file is a u64 length, the masked CRC-32C of the length, the data, and the masked CRC-32C of the
data (tensorflow/core/lib/io/record_writer.h). tf.Example is defined in tensorflow/core/example/{example,feature}.proto.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
from crc32c import crc32c

from tiphys.dataio.convert.limits import RECORD_BYTES, BoundedInflate, read_exactly
from tiphys.dataio.episode import DataError

_HEADER = struct.Struct("<QI")
_GZIP = b"\x1f\x8b\x08"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Value = list[bytes] | np.ndarray  # bytes_list, or float32/int64 [n]


def records(stream: BinaryIO, size: int, where: str) -> Iterator[memoryview]:
    """The records of a file of `size` bytes, which may be gzipped, in order.

    Raises DataError at the first record that is damaged or cut.
    """
    begin = stream.read(_HEADER.size)
    stream.seek(0)
    # a length may begin with the same bytes as gzip, but then its CRC fits
    if begin.startswith(_GZIP) and _HEADER.pack(int.from_bytes(begin[:8], "little"), masked_crc(begin[:8])) != begin:
        inflated = cast(BinaryIO, io.BufferedReader(BoundedInflate(stream, where), 1 << 18))
        yield from _records(inflated, None, where)
    else:
        yield from _records(stream, size, where)


def _records(stream: BinaryIO, size: int | None, where: str) -> Iterator[memoryview]:
    """size: None if it is unknown; then the stream ends after a record."""
    at = 0
    while size is None or at < size:
        here = f"{where}, byte {at}"
        header = stream.read(_HEADER.size)
        if size is None and not header:
            return
        if len(header) != _HEADER.size:
            raise DataError(f"{here}: ends after {len(header)} of {_HEADER.size} bytes; it is truncated")
        length, stored_crc = _HEADER.unpack(header)
        if masked_crc(header[:8]) != stored_crc:
            raise DataError(
                f"{here}: the length of the record fails its CRC; the file is damaged, or not a TFRecord file"
            )
        if length > RECORD_BYTES:
            raise DataError(f"{here}: the record claims {length:,} bytes; the limit is {RECORD_BYTES:,}")
        if size is not None and at + _HEADER.size + length + 4 > size:
            raise DataError(f"{here}: the record claims {length:,} bytes, but the file ends after {size - at:,}")
        data = read_exactly(stream, length, here)
        (stored_crc,) = struct.unpack("<I", read_exactly(stream, 4, here))
        if masked_crc(data) != stored_crc:
            raise DataError(f"{here}: the {length:,} bytes of the record fail their CRC; the file is damaged")
        at += _HEADER.size + length + 4
        yield memoryview(data)


def masked_crc(data: Any) -> int:
    """The CRC-32C of the data as TFRecord masks it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: memoryview, where: str) -> dict[str, Value]:
    """The features of a tf.Example: name -> list of bytes, float32 [n] or int64 [n]."""
    out: dict[str, Value] = {}
    for number, features in _fields(data, where):
        if number != 1 or not isinstance(features, memoryview):
            continue
        for inner, entry in _fields(features, where):
            if inner != 1 or not isinstance(entry, memoryview):
                continue
            key, value = "", memoryview(b"")
            for part, content in _fields(entry, where):
                if part == 1 and isinstance(content, memoryview):
                    try:
                        key = str(content, "utf-8")
                    except UnicodeDecodeError:
                        raise DataError(f"{where}: the name of a feature is not UTF-8") from None
                elif part == 2 and isinstance(content, memoryview):
                    value = content
            out[key] = _feature(value, f"{where}, feature {key!r}")
    return out


def _feature(data: memoryview, where: str) -> Value:
    out: Value = []
    for number, content in _fields(data, where):  # if a oneof is set twice, protobuf uses the last value
        if not isinstance(content, memoryview):
            raise DataError(f"{where}: not a list of bytes, floats or integers")
        if number == 1:
            out = [bytes(v) for n, v in _fields(content, where) if n == 1 and isinstance(v, memoryview)]
        elif number == 2:
            out = _floats(content, where)
        elif number == 3:
            out = _integers(content, where)
    return out


def _floats(data: memoryview, where: str) -> np.ndarray:
    parts = []
    for number, content in _fields(data, where, fixed=True):
        if number == 1 and isinstance(content, memoryview):
            if len(content) % 4:
                raise DataError(f"{where}: {len(content)} bytes are not a whole number of floats")
            parts.append(np.frombuffer(content, "<f4"))
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, "<f4"), *parts])


def _integers(data: memoryview, where: str) -> np.ndarray:
    parts: list[np.ndarray] = []
    for number, content in _fields(data, where):
        if number == 1:
            parts.append(
                _varints(content, where) if isinstance(content, memoryview) else np.array([_signed(content)], np.int64)
            )
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _varints(data: memoryview, where: str) -> np.ndarray:
    """Packed base-128 integers as int64 [n], decoded all at once."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise DataError(f"{where}: the last integer is cut")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > 10:
        raise DataError(f"{where}: an integer of {longest} bytes; at most 10 are valid")
    out = np.zeros(len(starts), np.uint64)
    for i in range(longest):
        has = np.flatnonzero(lengths > i)
        out[has] |= (raw[starts[has] + i] & 0x7F).astype(np.uint64) << np.uint64(7 * i)
    return out.view(np.int64)


def _fields(data: memoryview, where: str, fixed: bool = False) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, content) of each field of a protobuf message.

    Fixed-width fields are skipped; with `fixed` they come as bytes.
    """
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at, where)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at, where)
            if size > end - at:
                raise DataError(f"{where}: a protobuf field of {size:,} bytes, but only {end - at:,} are left")
            yield number, data[at : at + size]
            at += size
        elif kind == _VARINT:
            value, at = _varint(data, at, where)
            yield number, value
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            if size > end - at:
                raise DataError(f"{where}: a protobuf field is cut")
            if fixed:
                yield number, data[at : at + size]
            at += size
        else:
            raise DataError(f"{where}: protobuf wire type {kind}; not a tf.Example")


def _varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise DataError(f"{where}: a protobuf integer is cut or too long")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
