"""Each row has the picture that is shown nearest to its time: exactly, a tie takes the earlier, and nothing far away is taken."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataio.videos import Clip, make, track
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.frame_times import nearest, nearest_frames, query_times


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True).map(sorted),
    st.integers(1, 10**6),
    st.lists(st.floats(-1, 200), max_size=20),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_choice_is_that_of_exact_arithmetic(pts, scale, seconds, data):
    halves = st.integers(0, len(pts) - 1).map(lambda i: float((pts[i] + pts[i - 1]) / 2 / scale))
    seconds += data.draw(st.lists(halves, max_size=5))
    found = nearest(np.array(pts), Fraction(1, scale), np.array(seconds), np.inf, "x")
    for second, i in zip(seconds, found.tolist(), strict=True):
        exact = [abs(Fraction(p, scale) - Fraction(second)) for p in pts]
        assert i == exact.index(min(exact))


def test_a_tie_takes_the_earlier_picture():
    found = nearest(np.array([0, 1, 2, 3]), Fraction(1, 2), np.array([0.25, 0.75, 0.75 + 1e-12, 1.25]), 1.0, "x")
    assert found.tolist() == [0, 1, 2, 2]


def test_the_edge_of_the_tolerance_is_exact():
    pts, tick = np.array([0, 1]), Fraction(1, 8)
    assert nearest(pts, tick, np.array([0.125 + 2**-10]), 2**-10, "x").tolist() == [1]
    with pytest.raises(DataError, match=r"^x: no frame at 0\.1260 s; the nearest is at 0\.1250 s\. Row 7 needs one"):
        nearest(pts, tick, np.array([0.125 + 2**-10 + 2**-40]), 2**-10, "x", first_row=7)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="row 1 is"):
            nearest(pts, tick, np.array([0.0, bad]), np.inf, "x")


def test_times_of_long_videos_find_their_frames_where_floor_does_not():
    """float32 times of row k of 30 frames per second, in an episode that begins at 3,000 s of a long file."""
    rows = np.arange(90_000)
    stamps = (rows / 30).astype(np.float32)
    seconds, tolerance = query_times(3000.0, stamps)
    assert tolerance.max() > 1e-4 == tolerance.min()
    found = nearest(np.arange(200_000) * 512, Fraction(1, 15360), seconds, tolerance, "x")
    assert np.array_equal(found, rows + 90_000)
    assert (np.floor(seconds * 30) != rows + 90_000).mean() > 0.2


def test_hidden_pictures_are_never_chosen():
    found = track(make(Clip(frames=12, gop=4, b_frames=2)))
    hidden = np.isin(found.rank, [0, 5])
    object.__setattr__(found, "shown", ~hidden)
    frames = nearest_frames(found, np.array([0.0, 4.9 / 30, 5.1 / 30]), 1.0, "x")
    assert frames.tolist() == [1, 4, 6]
