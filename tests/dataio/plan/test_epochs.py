"""Sampling without replacement: every tile comes exactly once in an epoch, in another order each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.dataio.plan.plans import columns, entry, mixture, plan
from tiphys.dataio.plan.epochs import floor_sum, rows_below
from tiphys.dataio.plan.mixture import UNIT


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 70), st.integers(-300, 300))
def test_floor_sum(n, modulus, slope, intercept):
    expected = sum((slope * i + intercept) // modulus for i in range(n))
    assert floor_sum(np.array([n]), modulus, slope, np.array([intercept]))[0] == expected


def test_rows_below_equals_counting():
    rows, slope, offset = 8, 10368889, 5_000_000
    cuts = np.array([0, 1, UNIT - 1, UNIT, 3 * UNIT + 12345, rows * UNIT])
    for steps in (0, 1, 2, 77):
        places = np.array([r * UNIT + (offset + slope * t) % UNIT for t in range(steps) for r in range(rows)])
        expected = [(places < c).sum() for c in cuts]
        assert rows_below(cuts, np.full(len(cuts), steps), slope, offset).tolist() == expected


def times_seen(drawn, i, e):
    """How often each unit of an entry was delivered, and the first unit of each episode."""
    mine = (drawn["entry"] == i) & ~drawn["prompt"]
    base = np.concatenate([[0], np.cumsum(e.lengths.units)])
    first = base[drawn["episode"][mine]] + drawn["start"][mine]
    seen = np.zeros(base[-1] + 1, np.int64)
    np.add.at(seen, first, 1)
    np.add.at(seen, first + drawn["units"][mine], -1)
    return np.cumsum(seen)[:-1], base


@pytest.mark.parametrize("buckets", [1, 8])
def test_every_unit_comes_once_in_an_epoch(buckets):
    """The units of a bucket of an entry have come equally often, or once more. Epochs are as fast as the weights say."""
    entries = mixture(fixed=12)
    p = plan(entries, replacement=False, buckets=buckets)
    drawn = columns(p, range(600))
    told = p.describe()["entries"]
    for i, (name, e) in enumerate(zip("ab", entries)):
        seen, base = times_seen(drawn, i, e)
        bucket = np.repeat(e.index.hash % np.uint64(buckets), e.lengths.units).astype(int)
        for b in range(buckets):
            assert np.ptp(seen[bucket == b]) <= 1
        assert seen.mean() == pytest.approx(600 / told[name]["steps_per_epoch"], rel=0.03)
        assert seen.max() >= 1
        assert len(base) == e.index.episodes + 1


def test_windows_are_tiles_or_parts_of_tiles():
    entries = mixture()
    drawn = columns(plan(entries, replacement=False), range(100))
    windows = ~drawn["prompt"]
    size = np.where(drawn["entry"] == 0, 20, 16)
    first, last = drawn["start"] // size, (drawn["start"] + drawn["units"] - 1) // size
    assert (first == last)[windows].all()
    # Tiles are cut only at the ends of a row. All others are whole.
    length = np.where(drawn["entry"] == 0, *(e.lengths.units[drawn["episode"] % e.index.episodes] for e in entries))
    whole = (drawn["start"] % size == 0) & (drawn["units"] == np.minimum(size, length - drawn["start"]))
    row = (drawn["step"] * 32 + drawn["row"])[windows]
    inner = np.flatnonzero((row[1:-1] == row[:-2]) & (row[1:-1] == row[2:])) + 1
    assert len(inner) > 1000
    assert whole[windows][inner].all()


def test_epochs_have_independent_random_orders():
    """The orders of two epochs are independent, and so are neighbours in a row."""
    e = entry("a", 4000, 1, per_unit=(10,))
    p = plan([e], replacement=False, buckets=1)
    steps = int(p.describe()["entries"]["a"]["steps_per_epoch"])
    drawn = columns(p, range(2 * steps))
    tile = drawn["episode"] * 100 + drawn["start"] // 20
    tile = tile[np.append(True, np.diff(tile) != 0)]  # a tile that is cut at the end of a row comes twice
    half = len(tile) // 2
    pairs_of = [set(zip(t[:-1].tolist(), t[1:].tolist())) for t in (tile[:half], tile[half:])]
    assert len(pairs_of[0] & pairs_of[1]) < 1e-3 * half
    place = (tile[:20000] // 100 * 16) // 4000
    pairs = np.bincount(place[:-1] * 16 + place[1:], minlength=256)
    once = np.bincount(place, minlength=16) / len(place)
    assert chisquare(pairs, np.outer(once, once).ravel() * pairs.sum()).pvalue > 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_tiles_that_come_early_in_one_epoch_come_anywhere_in_the_next(seed):
    """Even if an epoch has few blocks. So a cache that keeps what came first is equally useful all through later epochs."""
    e = entry("a", 700, 1, per_unit=(10,))
    p = plan([e], replacement=False, buckets=1, seed=seed)
    steps = int(p.describe()["entries"]["a"]["steps_per_epoch"])
    drawn = columns(p, range(4 * steps))
    tile = drawn["episode"] * 100 + drawn["start"] // 20
    epoch = drawn["step"] // steps
    early = np.unique(tile[drawn["step"] < steps // 5])
    for number in range(1, 4):
        parts = np.array_split(np.isin(tile[epoch == number], early), 5)
        assert all(0.5 < part.mean() / 0.2 < 1.6 for part in parts)


def test_a_change_of_weights_continues_the_epoch():
    entries = mixture(prompt=0.0)
    p = plan(entries, replacement=False, buckets=8)
    p.log.append({"step": 150, "kind": "weights", "weights": {"a": 1, "b": 5}})
    drawn = columns(p, range(400))
    for i, e in enumerate(entries):
        seen, _ = times_seen(drawn, i, e)
        bucket = np.repeat(e.index.hash % np.uint64(8), e.lengths.units).astype(int)
        assert max(np.ptp(seen[bucket == b]) for b in range(8)) <= 1
    late = (drawn["step"] >= 150) & (drawn["start"] % np.where(drawn["entry"] == 0, 20, 16) == 0)
    assert (drawn["entry"][late] == 1).mean() == pytest.approx(5 / 6, abs=0.02)


def test_units_of_skipped_steps_are_missing_from_their_epoch():
    entries = [entry("a", 3000, 1, per_unit=(10,))]
    p = plan(entries, replacement=False, buckets=1)
    p.log.append({"step": 20, "kind": "skip", "steps": 10})
    steps = int(p.describe()["entries"]["a"]["steps_per_epoch"])
    seen, _ = times_seen(columns(p, range(steps - 10)), 0, entries[0])
    assert seen.max() == 1
    lost = (seen == 0).mean()
    assert lost == pytest.approx(10 / steps, rel=0.2)


def test_episodes_of_priority_zero_are_never_drawn():
    priority = np.ones(2000, np.float32)
    priority[::3] = 0
    drawn = columns(plan([entry("a", 2000, 2, priority=priority)], replacement=False), range(50))
    assert (drawn["episode"] % 3 != 0).all()


def test_an_entry_that_is_smaller_than_a_row():
    tiny = entry("a", 2, 1, per_unit=(1,), steps=30)
    drawn = columns(plan([tiny], replacement=False, rows=4), range(10))
    seen, _ = times_seen(drawn, 0, tiny)
    assert np.ptp(seen) <= 1
    assert seen.min() > 20


def test_text_fills_rows_to_the_last_token():
    text = entry("text", 3000, 1, window=256, per_unit=(1,), steps=100)
    drawn = columns(plan([text], replacement=False, budget=256), range(40))
    tokens = np.bincount(drawn["step"] * 32 + drawn["row"], drawn["tokens"])
    assert (tokens == 256).all()
