"""How many rows are fetched and cached as one: a run of b rows, by what units and bytes cost.

A window of K rows needs about (K − 1) / b + 1 units and touches K + b − 1 rows, of which a cache misses a share m, whatever b is
(Belady's bound is one of bytes). Each unit costs time in Python, each missed byte time on the network and in copies, so a window
costs least at b = √(unit · (K − 1) / (byte · m · row bytes)). Two cases are simpler. Where windows do not overlap (epochs over
tiles), a unit is a tile. Where all data of a process fit its cache, every byte is fetched once whatever b is: then a unit is an
episode, up to 1 MiB. Otherwise b does not depend on the number of processes, so that a cache on disk outlives a change of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

UNIT_SECONDS = 4.6e-6  # of CPU for a unit: plan, cache, pieces (benchmarks/loader.py: runs of 2 against runs of 6 rows)
BYTE_SECONDS = 10e-9  # for a missed byte: a loader's share of a node's network is some 100 MB/s
MISSED = 0.4  # share of bytes: a cache of a quarter of the data
UNIT_BYTES = 8  # of the cache's memory for what it knows of a unit
_WHOLE = 1 << 20  # bytes of a unit where everything is kept


@dataclass(frozen=True)
class RunModel:
    """The choice of run lengths for one loader.

    window   mean rows of a window
    share    of this process' data that its cache can hold (1: all)
    tile     rows of a tile where data are visited once an epoch; 0 otherwise
    room     bytes that what is known of units may take
    total    bytes of the data; with `room` it bounds the number of units
    """

    window: float
    share: float
    tile: int
    room: int
    total: int

    def rows(self, row_bytes: float) -> int:
        """Rows of a unit of a column whose rows have so many bytes."""
        row_bytes = max(row_bytes, 1.0)
        if self.share >= 1:
            return max(1, int(_WHOLE / row_bytes))
        if self.tile:  # tiles do not overlap: a unit that is a tile is fetched for one window only
            return self.tile
        best = math.sqrt(UNIT_SECONDS * max(self.window - 1, 0.0) / (BYTE_SECONDS * MISSED * row_bytes))
        least = self.total * UNIT_BYTES / max(self.room, 1) / row_bytes  # so that the units' places fit their room
        return max(1, round(min(best, self.window)), math.ceil(least))
