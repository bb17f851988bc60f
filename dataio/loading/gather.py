"""The bytes that a step's windows want, from the units that hold them, side by side in one piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiphys.dataio.index import STEPS

if TYPE_CHECKING:
    from tiphys.dataio.loading.units import Ints, Span, UnitMap, UnitRanges
    from tiphys.dataio.sampling import PlannedWindows

# Copies bytes [low, high) of units to `out[at:]`; returns the positions of those that are not there: `Block.copy`
Copy = Callable[["Ints", "Ints", "Ints", "Ints", memoryview], list[int]]
_ALIGNMENT = 64
UNWANTED, MISSING = -1, -2


class Gathered(NamedTuple):
    """Where each window's bytes lie.

    data   uint8: the bytes of all columns. The rows of `steps.npy` of the windows of one entry and task lie one after the other
    begin  field -> int64 [windows]: where the window's bytes begin in `data`; UNWANTED; MISSING: some could not be had
    size   field -> int64 [windows]
    """

    data: np.ndarray
    begin: dict[str, Ints]
    size: dict[str, Ints]

    def part(self, field: str, window: int) -> memoryview | None:
        """One window's bytes of a field; None where they are not here."""
        if field not in self.begin or (begin := int(self.begin[field][window])) < 0:
            return None
        return self.data.data[begin : begin + int(self.size[field][window])]


def gather(
    planned: PlannedWindows, units: UnitMap, spans: Sequence[Span], ranges: Sequence[UnitRanges], copy: Copy
) -> Gathered:
    """Bytes of the spans of a step (UnitMap.spans), where `ranges` are those of each span's units."""
    windows = len(planned.row)
    group = np.empty(windows, np.int64)  # windows of an entry and task stand together
    group[np.lexsort((planned.task, planned.entry))] = np.arange(windows)
    begin: dict[str, Ints] = {}
    size: dict[str, Ints] = {}
    places, total = [], 0
    for span in spans:
        field = units.columns[span.column].field
        bytes_, order = span.end - span.begin, np.argsort(group[span.window])
        room = bytes_[order] if field == STEPS else -(-bytes_[order] // _ALIGNMENT) * _ALIGNMENT
        place = np.empty(len(order), np.int64)
        place[order] = total + np.cumsum(room) - room
        total = -(-(total + int(room.sum())) // _ALIGNMENT) * _ALIGNMENT
        places.append(place)
        begin.setdefault(field, np.full(windows, UNWANTED))[span.window] = place
        size.setdefault(field, np.zeros(windows, np.int64))[span.window] = bytes_
    # Between two members lies a tar header, which is in no unit: zeros stand for it
    data = np.zeros(total, np.uint8) if _gaps(spans, ranges) else np.empty(total, np.uint8)
    out = data.data
    for span, where, place in zip(spans, ranges, places, strict=True):
        window = np.repeat(np.arange(len(place)), span.high - span.low)
        low = np.maximum(span.begin[window] - where.offset, 0)
        high = np.minimum(span.end[window] - where.offset, where.size)
        at = place[window] + where.offset + low - span.begin[window]
        missing = copy(span.units, low, high, at, out)
        if missing:
            begin[units.columns[span.column].field][span.window[window[missing]]] = MISSING
    return Gathered(data, begin, size)


def _gaps(spans: Sequence[Span], ranges: Sequence[UnitRanges]) -> bool:
    """Whether between two units of some window there are bytes of none."""
    for span, where in zip(spans, ranges, strict=True):
        first = np.cumsum(span.high - span.low)[:-1]
        apart = where.offset[1:] != where.offset[:-1] + where.size[:-1]
        apart[first - 1] = False
        if apart.any():
            return True
    return False


def copy_from(get: Callable[[int], memoryview | None]) -> Copy:
    """`Copy` over anything that gives a unit's bytes, or None."""

    def copy(units: Ints, low: Ints, high: Ints, at: Ints, out: memoryview) -> list[int]:
        missing = []
        for i, unit in enumerate(units.tolist()):
            data = get(unit)
            if data is None:
                missing.append(i)
            else:
                out[at[i] : at[i] + high[i] - low[i]] = data[low[i] : high[i]]
        return missing

    return copy
