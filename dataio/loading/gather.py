"""Gathers the bytes that a step's windows need, from the units that hold them, into one piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiphys.dataio.format.places import STEPS

if TYPE_CHECKING:
    from tiphys.dataio.loading.units import Ints, Span, UnitMap, UnitRanges
    from tiphys.dataio.sampling import PlannedWindows

# (units, low, high, at, out): copies bytes [low, high) of each unit to `out[at:]` and returns the positions of the units that
# are not there. `Block.copy` is one.
Copy = Callable[["Ints", "Ints", "Ints", "Ints", memoryview], list[int]]
_ALIGNMENT = 64
UNWANTED, MISSING = -1, -2


class Gathered(NamedTuple):
    """Where each window's bytes lie.

    data   uint8: the bytes of all columns. The rows of `steps.npy` of the windows of one entry and task lie one after the other
    begin  field -> int64 [windows]: where the window's bytes begin in `data`; UNWANTED: the window does not need the field;
           MISSING: some of its bytes are not here
    size   field -> int64 [windows]: bytes
    """

    data: np.ndarray
    begin: dict[str, Ints]
    size: dict[str, Ints]

    def part(self, field: str, window: int) -> memoryview | None:
        """One window's bytes of a field; None if they are not here."""
        if field not in self.begin or (begin := int(self.begin[field][window])) < 0:
            return None
        return self.data.data[begin : begin + int(self.size[field][window])]


def gather(
    planned: PlannedWindows, units: UnitMap, spans: Sequence[Span], ranges: Sequence[UnitRanges], copy: Copy
) -> Gathered:
    """The bytes of a step's spans (UnitMap.spans). `ranges`: where the units of each span lie."""
    windows = len(planned.row)
    group = np.empty(windows, np.int64)  # puts the windows of an entry and task side by side
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
    # The tar header between two members is in no unit: its place is filled with zeros
    data = np.zeros(total, np.uint8) if _gaps(spans, ranges) else np.empty(total, np.uint8)
    out = data.data
    for span, where, place in zip(spans, ranges, places, strict=True):
        window = span.owner
        low = np.maximum(span.begin[window] - where.offset, 0)
        high = np.minimum(span.end[window] - where.offset, where.size)
        at = place[window] + where.offset + low - span.begin[window]
        missing = copy(span.units, low, high, at, out)
        if missing:
            begin[units.columns[span.column].field][span.window[window[missing]]] = MISSING
    return Gathered(data, begin, size)


def _gaps(spans: Sequence[Span], ranges: Sequence[UnitRanges]) -> bool:
    """Whether any window has bytes that belong to no unit that is needed."""
    for span, where in zip(spans, ranges, strict=True):
        if span.needed is not None:
            return True
        first = np.cumsum(span.high - span.low)[:-1]
        apart = where.offset[1:] != where.offset[:-1] + where.size[:-1]
        apart[first - 1] = False
        if apart.any():
            return True
    return False


def copy_from(get: Callable[[int], memoryview | None]) -> Copy:
    """A `Copy` from a function that returns a unit's bytes, or None."""

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
