"""Trial rows: what one draw of each stratum delivers, on average, under given chances.

The rooms of draws are measured on trial rows. What a draw of a stratum delivers in these rooms is calculated from a sample of its
episodes. So the result is as exact for rare strata as for common ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.draws import Drawer, Ints

if TYPE_CHECKING:
    from tiphys.dataio.plan.index import PlanIndex
    from tiphys.dataio.plan.mixture import Mix

_ROWS = 16384  # trial rows of one round
_DRAWS = 1 << 18  # sampled draws of all strata together
_LEAST, _MOST = 1024, 16384  # fewest and most sampled draws of one stratum
_SEED = 0x7469706879  # trial rows do not depend on the run's seed
Floats = NDArray[np.float64]


class Trial:
    """Draws trial rows from an index."""

    def __init__(self, index: PlanIndex) -> None:
        self.index = index
        number = len(index.strata)
        mass, content = index.cell_mass, index.content.reshape(index.buckets, -1)
        total = mass.sum(0)
        self.present = np.flatnonzero(total > 0).tolist()
        # Mean tokens of a window if the room is not short
        self._whole = np.divide(content.sum(0), total, where=total > 0, out=np.zeros(number))
        self._draws = int(np.clip(_DRAWS // max(number, 1), _LEAST, _MOST))
        self._points = (np.arange(self._draws) + 0.5) / self._draws

    def run(self, mix: Mix, number: int) -> tuple[Floats, Floats]:
        """Windows and tokens [strata] that a row delivers of each stratum, divided by the chance that a draw is of the stratum.

        number  number of the round; each round draws other rows
        """
        index, strata = self.index, self.index.strata
        drawer = Drawer(index, mix, index.budget, _SEED)
        drawer.rooms = []
        position = ((np.arange(_ROWS) + 0.5) / _ROWS * mix.cut[-1]).astype(np.int64)
        bucket = np.searchsorted(mix.cut, position, side="right") - 1
        drawer.rows(np.full(_ROWS, number), np.arange(_ROWS), bucket)
        rooms = np.sort(np.concatenate([np.zeros(0, np.int64), *drawer.rooms]))
        windows, tokens = np.zeros(len(strata)), np.zeros(len(strata))
        for s in self.present:
            least, full = np.searchsorted(rooms, [index.least[s], strata.full[s]])
            prompted = float(strata.prompt[s]) if drawer.reserve[s] > 0 else 0.0
            whole = 1.0 - prompted + (len(rooms) - full) / _ROWS  # slot 1 of a row without a prompt has the whole row
            windows[s], tokens[s] = whole, whole * self._whole[s]
            if least < full:
                accepted, mean = self._delivered(drawer, s, rooms[least:full])
                windows[s] += accepted * (full - least) / _ROWS
                tokens[s] += mean * (full - least) / _ROWS
            if prompted:  # the window after a prompt is drawn until one is accepted
                accepted, mean = self._delivered(drawer, s, np.array([index.budget - drawer.reserve[s]]))
                windows[s] += prompted
                tokens[s] += prompted * mean / max(accepted, 1e-12)
        return windows, tokens

    def _delivered(self, drawer: Drawer, s: int, rooms: Ints) -> tuple[float, float]:
        """Chance that a draw of a stratum is accepted in one of the rooms, and its mean tokens (refused draws count as 0)."""
        index, number = self.index, len(self.index.strata)
        generator = np.random.Generator(np.random.Philox(key=_SEED, counter=s))
        mass = index.cell_mass[:, s]
        running = np.cumsum(mass)
        bucket = np.searchsorted(running, self._points * running[-1])
        high, low, chance = ((generator.permuted(self._points) * 2.0**32).astype(np.uint64) for _ in range(3))
        room = generator.permuted(rooms[(self._points * len(rooms)).astype(np.int64)])
        _, _, _, cost, accepted = drawer.take(bucket * number + s, high, low, chance, room)
        return float(accepted.mean()), float((accepted * cost).mean())
