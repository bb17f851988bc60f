"""How many rows a unit holds: the number that costs least, from what units and bytes cost.

A window of K rows needs about (K − 1) / b + 1 units of b rows, and touches K + b − 1 rows. The cache misses a share m of these
bytes, whatever b is (Belady's bound counts bytes). A unit costs time in Python; a missed byte costs time on the network and in
copies. So a window costs least at b = √(unit · (K − 1) / (byte · m · row bytes)).

Two cases are simpler. If windows do not overlap (epochs over tiles), a unit is a tile. If all data of a process fits its cache,
every byte is fetched once, whatever b is; then a unit is an episode, up to 1 MiB. In all other cases b does not depend on the
number of processes, so that a cache on disk can still be used after that number changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

UNIT_SECONDS = 4.6e-6  # CPU time of a unit in plan, cache and copies (benchmarks/loader.py: units of 2 rows and of 6)
BYTE_SECONDS = 10e-9  # for a missed byte: a loader's share of a node's network is some 100 MB/s
MISSED = 0.4  # share of bytes: a cache of a quarter of the data
UNIT_BYTES = 8  # of the cache's memory for what it knows of a unit
_WHOLE = 1 << 20  # bytes of a unit if everything is kept


@dataclass(frozen=True)
class UnitRowsModel:
    """The choice of the rows of a unit for one loader.

    window   mean rows of a window
    share    of this process's data that its cache can hold (1: all)
    tile     rows of a tile if data is visited once an epoch; 0 otherwise
    room     most bytes for what the cache knows of the units
    total    bytes of the data; `total` and `room` bound the number of units
    """

    window: float
    share: float
    tile: int
    room: int
    total: int

    def rows(self, row_bytes: float) -> int:
        """Rows of a unit of a column whose rows have `row_bytes` bytes."""
        row_bytes = max(row_bytes, 1.0)
        if self.share >= 1:
            return max(1, int(_WHOLE / row_bytes))
        if self.tile:  # tiles do not overlap: a unit that is a tile is fetched for one window only
            return self.tile
        best = math.sqrt(UNIT_SECONDS * max(self.window - 1, 0.0) / (BYTE_SECONDS * MISSED * row_bytes))
        least = self.total * UNIT_BYTES / max(self.room, 1) / row_bytes  # keeps the number of units within `room`
        return max(1, round(min(best, self.window)), math.ceil(least))
