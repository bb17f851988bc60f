"""Streaming: data that fits the cache is read once, in few requests, and this changes no window."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.loading_fixtures import copied, dataset, digest_batch
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.servers import Fault, FaultyFront, Request, moto_server, s3_environment
from tiphys.dataio.cache import RangeCache
from tiphys.dataio.loader import CacheBudget, LoadedBatch, LoaderSettings, TrajectoryLoader
from tiphys.dataio.loading import shared_memory
from tiphys.dataio.loading.homes import bucket_bytes, home_bytes, home_units
from tiphys.dataio.loading.process import LoaderProcess
from tiphys.dataio.loading.stream import FLYING, pieces, stream
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home, Placement

EPISODES, STEPS, ROOMY = 120, 24, CacheBudget(memory=64 << 20)


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Any, FaultyFront]]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        yield dataset("s3://bucket/set", EPISODES), front


def load(index: Any, front: FaultyFront, cache: CacheBudget = ROOMY) -> list[LoadedBatch]:
    """All batches. After the first one, this waits until the loader makes no more requests."""
    out, settings = [], LoaderSettings(cache=cache, timeout=2.0)
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=STEPS) as loader:
        assert loader.cache_plan()["whole_shards"] == (cache is ROOMY)
        for batch in loader:
            out.append(copied(batch))
            seen = -1
            while batch.step == 0 and seen != len(front.requests):
                seen = len(front.requests)
                time.sleep(0.3)
    return out


def test_data_that_fits_is_read_once_in_few_requests(world: tuple[Any, FaultyFront]) -> None:
    index, front = world
    begun = len(front.requests)
    plain = rows_of(load(index, front, cache=CacheBudget(memory=1 << 20)))
    on_demand, begun = len(front.requests) - begun, len(front.requests)
    batches = load(index, front)
    assert rows_of(batches) == plain
    assert 2 * (len(front.requests) - begun) < on_demand
    units = UnitMap([index, index], NEEDS, 1 << 20)
    total = sum(column.total for column in units.columns)
    # More than once, because the first steps fetch what has not been streamed yet
    assert sum(b.counters["bytes_store"] for b in batches) < 1.5 * total
    assert sum(b.counters["bytes_missed"] for b in batches[-2:]) == 0


def test_faults_while_streaming_change_no_window(world: tuple[Any, FaultyFront]) -> None:
    index, front = world
    plain = rows_of(load(index, front, cache=CacheBudget(memory=1 << 20)))
    rng, touched = np.random.default_rng(0), set[str]()

    def rule(request: Request) -> Fault | None:
        """The first answer for each shard is wrong; some of the others are refused or truncated."""
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


def test_the_homes_divide_the_data(tmp_path: Path) -> None:
    index = dataset(str(tmp_path / "set"), EPISODES)
    plan, units = make_plan(index, buckets=32), UnitMap([index, index], NEEDS, 1 << 20)
    wanted = [home_units(Placement(plan, Home(p, 3)), units, 0) for p in range(3)]
    shared = sum(map(len, wanted)) - len(np.unique(np.concatenate(wanted)))
    assert shared <= 2 * units.units / 32 * 3  # only units of buckets that are cut in two
    everything = home_units(Placement(plan, Home(0, 1)), units, 0)
    assert set(everything) == set(np.concatenate(wanted))
    weigh = bucket_bytes(plan, units)
    assert weigh.sum() == sum(column.total for column in units.columns)
    for p in range(3):
        inside = int(units.sizes(wanted[p]).sum())
        # Tar headers between members are in no unit
        assert 0.95 < inside / home_bytes(Placement(plan, Home(p, 3)), weigh) <= 1
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


class SlowStore:
    """A stand-in for a Fetcher that counts the bytes in flight: asked for and not yet dropped by the reader."""

    def __init__(self, units: UnitMap, rng: np.random.Generator) -> None:
        self.units, self.rng, self.flying, self.most = units, rng, 0, 0

    async def fetch(self, wanted: np.ndarray, put: Callable[[int, Any], None]) -> dict[int, Exception]:
        sizes = self.units.sizes(wanted).tolist()
        self.flying += sum(sizes)
        self.most = max(self.most, self.flying)
        await asyncio.sleep(self.rng.uniform(0, 0.02))
        for unit, size in zip(wanted.tolist(), sizes, strict=True):
            put(unit, bytes(size))
        return {}


class Watched(RangeCache):
    """Checks the bytes of all that is alive, at the moments at which they are most."""

    store: SlowStore
    budget: int

    def check(self) -> None:
        assert self.occupied + self.staged + self.store.flying <= self.budget

    def offer(self, data: Mapping[int, Any]) -> bool:
        kept = super().offer(data)
        self.check()  # now both the piece and the copy of it are alive
        self.store.flying -= sum(map(len, data.values()))
        return kept


@pytest.mark.parametrize("share", [0.7, 0.98, 1.6])
def test_pieces_in_flight_never_exceed_the_budget(tmp_path: Path, share: float) -> None:
    """Steps fill the cache at the same time, with the same data and with other data."""
    index, most = dataset(str(tmp_path / "set"), 40), 8_000
    units, rng = UnitMap([index, index], NEEDS, 2), np.random.default_rng(int(share * 100))
    total, aside = int(units.sizes(np.arange(units.units)).sum()), FLYING * most
    drawn = [rng.integers(0, units.units, 20) for _ in range(150)]

    async def steps(cache: Watched) -> None:
        while cache.can_open():
            block = cache.open()
            cache.check()
            await asyncio.sleep(0)
            sizes = units.sizes(block.misses).tolist()
            for unit, size in zip(block.misses.tolist(), sizes, strict=True):
                block.put(unit, bytes(size))
            block.close()
            cache.check()

    async def both() -> tuple[int, int]:
        memory = int(share * total)
        cache = Watched(
            units.units, units.sizes, drawn.__getitem__, total=total, memory=memory, stop=150, staging=total // 8
        )
        cache.store, cache.budget = SlowStore(units, rng), memory + aside
        fetcher: Any = cache.store
        await asyncio.gather(stream(units, np.arange(units.units), fetcher, cache, most), steps(cache))
        assert cache.free == cache.capacity - cache.occupied  # all lent room came back
        return cache.store.most, len(cache.absent(np.arange(units.units)))

    flown, absent = asyncio.run(both())
    assert flown > aside  # room was borrowed
    assert absent == 0 or share < 1


@pytest.mark.parametrize("restarted", [False, True])
def test_an_error_of_streaming_that_is_not_a_store_error_ends_the_loader_while_steps_wait(
    world: tuple[Any, FaultyFront], monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """This also holds for the streaming that a new cache starts."""
    streams = iter([asyncio.Event().wait] if restarted else [])

    async def broken(*_: Any) -> None:
        for wait in streams:
            await wait()
        raise ZeroDivisionError

    monkeypatch.setattr("tiphys.dataio.loading.process.stream", broken)
    settings = LoaderSettings(cache=ROOMY, prefetch=1)
    loader = TrajectoryLoader(make_plan(world[0]), Home(0, 1), digest_batch, NEEDS, settings=settings)
    ours, theirs = multiprocessing.Pipe()  # nothing reads from it, so that later batches find no room
    memory = shared_memory.create()

    async def run() -> None:
        process = LoaderProcess(loader._spec(), theirs, memory)
        running = asyncio.create_task(process.run())
        if restarted:
            await asyncio.wait_for(process._begun.wait(), 30)
            await process._restart_cache(process.cache.next)
        await asyncio.wait_for(running, 30)

    with ours, theirs, pytest.raises(ZeroDivisionError):
        asyncio.run(run())
    os.close(memory)
