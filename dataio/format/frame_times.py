"""Which picture of a video belongs to the time of a row.

LeRobot gives each row a time: seconds since its episode began, as float32, and for each camera the second of the video at which
the episode begins. The row's picture is the one that is shown nearest to their sum. Distances are compared exactly, because times
in the middle between two pictures and times at the edge of the tolerance must not depend on how a sum was rounded.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from tiphys.dataio.format.mp4 import Track

TOLERANCE = 1e-4  # seconds, as in LeRobot
_CLOSE = 1e-6  # seconds; float64 tells larger differences of times of up to 100 years


def query_times(start: float, timestamps: np.ndarray, tolerance: float = TOLERANCE) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the video at which rows are shown, and how far a picture may be from each of them.

    Parameters
    ----------
    start : float
        `from_timestamp` of the episode and of this camera: seconds.
    timestamps : float32 [k]
        `timestamp` of each row.
    tolerance : float
        Seconds.

    Returns
    -------
    seconds : float64 [k]
    tolerance : float64 [k]
        At least one step of float32 at the row's timestamp, which is more than 1e-4 s after 2,048 s.
    """
    times = np.asarray(timestamps, np.float32)
    with np.errstate(invalid="ignore"):  # NaN of damaged data, for which no picture is found
        return start + times.astype(np.float64), np.maximum(tolerance, np.spacing(np.abs(times)).astype(np.float64))


def nearest(
    pts: np.ndarray, tick: Fraction, seconds: np.ndarray, tolerance: float | np.ndarray, where: str, first_row: int = 0
) -> np.ndarray:
    """The picture that is shown nearest to each time; of two that are equally near, the earlier one.

    Parameters
    ----------
    pts : int64 [n]
        When the pictures are shown, ascending, in ticks.
    tick : Fraction
        Seconds of a tick.
    seconds : float64 [k]
        Times, in any order.
    tolerance : float or float64 [k]
        Seconds by which a picture may be earlier or later.
    where, first_row
        Of messages: the video's name, and the row of the first time.

    Returns
    -------
    int64 [k]
        Numbers of pictures.

    Raises
    ------
    DataError
        If no picture is near enough: a video that does not fit its rows is never shifted.
    """
    seconds = np.asarray(seconds, np.float64)
    allowed = np.broadcast_to(np.asarray(tolerance, np.float64), seconds.shape)
    if not len(seconds):
        return np.zeros(0, np.int64)
    if not np.isfinite(seconds).all():
        row = int(np.argmin(np.isfinite(seconds)))
        raise DataError(f"{where}: the time of row {first_row + row} is {seconds[row]}")
    if not len(pts):
        raise DataError(f"{where}: shows no picture")
    times = pts * float(tick)
    right = np.clip(np.searchsorted(times, seconds), 1, max(len(pts) - 1, 1))
    left, right = right - 1, np.minimum(right, len(pts) - 1)
    before, after = np.abs(seconds - times[left]), np.abs(times[right] - seconds)
    out = np.where(after < before, right, left)
    for row in np.flatnonzero(np.abs(after - before) < _CLOSE).tolist():
        out[row] = _exactly(pts, tick, float(seconds[row]), int(left[row]))
    away = np.abs(times[out] - seconds)
    bad = away > allowed
    for row in np.flatnonzero(np.abs(away - allowed) < _CLOSE).tolist():
        bad[row] = abs(int(pts[out[row]]) * tick - Fraction(float(seconds[row]))) > Fraction(float(allowed[row]))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{where}: no frame at {seconds[row]:.4f} s; the nearest is at {times[out[row]]:.4f} s. Row {first_row + row} needs "
            f"one within {allowed[row] * 1000:.4g} ms: the video does not fit its rows"
        )
    return out


def _exactly(pts: np.ndarray, tick: Fraction, second: float, near: int) -> int:
    """The same as `nearest` for one time, in exact arithmetic among the neighbours of the picture `near`."""
    low, high = max(near - 2, 0), min(near + 4, len(pts))
    ticks = Fraction(second) / tick
    return min(range(low, high), key=lambda i: (abs(int(pts[i]) - ticks), i))


def nearest_frames(
    track: Track, seconds: np.ndarray, tolerance: float | np.ndarray, where: str, first_row: int = 0
) -> np.ndarray:
    """int64 [k]: display positions of the pictures of `track` that are nearest to some times; see `nearest`.

    Pictures that the edit list hides are never chosen.
    """
    shown = track.order[track.shown[track.order]]
    found = nearest(track.pts[shown], Fraction(1, track.timescale), seconds, tolerance, where, first_row)
    return track.rank[shown][found]
