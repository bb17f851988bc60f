"""Ranges of integers: those of integer spaces, entry by entry, as a FieldSpec holds them, and many at once. Needs only NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_VALUES = 1 << 16  # of an entry; more values than any vocabulary has


def integer_range(low: Any, high: Any) -> dict[str, Any]:
    """`values`, `low` and `high` of the FieldSpec of an integer space with these bounds, both included.

    Only `values` if all entries begin at 0 and end alike. Nothing, so that the range is unknown, if an entry has more than
    MOST_VALUES values: then the space only says which integers its dtype can hold.

    Raises
    ------
    ValueError
        If an entry has no value.
    """
    least, most = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    if not least.size or not (np.isfinite(least).all() and np.isfinite(most).all()):
        return {"values": 0}
    count = most - least + 1
    if count.min() < 1:
        raise ValueError(f"an entry goes from {least.flat[count.argmin()]:g} to {most.flat[count.argmin()]:g}")
    if count.max() > MOST_VALUES:
        return {"values": 0}
    values = int(count.max())
    if not least.any() and count.min() == values:
        return {"values": values}
    return {"values": values, "low": compact(least), "high": compact(most)}


def compact(bound: np.ndarray) -> tuple[float, ...]:
    """One number if all entries are equal, else one for each entry, in C order."""
    flat = np.asarray(bound, np.float64).reshape(-1)
    return (float(flat[0]),) if bool(np.all(flat == flat[0])) else tuple(flat.tolist())


def expand(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """All integers of the ranges [low, high), one range after the other."""
    count = high - low
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(low - (ends - count), count)
