"""Faults between the loader and the data: the windows are the same as without faults, or an error says what is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.dataio.loading_fixtures import copied, dataset, digest_batch
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.processes import REPOSITORY
from tests.servers import Fault, FaultyFront, Request, moto_server, s3_environment
from tiphys.dataio.episode import DataError
from tiphys.dataio.loader import CacheBudget, LoadedBatch, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.storage import AccessError, ObjectChanged, Store, StoreError

STEPS = 6
SMALL = CacheBudget(memory=1 << 20)


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Any, FaultyFront]]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        yield dataset("s3://bucket/set"), front


@pytest.fixture
def index(world: tuple[Any, FaultyFront]) -> Any:
    return world[0]


@pytest.fixture
def front(world: tuple[Any, FaultyFront]) -> Iterator[FaultyFront]:
    yield world[1]
    world[1].rule = lambda request: None
    world[1].faults = 0


def load(
    index: Any,
    cache: CacheBudget = SMALL,
    each: Callable[[LoadedBatch], None] | None = None,
    attempts: int = 8,
    prefetch: int = 256 << 20,
    timeout: float = 0.5,
) -> list[LoadedBatch]:
    """All batches. `each` is called with every batch before the next one is asked for."""
    batches, settings = [], LoaderSettings(cache=cache, timeout=timeout, attempts=attempts, prefetch=prefetch)
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=STEPS) as loader:
        for batch in loader:
            if each is not None:
                each(batch)
            batches.append(copied(batch))
    return batches


@pytest.fixture(scope="module")
def reference(world: tuple[Any, FaultyFront]) -> dict[tuple[int, int], bytes]:
    return rows_of(load(world[0]))


def some(share: float, *faults: Fault) -> Callable[[Request], Fault | None]:
    """A rule that puts one of these faults on a share of the requests for shards. The choice is the same in every run."""
    rng = random.Random(0)

    def rule(request: Request) -> Fault | None:
        return rng.choice(faults) if ".tar" in request.path and rng.random() < share else None

    return rule


FAULTS = {
    "server errors": (0.3, Fault(status=500), Fault(status=502)),
    "slow down": (0.3, Fault(status=503, code="SlowDown"), Fault(status=429)),
    "resets and truncation": (0.2, Fault(reset=True), Fault(after=50, reset=True), Fault(after=50, cut=True)),
    "stalls": (0.03, Fault(after=20, stall=20.0)),
    "wrong bytes": (0.1, Fault(after=9, flip=True), Fault(after=0, flip=True)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_cost_time_and_nothing_else(
    name: str, index: Any, front: FaultyFront, reference: dict[tuple[int, int], bytes]
) -> None:
    share, *faults = FAULTS[name]
    front.rule = some(share, *faults)
    batches = load(index)
    assert front.faults > 0
    assert rows_of(batches) == reference
    assert [b.quarantined for b in batches] == [[]] * STEPS


def test_a_store_that_is_away_for_a_while_changes_no_window(
    index: Any, front: FaultyFront, reference: dict[tuple[int, int], bytes]
) -> None:
    def each(batch: LoadedBatch) -> None:
        if batch.step == 0:
            front.away(1.0)

    assert rows_of(load(index, each=each)) == reference


def test_a_store_that_cannot_be_reached_is_an_error_that_names_the_object(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens on port 9 ("discard")
    with pytest.raises(
        StoreError, match=r"s3://bucket/set/shards/\d{6}\.tar, bytes \d+–\d+: could not be read in 3 tries"
    ):
        load(index, attempts=3)


def test_expired_credentials_are_an_error_at_once(index: Any, front: FaultyFront) -> None:
    front.rule = some(1.0, Fault(status=400, code="ExpiredToken"))
    began = time.monotonic()
    with pytest.raises(AccessError, match=r"\.tar.*ExpiredToken.*credentials") as caught:
        load(index)
    assert "test-secret" not in repr(caught.value) + "".join(caught.value.__notes__)
    assert time.monotonic() - began < 15


def test_a_long_refusal_is_waited_out_with_few_requests(
    index: Any, front: FaultyFront, reference: dict[tuple[int, int], bytes]
) -> None:
    """Every request is refused for a while: the loader slows down instead of sending more requests."""
    front.requests.clear()
    until: list[float] = []  # counted from the first request, which comes late on a busy machine

    def refuse(request: Any) -> Fault | None:
        if ".tar" not in request.path:
            return None
        until.append(time.monotonic() + 1.5)
        return Fault(status=503, code="SlowDown") if time.monotonic() < until[0] else None

    front.rule = refuse
    batches = load(index)
    assert rows_of(batches) == reference
    assert sum(b.counters["throttled"] for b in batches) > 0
    first_tries = sum(b.counters["requests"] - b.counters["retries"] for b in batches)
    assert front.faults < 5 * first_tries


@contextlib.contextmanager
def shard(index: Any, number: int, change: Callable[[bytes], bytes | None]) -> Iterator[str]:
    """Within this context, a shard has other bytes or (if `change` returns None) is not there."""
    store, name = Store(index.url), index.shard_name(number)
    true = store.read(name)
    changed = change(true)
    store.delete(name) if changed is None else store.write(name, changed)
    try:
        yield name
    finally:
        store.write(name, true)


def test_an_object_replaced_during_the_run_is_an_error(index: Any, front: FaultyFront) -> None:
    """All rows of the new object are valid: only its ETag shows the change."""
    with contextlib.ExitStack() as stack:

        def each(batch: LoadedBatch) -> None:
            if batch.step == 0:
                for number in range(len(index.shards)):
                    stack.enter_context(shard(index, number, lambda data: data + bytes(1024)))

        # Slow enough that the loader is not finished before the objects change
        front.rule = lambda r: Fault(after=0, stall=0.02) if ".tar" in r.path and r.method == "GET" else None
        with pytest.raises(ObjectChanged, match=r"s3://bucket/set/shards/\d+.tar: was replaced"):
            load_long(index, each)


def load_long(index: Any, each: Callable[[LoadedBatch], None]) -> None:
    settings = LoaderSettings(cache=CacheBudget(memory=256 << 10), prefetch=1 << 17)
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=200) as loader:
        for batch in loader:
            each(batch)
            batch.release()


def test_a_damaged_episode_is_replaced_and_reported(index: Any, reference: dict[tuple[int, int], bytes]) -> None:
    windows = [make_plan(index).windows(step) for step in range(STEPS)]
    entry, bad = int(windows[1].entry[0]), int(windows[1].episode[0])
    where = index.ranges(bad, 0, int(index.rows[bad]), ())[0]

    def damage(data: bytes) -> bytes:
        rows = np.frombuffer(data, np.uint8).copy()
        rows[where.offset : where.offset + where.size] ^= 1
        return rows.tobytes()

    with shard(index, where.shard, damage):
        batches = load(index)
        again = load(index)
    found = rows_of(batches)
    assert rows_of(again) == found  # the plan determines the replacement, too
    touched = {
        (step, int(row))
        for step, planned in enumerate(windows)
        for row, episode in zip(planned.row, planned.episode)
        if episode == bad
    }
    assert {key for key in found if found[key] != reference[key]} == touched
    assert found.keys() == reference.keys()
    events = [event for batch in batches for event in batch.quarantined]
    assert {event["id"] for event in events} == {index.id(bad)}
    assert all("CRC" in event["reason"] and ".tar, bytes" in event["reason"] for event in events)
    plan = make_plan(index)
    plan.log.append({**events[0], "step": 1})
    assert not any(((w.entry == entry) & (w.episode == bad)).any() for w in map(plan.windows, range(1, STEPS)))


def test_a_deleted_shard_stops_the_run_and_is_named(index: Any) -> None:
    with shard(index, 1, lambda data: None) as name, pytest.raises(DataError, match=f"could not be read.*{name}"):
        load(index)


def test_a_truncated_shard_stops_the_run_and_is_named(index: Any) -> None:
    with (
        shard(index, 1, lambda data: data[: len(data) // 4]) as name,
        pytest.raises(DataError, match=f"could not be read.*{name}"),
    ):
        load(index)


# The cache's disk


def test_a_damaged_cache_on_disk_is_read_again(
    index: Any, tmp_path: Path, reference: dict[tuple[int, int], bytes]
) -> None:
    budget = CacheBudget(memory=600 << 10, disk=8 << 20, dir=str(tmp_path))
    assert rows_of(load(index, budget)) == reference
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) > 100_000
    warm = load(index, budget)
    assert rows_of(warm) == reference
    assert sum(b.counters["bytes_disk"] for b in warm) > 0
    for damage in ("flip", "cut"):
        for path in (p for p in tmp_path.rglob("*") if p.is_file()):
            data = bytearray(path.read_bytes())
            if damage == "flip":
                for place in range(0, len(data), 997):
                    data[place] ^= 0x10
            path.write_bytes(data if damage == "flip" else data[: len(data) // 3])
        batches = load(index, budget)
        assert rows_of(batches) == reference
        assert [b.quarantined for b in batches] == [[]] * STEPS


@pytest.mark.parametrize("damage", ["flip", "cut", pytest.param("gone", marks=pytest.mark.long)])
def test_a_cache_damaged_while_it_is_in_use_is_read_again(
    damage: str, index: Any, tmp_path: Path, reference: dict[tuple[int, int], bytes]
) -> None:
    def each(batch: LoadedBatch) -> None:
        (items,) = tmp_path.rglob("items")
        data = bytearray(items.read_bytes())
        if damage == "flip":
            for place in range(0, len(data), 499):
                data[place] ^= 0x10
            with open(
                items, "r+b"
            ) as file:  # changes the file that the loader has open; writing a new file of this name would not
                file.write(data)
        elif damage == "cut":
            os.truncate(items, len(data) // 3)
        elif batch.step == 0:
            for path in tmp_path.rglob("*"):
                path.unlink(missing_ok=True) if path.is_file() else None
            items.touch()

    budget = CacheBudget(memory=600 << 10, disk=8 << 20, dir=str(tmp_path))
    load(index, budget)
    clean = load(index, budget, prefetch=1 << 12)
    batches = load(index, budget, each, prefetch=1 << 12)  # so small that batches are made only a few steps ahead
    assert rows_of(batches) == reference
    assert [b.quarantined for b in batches] == [[]] * STEPS
    if damage != "gone":
        assert sum(b.counters["bytes_store"] for b in batches) > sum(b.counters["bytes_store"] for b in clean)


@pytest.mark.parametrize("room", [0, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_disk_that_takes_no_more_data_changes_no_window(
    room: int, index: Any, tmp_path: Path, reference: dict[tuple[int, int], bytes]
) -> None:
    """The loader process can write only files of at most `room` bytes."""
    budget = CacheBudget(memory=600 << 10, disk=8 << 20, dir=str(tmp_path))
    rows: dict[tuple[int, int], bytes] = {}
    load(index, budget)
    (items,) = tmp_path.rglob("items")
    os.truncate(items, 0)
    settings = LoaderSettings(cache=budget)
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=STEPS) as loader:
        loader.start()
        assert loader.pid is not None
        resource.prlimit(loader.pid, resource.RLIMIT_FSIZE, (room, room))
        for batch in loader:
            rows |= rows_of([batch])
            batch.release()
    assert rows == reference
    assert items.stat().st_size <= room


@pytest.mark.root
def test_a_full_disk_under_the_cache_changes_no_window(
    index: Any, tmp_path: Path, reference: dict[tuple[int, int], bytes]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k,mode=700", "tmpfs", str(small)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root: this test did NOT run")
    try:
        assert rows_of(load(index, CacheBudget(memory=1 << 20, disk=8 << 20, dir=str(small)))) == reference
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# Ends

WAITING = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored if the tests run in the background
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
sys.path[:0] = {paths!r}
from tests.dataio.loading.test_faults import *
from tiphys.dataio.index import EpisodeIndex
loader = TrajectoryLoader(
    make_plan(EpisodeIndex.open("s3://bucket/set")), Home(0, 1), digest_batch, NEEDS,
    settings=LoaderSettings(cache=CacheBudget(memory=600 << 10, disk=8 << 20, dir={cache!r}), timeout=60.0),
)
loader.start()
print(loader.pid, flush=True)
next(loader)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_both_processes_end_at_once_even_if_the_store_does_not_answer(
    number: int, index: Any, front: FaultyFront, tmp_path: Path
) -> None:
    """SIGINT goes to the whole process group, as from a terminal; the other signals go to the trainer alone. The trainer is
    waiting for its first batch."""
    front.rule = lambda r: Fault(after=20, stall=120.0) if ".tar" in r.path else None
    paths = [str(REPOSITORY)]
    code = textwrap.dedent(WAITING).format(paths=paths, cache=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    while not front.faults:
        time.sleep(0.01)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(10) != 0
    child.wait(10)
    took = time.monotonic() - began
    print(f"{signal.Signals(number).name}: both processes ended within {took:.2f} s")
    assert took < 5
    (lock,) = tmp_path.rglob("lock")
    with open(lock) as file:  # the lock of the cache's folder is free
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    mapped = [p for p in Path("/proc").glob("[0-9]*/fd/*") if _target(p).startswith("/memfd:tiphys-batches")]
    assert not [p for p in mapped if int(p.parts[2]) in (process.pid, child.pid)]


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""
