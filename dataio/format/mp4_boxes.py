"""Boxes of an MP4 (ISO/IEC 14496-12), each compared with the bytes around it. What is wrong raises a DataError."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError

_MAX_BOXES = 4096  # inside one box


class Box(NamedTuple):
    """A box of an MP4: its type, its first byte with the header, and the bytes [begin, end) of its content."""

    kind: bytes
    start: int
    begin: int
    end: int


def boxes(data: memoryview, begin: int, end: int, where: str) -> Iterator[Box]:
    """The boxes in the bytes [begin, end). Raises DataError if one leaves them."""
    at = begin
    for _ in range(_MAX_BOXES):
        if end - at < 8:  # QuickTime ends some lists with four zero bytes
            return
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8]), 8
        if size == 1 and end - at >= 16:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = end - at
        if size < head or size > end - at:
            raise DataError(
                f"{where}: the box {kind!r} claims {size:,} bytes, more than the {end - at:,} around it: it is damaged"
            )
        yield Box(kind, at, at + head, at + size)
        at += size
    raise DataError(f"{where}: more than {_MAX_BOXES} boxes inside one box")


def integer(data: memoryview, box: Box, at: int, size: int, where: str) -> int:
    """The unsigned integer of `size` bytes at byte `at` of a box."""
    begin = box.begin + at
    if begin + size > box.end:
        raise DataError(f"{where}: the box {box.kind!r} has {box.end - box.begin} bytes; it is cut off")
    return int.from_bytes(data[begin : begin + size], "big")


def refused(where: str, reason: str) -> DataError:
    """The error for a video that is intact, but of a kind that is not read in place."""
    return DataError(
        f"{where}: cannot be read in place: {reason}. `tiphys convert` decodes such videos and stores them anew"
    )


class Boxes:
    """The boxes inside a box, by name."""

    def __init__(self, data: memoryview, begin: int, end: int, where: str):
        self._data, self._where = data, where
        self._found: dict[bytes, list[Box]] = {}
        for box in boxes(data, begin, end, where):
            self._found.setdefault(box.kind, []).append(box)

    @property
    def names(self) -> set[bytes]:
        return set(self._found)

    def all(self, kind: bytes) -> list[Box]:
        return self._found.get(kind, [])

    def one(self, kind: bytes) -> Box:
        found = self.all(kind)
        if len(found) != 1:
            raise DataError(f"{self._where}: its tables have {len(found)} boxes {kind.decode()!r} where one is needed")
        return found[0]

    def inside(self, kind: bytes) -> Boxes:
        box = self.one(kind)
        return Boxes(self._data, box.begin, box.end, self._where)


def array(moov: memoryview, box: Box, at: int, count: int, dtype: np.dtype, where: str) -> np.ndarray:
    """`count` entries from byte `at` of a box on, without a copy."""
    begin = box.begin + at
    if count * dtype.itemsize > box.end - begin:
        raise DataError(
            f"{where}: the box {box.kind.decode()!r} claims {count:,} entries, but its {max(box.end - begin, 0):,} bytes "
            f"hold {max(box.end - begin, 0) // dtype.itemsize:,}"
        )
    return np.frombuffer(moov, dtype, count, begin)
