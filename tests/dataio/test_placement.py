"""Placement: every process finds its rows by itself, and needs the same part of the data all the time."""

import numpy as np
import pytest

from tests.dataio.plan.plans import entry, plan
from tiphys.dataio.placement import Home, Placement, data_share


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_global_batches_are_the_same_for_any_number_of_processes(processes, replacement):
    p = plan(replacement=replacement)
    places = [Placement(p, Home(i, processes)) for i in range(processes)]
    for step in range(12):
        rows = [place.rows(step) for place in places]
        assert {len(r) for r in rows} <= {32 // processes, -(-32 // processes)}
        assert np.concatenate(rows).tolist() == list(range(32))
        parts = [p.windows(step, r) for r in rows]
        for together, apart in zip(p.windows(step), zip(*parts)):
            assert (together == np.concatenate(apart)).all()


def test_weights_divide_the_rows():
    p = plan(rows=100)
    weights = (1.0, 3.0, 0.0, 4.0)
    counts = np.array([[len(Placement(p, Home(i, 4, weights)).rows(s)) for i in range(4)] for s in range(50)])
    assert (counts.sum(1) == 100).all()
    assert np.abs(counts.mean(0) - np.array([12.5, 37.5, 0, 50])).max() < 0.1


def test_rows_of_a_home_come_only_from_its_part_of_the_data():
    """The parts of all homes add up to every bucket, and only buckets at the bounds of homes are shared."""
    p = plan([entry("a", 20000, 3)], buckets=32)
    shares = [data_share(p, Home(i, 5)) for i in range(5)]
    total = np.zeros(32)
    for i, share in enumerate(shares):
        seen = {int(b) for step in range(40) for b in p.row_buckets(step)[1][Placement(p, Home(i, 5)).rows(step)]}
        assert {b for b, part in share.items() if part > 0.05} <= seen <= set(share)
        np.add.at(total, list(share), list(share.values()))
    assert total == pytest.approx(np.ones(32))
    assert sum(len(s) for s in shares) <= 32 + 4


def test_rows_do_not_depend_on_earlier_calls():
    p = plan()
    late = Placement(p, Home(1, 3)).rows(1000)
    assert (Placement(plan(), Home(1, 3)).rows(1000) == late).all()
    p.log.append({"step": 500, "kind": "skip", "steps": 3})
    assert Placement(p, Home(0, 1)).rows(1000).tolist() == list(range(32))


def test_buckets_get_their_share_of_rows_in_any_span():
    p = plan([entry("a", 20000, 3)], buckets=32)
    _, low, high = p.segments(0)
    share = (high - low) / high[-1]
    for first, steps in ((0, 50), (123, 400)):
        rows = np.bincount(np.concatenate([p.row_buckets(s)[1] for s in range(first, first + steps)]), minlength=32)
        assert np.abs(rows - share * 32 * steps).max() < 4


def test_an_invalid_home_is_an_error():
    with pytest.raises(ValueError, match="count from 0"):
        Home(3, 3)
    with pytest.raises(ValueError, match="2 weights for 3"):
        Home(0, 3, (1.0, 1.0))
    with pytest.raises(ValueError, match="not all 0"):
        Home(0, 2, (0.0, 0.0))


@pytest.mark.parametrize("replacement", [True, False])
def test_more_processes_than_rows(replacement):
    """Up to two processes a row: each row is somewhere, and a process without rows gets empty columns."""
    p = plan(rows=6, replacement=replacement)
    whole = p.windows(4)
    for processes in range(1, 13):
        rows = [Placement(p, Home(i, processes)).rows(4) for i in range(processes)]
        parts = [p.windows(4, r) for r in rows]
        assert np.concatenate(rows).tolist() == list(range(6))
        for name in whole._fields:
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
