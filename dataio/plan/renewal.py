"""How often a window of each kind comes into a row: renewal theory over a row's token budget.

A row is filled with windows drawn independently until one is shortened to fit, fills it exactly, or is of a kind of which not
even one unit fits what is left. `visits` computes for every token position the probability that a window is begun there. Kinds of
window that need more room come into a row less often than they are drawn; the plan divides by these chances, so that what is
*delivered* has the weights that were asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def visits(first: Floats, chance: Floats, cost: NDArray[np.int64], gap: NDArray[np.int64]) -> Floats:
    """Probability that a window begins at each position of a row, for many rows' distributions at once.

    Args:
        first: [positions, V], probability that the *second* window begins there (the first may follow a prompt).
        chance: [C, V], probability that a drawn window is of this class.
        cost: [C], positions that a window of the class takes, at least 1.
        gap: [C], how many of the row's last positions can no longer follow a window of this class. It is above 0 where
            the class's kind must have more room than this window takes.

    Returns [positions, V]; row 0 is 1.
    """
    positions, buckets = first.shape
    out = first.copy()
    out[0] = 1.0
    free = gap == 0
    dense = np.zeros((positions, buckets))  # of the classes that may begin anywhere: chance by cost
    inside = free & (cost < positions)
    np.add.at(dense, cost[inside], chance[inside])
    used = np.flatnonzero(dense.any(1))
    gapped = [(int(c), int(positions - g), p) for c, g, p in zip(cost[~free], gap[~free], chance[~free])]
    for j in range(1, positions):
        if len(used) * 2 < j:
            some = used[: np.searchsorted(used, j)]
            out[j] += np.einsum("cv,cv->v", dense[some], out[j - some])
        else:
            out[j] += np.einsum("cv,cv->v", dense[1:j], out[j - 1 : 0 : -1])
        for c, last, p in gapped:
            if c < j <= last:
                out[j] += p * out[j - c]
    return out


def up_to(cumulative: Floats, position: Floats, column: NDArray[np.int64]) -> Floats:
    """Sum of `visits` at positions ≤ `position` (which may lie between two), from their running sum [positions + 1, V]."""
    last = len(cumulative) - 2
    x = np.clip(position, 0, last)
    whole = np.minimum(x.astype(np.int64), last)
    part = x - whole
    low, high = cumulative[whole + 1, column], cumulative[np.minimum(whole + 2, last + 1), column]
    return low + part * (high - low)
