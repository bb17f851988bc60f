"""Store reads what was written, in each kind of store. Faults may cost time, but never give a wrong byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import Fault, FaultyFront, Request, moto_server, s3_environment
from tiphys.dataio.atomic import atomic_file
from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import redacted
from tiphys.dataio.storage import AccessError, ObjectChanged, Store, StoreError
from tiphys.dataio.stores.limit import RequestLimit
from tiphys.dataio.stores.ranges import join_ranges

DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def front(endpoint: str) -> Iterator[FaultyFront]:
    with FaultyFront(endpoint) as front, s3_environment(front.url):
        Store("s3://bucket/data").write("shard", DATA)
        yield front


@pytest.fixture
def faulty(front: FaultyFront) -> Iterator[FaultyFront]:
    front.requests.clear()
    front.faults = 0
    yield front
    front.rule = lambda request: None


@pytest.fixture(params=["file", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, front: FaultyFront) -> Store:
    urls = {"file": str(tmp_path), "s3": f"s3://bucket/{tmp_path.name}", "memory": f"memory://{tmp_path.name}"}
    return Store(urls[request.param])


def test_what_was_written_is_read(store: Store, tmp_path: Path) -> None:
    store.write("a/b.bin", DATA)
    store.write("a/b.bin", DATA[::-1])
    file = tmp_path / "source"
    file.write_bytes(DATA * 40)
    store.upload("big", str(file))
    file.unlink()
    assert store.read("a/b.bin") == DATA[::-1]
    assert store.read("big") == DATA * 40
    assert store.head("big").size == 40 * len(DATA)
    assert store.list() == ["a/b.bin", "big"]
    assert store.list("a") == ["a/b.bin"]
    assert store.list("none") == []
    store.delete("a/b.bin")
    assert store.list() == ["big"]
    assert not store.exists("a/b.bin")


def test_ranges_come_in_the_requested_order(store: Store) -> None:
    store.write("x", DATA)
    starts = [250_000, 7, 0, 10, 100_000, 299_999, 7, *range(30_000, 90_000, 20_000)]
    sizes = [20_000, 3, 10, 200, 0, 1, 1000, 5, 5, 5]
    parts = store.read_ranges("x", starts, sizes)
    assert [bytes(p) for p in parts] == [DATA[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    assert store.read_ranges("x", [], []) == []


def test_missing_objects_and_ranges_are_named_in_the_error(store: Store) -> None:
    for read in (store.read, store.head, lambda path: store.read_ranges(path, [0], [1])):
        with pytest.raises(FileNotFoundError, match=r"no/such$"):
            read("no/such")
    store.write("short", b"12345")
    for start in (3, 50):
        with pytest.raises(DataError, match=r"short.*does not belong to this index"):
            store.read_ranges("short", [start], [10])


def test_an_object_elsewhere_is_read_by_its_url(tmp_path: Path, front: FaultyFront) -> None:
    here = Store(str(tmp_path))
    assert here.read_ranges("s3://bucket/data/shard", [5], [4]) == [DATA[5:9]]
    with pytest.raises(DataError, match="local disk"):
        Store("s3://bucket/data").read("file:///etc/passwd")


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    store = Store(str(tmp_path))
    with pytest.raises(StoreError, match="it is a folder"):
        store.head("steps")
    with pytest.raises(DataError, match="steps is a folder, so it is not read"):
        store.read("steps")


@pytest.mark.parametrize("url", ["pipe:cat x", "pipe://cat", "python://x", "simplecache::s3://b/x", "reference://x"])
def test_schemes_outside_the_list_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="may not be opened"):
        Store(url)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_a_path_stays_in_its_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves its folder"):
        Store(str(tmp_path)).read(path)


# Faults

TRANSIENT = {
    "server error": Fault(status=500),
    "slow down": Fault(status=503, code="SlowDown"),
    "too many": Fault(status=429),
    "reset": Fault(reset=True),
    "reset in the body": Fault(after=1000, reset=True),
    "truncated": Fault(after=1000, cut=True),
    "stall": Fault(after=1000, stall=3.0),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_transient_fault_only_costs_time(name: str, faulty: FaultyFront) -> None:
    faulty.rule = lambda r: TRANSIENT[name] if r.number % 3 == 0 and r.number < 12 else None
    store = Store("s3://bucket/data", timeout=0.3)
    starts = list(range(0, 290_000, 29_000))
    assert store.read_ranges("shard", starts, [9_000] * 10) == [DATA[s : s + 9_000] for s in starts]
    assert faulty.faults > 0
    assert store.traffic.retries >= faulty.faults - 1  # a fault in a bulk call repeats all its ranges


def test_after_all_tries_the_error_names_object_and_range(faulty: FaultyFront) -> None:
    faulty.rule = lambda r: Fault(status=500)
    with pytest.raises(StoreError, match=r"s3://bucket/data/shard, bytes 10–30: could not be read in 3 tries.*500"):
        Store("s3://bucket/data", attempts=3).read_ranges("shard", [10], [20])
    with pytest.raises(StoreError, match=r"shard: could not be written in 2 tries"):
        Store("s3://bucket/data", attempts=2).write("shard", b"x")


@pytest.mark.parametrize("status,code", [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")])
def test_refused_access_is_an_error_at_once_without_the_secret(status: int, code: str, faulty: FaultyFront) -> None:
    faulty.rule = lambda r: Fault(status=status, code=code)
    with pytest.raises(AccessError, match=f"data/shard.*refuses access.*{code}") as caught:
        Store("s3://bucket/data").read_ranges("shard", [10], [20])
    assert "test-secret" not in str(caught.value)
    assert len(faulty.requests) == 1


def test_an_object_replaced_while_it_is_read_is_an_error(store: Store) -> None:
    store.write("x", DATA)
    assert store.read_ranges("x", [0, 50_000, 100_000], [5, 5, 5])[0] == DATA[:5]
    asyncio.run(store.check_unchanged("x"))
    Store(store.url).write("x", DATA[::-1])  # another process
    with pytest.raises(ObjectChanged, match="was replaced"):
        asyncio.run(store.check_unchanged("x"))
    if not store.url.startswith("memory"):  # fsspec's file systems do not say with each read which version they served
        with pytest.raises(ObjectChanged, match="was replaced"):
            store.read_ranges("x", [0, 50_000, 100_000], [5, 5, 5])
    assert store.read("x") == DATA[::-1]  # a whole object is read in its present version


def test_ranges_read_in_bulk_have_the_known_version(faulty: FaultyFront) -> None:
    """The object is replaced between the bulk call and the conditional request that confirms its version."""
    Store("s3://bucket/data").write("moving", DATA)
    store = Store("s3://bucket/data")
    store.read_ranges("moving", [0], [10])
    starts = list(range(0, 250_000, 25_000))

    replaced = threading.Event()

    def replace() -> None:
        Store(direct).write("moving", DATA[::-1])
        replaced.set()

    def rule(request: Request) -> Fault | None:
        if "if-match" not in request.headers or replaced.is_set():
            return None
        if not writing:
            writing.append(threading.Thread(target=replace))
            writing[0].start()
        return Fault(status=503)  # the conditional request is repeated until the object has been replaced

    direct, writing = "s3://bucket/data", list[threading.Thread]()
    faulty.rule = rule
    with pytest.raises(ObjectChanged, match="moving"):
        store.read_ranges("moving", starts, [10] * len(starts))
    writing[0].join()


def test_refusals_lower_the_number_in_flight_and_success_raises_it() -> None:
    async def scenario() -> None:
        limit, flying, most = RequestLimit(16), 0, 0

        async def one() -> None:
            nonlocal flying, most
            await limit.acquire()
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0.001)
            flying -= 1
            limit.release()

        await asyncio.gather(*(one() for _ in range(100)))
        assert most == 16
        limit.shrink()
        most = 0
        await asyncio.gather(*(one() for _ in range(100)))
        assert most == 8
        for _ in range(1000):
            limit.grow()
        most = 0
        await asyncio.gather(*(one() for _ in range(100)))
        assert most == 16
        assert limit.flying == 0

    asyncio.run(scenario())


def test_blocking_calls_work_in_any_thread(front: FaultyFront) -> None:
    store, wrong = Store("s3://bucket/data"), []

    def read(i: int) -> None:
        if store.read_ranges("shard", [i * 100], [50]) != [DATA[i * 100 : i * 100 + 50]]:
            wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Local writes


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    Store(str(tmp_path)).write("x", b"old")
    with contextlib.suppress(RuntimeError), atomic_file(tmp_path / "x") as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"x.bin") as caught:
        Store(str(tmp_path)).write("x.bin", b"data")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


# Joining


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), max_size=40),
    st.integers(0, 200),
    st.integers(1, 3000),
)
def test_joined_ranges_hold_every_range_once(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    starts, sizes = [r[0] for r in ranges], [r[1] for r in ranges]
    joined = join_ranges(starts, sizes, gap, most)
    served = [i for request in joined for i, _, _ in request.parts]
    assert sorted(served) == list(range(len(ranges)))
    for request in joined:
        for i, offset, size in request.parts:
            assert (request.start + offset, size) == ranges[i]
            assert 0 <= offset <= offset + size <= request.size
        assert request.size <= max(most, *(sizes[i] for i, _, _ in request.parts))
        wanted = {b for i, _, _ in request.parts for b in range(starts[i], starts[i] + sizes[i])}
        unwanted = request.size - len(wanted)
        assert unwanted <= gap * (len(request.parts) - 1)


def test_messages_hide_secrets_in_urls() -> None:
    assert redacted("https://me:secret@host/x?sig=secret&a=b failed") == "https://host/x failed"
