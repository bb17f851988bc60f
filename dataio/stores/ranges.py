"""Joins byte ranges of one object that lie close together into one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PART = 8 << 20  # most bytes of one request; larger reads are split into parallel requests
GAP = 2 << 10  # ranges this close are joined: the bytes between them cost less than another request


class Joined(NamedTuple):
    """One request that serves several ranges."""

    start: int
    size: int
    parts: list[tuple[int, int, int]]  # (number of the range, its offset within the request, its size)


def join_ranges(starts: Sequence[int], sizes: Sequence[int], gap: int = GAP, most: int = PART) -> list[Joined]:
    """Join ranges that overlap or have at most `gap` unwanted bytes between them.

    Joining makes no request larger than `most` bytes. Every range is served by exactly one request.
    """
    order = np.argsort(np.asarray(starts, np.int64), kind="stable")
    start, size = np.asarray(starts, np.int64)[order], np.asarray(sizes, np.int64)[order]
    reach = np.maximum.accumulate(start + size)
    cuts = np.flatnonzero(start[1:] > reach[:-1] + gap) + 1
    numbers, begins, lengths = order.tolist(), start.tolist(), size.tolist()
    joined: list[Joined] = []
    for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)]):
        if low < high:
            joined += _joined(numbers[low:high], begins[low:high], lengths[low:high], most)
    return joined


def _joined(numbers: list[int], starts: list[int], sizes: list[int], most: int) -> list[Joined]:
    """Ascending ranges that are all close enough, joined into requests of at most `most` bytes."""
    out: list[Joined] = []
    first, end = 0, starts[0] + sizes[0]
    for i in range(1, len(starts) + 1):
        if i < len(starts):
            grown = max(end, starts[i] + sizes[i])
            if grown - starts[first] <= max(most, end - starts[first]):
                end = grown
                continue
        begin = starts[first]
        parts = [(n, s - begin, z) for n, s, z in zip(numbers[first:i], starts[first:i], sizes[first:i])]
        out.append(Joined(begin, end - begin, parts))
        if i < len(starts):
            first, end = i, starts[i] + sizes[i]
    return out
