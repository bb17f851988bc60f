"""Streaming: data that fit the cache are read once, in few requests, and no window is another for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import dataset, digest_batch
from servers import Fault, FaultyFront, Request, moto_server, s3_environment
from test_loader import NEEDS, make_plan, rows_of

from dataio.loader import CacheBudget, LoadedBatch, TrajectoryLoader
from dataio.loading.homes import bucket_bytes, home_bytes, home_units
from dataio.loading.stream import pieces
from dataio.loading.units import UnitMap
from dataio.placement import Home, Placement

EPISODES, STEPS, ROOMY = 120, 24, CacheBudget(memory=64 << 20)


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Any, FaultyFront]]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        yield dataset("s3://bucket/set", EPISODES), front


def load(index: Any, front: FaultyFront, cache: CacheBudget = ROOMY) -> list[LoadedBatch]:
    """All batches; after the first one, as slowly as the store is read."""
    out = []
    plan = make_plan(index)
    with TrajectoryLoader(plan, Home(0, 1), digest_batch, NEEDS, cache=cache, stop=STEPS, timeout=2.0) as loader:
        assert loader.describe()["whole_shards"] == (cache is ROOMY)
        for batch in loader:
            copied = {k: v.copy() for k, v in batch.arrays.items()}
            out.append(LoadedBatch(batch.step, copied, batch.counters, batch.quarantined))
            batch.release()
            seen = -1
            while batch.step == 0 and seen != len(front.requests):
                seen = len(front.requests)
                time.sleep(0.3)
    return out


def test_what_fits_is_read_once_in_few_requests(world: tuple[Any, FaultyFront]) -> None:
    index, front = world
    begun = len(front.requests)
    plain = rows_of(load(index, front, cache=CacheBudget(memory=1 << 20)))
    by_ones, begun = len(front.requests) - begun, len(front.requests)
    batches = load(index, front)
    assert rows_of(batches) == plain
    assert 2 * (len(front.requests) - begun) < by_ones
    units = UnitMap([index, index], NEEDS, 1 << 20)
    total = sum(column.total for column in units.columns)
    assert sum(b.counters["bytes_store"] for b in batches) < 1.5 * total  # the first steps fetched for themselves
    assert sum(b.counters["bytes_missed"] for b in batches[-2:]) == 0


def test_faults_while_streaming_change_no_window(world: tuple[Any, FaultyFront]) -> None:
    index, front = world
    plain = rows_of(load(index, front, cache=CacheBudget(memory=1 << 20)))
    rng, touched = np.random.default_rng(0), set[str]()

    def rule(request: Request) -> Fault | None:
        """The first answer of each shard is wrong; of the others some never come."""
        if ".tar" not in request.path:
            return None
        first = request.path not in touched
        touched.add(request.path)
        if first:
            return Fault(after=3000, flip=True)
        return (Fault(status=503, code="SlowDown"), Fault(after=999, cut=True), *[None] * 10)[rng.integers(12)]

    front.rule = rule
    try:
        assert rows_of(load(index, front)) == plain
    finally:
        front.rule = lambda request: None


def test_the_homes_divide_what_is_wanted(tmp_path: Path) -> None:
    index = dataset(str(tmp_path / "set"), EPISODES)
    plan, units = make_plan(index, buckets=32), UnitMap([index, index], NEEDS, 1 << 20)
    wanted = [home_units(Placement(plan, Home(p, 3)), units, 0) for p in range(3)]
    shared = sum(map(len, wanted)) - len(np.unique(np.concatenate(wanted)))
    assert shared <= 2 * units.units / 32 * 3  # of the buckets that are cut in two
    everything = home_units(Placement(plan, Home(0, 1)), units, 0)
    assert set(everything) == set(np.concatenate(wanted))
    weigh = bucket_bytes(plan, units)
    assert weigh.sum() == sum(column.total for column in units.columns)
    for p in range(3):
        inside = int(units.sizes(wanted[p]).sum())
        assert (
            0.95 < inside / home_bytes(Placement(plan, Home(p, 3)), weigh) <= 1
        )  # but for tar headers between members
    for step in range(20):
        for p in range(3):
            planned = plan.windows(step, Placement(plan, Home(p, 3)).rows(step))
            assert set(np.concatenate([span.units for span in units.spans(planned)])) <= set(wanted[p])


@pytest.mark.parametrize("most", [1, 50_000, 1 << 30])
def test_pieces_name_every_unit_once(tmp_path: Path, most: int) -> None:
    index = dataset(str(tmp_path / "set"), 40)
    units = UnitMap([index, index], NEEDS, 4)
    wanted = np.arange(units.units)[::2]
    found = list(pieces(units, wanted, most))
    assert np.sort(np.concatenate(found)).tolist() == wanted.tolist()
    assert all(units.sizes(piece).sum() <= most or len(piece) == 1 for piece in found)
    where = units.ranges(np.concatenate(found))
    place = where.shard << 40 | where.offset
    assert (np.diff(place) > 0).all()
