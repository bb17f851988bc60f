"""Ranges of one object that lie close to each other, joined to one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PART = 8 << 20  # bytes of one request at most; larger reads go in parallel parts
GAP = 2 << 10  # ranges closer than this are one request: what lies between costs less than a request of its own


class Joined(NamedTuple):
    """One request that serves several ranges: `parts` are (number of the range, offset within the request, size)."""

    start: int
    size: int
    parts: list[tuple[int, int, int]]


def join_ranges(starts: Sequence[int], sizes: Sequence[int], gap: int = GAP, most: int = PART) -> list[Joined]:
    """Neighbouring or overlapping ranges as one request where at most `gap` unwanted bytes lie between them.

    No request grows beyond `most` bytes by joining. Every range is served by exactly one request.
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
    """Ranges that ascend and may all be joined, as requests of at most `most` bytes."""
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
