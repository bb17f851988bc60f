"""Answers that no store should give: each costs a try or, if it repeats, is an error that names the object. No byte is wrong."""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.dataio.loading.test_faults import load, some
from tests.dataio.loading_fixtures import dataset
from tests.dataio.test_loader import rows_of
from tests.servers import Answer, Fault, FaultyFront, Request, moto_server, s3_environment
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import AccessError, ObjectChanged, Store, StoreError

DATA, OTHER = os.urandom(300_000), os.urandom(200_000)
FEW = [1000], [50]
MANY = list(range(1000, 301_000 - 50, 25_000)), [50] * 12  # so many that they are read in bulk


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyFront]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        store = Store("s3://bucket/data")
        store.write("one", DATA)
        store.write("other", OTHER)
        yield front


@pytest.fixture
def front(server: FaultyFront) -> Iterator[FaultyFront]:
    server.requests.clear()
    server.faults = 0
    yield server
    server.rule = lambda request: None


def answer(status: int = 206, body: Callable[[bytes], bytes] = bytes, **headers: str) -> Fault:
    """An answer with another body (and its length), or with other headers. A header with an empty value is left out."""

    def change(true: Answer) -> Answer:
        new = body(true.body)
        told = true.headers | {"content-length": str(len(new))} | {k.replace("_", "-"): v for k, v in headers.items()}
        return Answer(status, {k: v for k, v in told.items() if v}, new)

    return Fault(change=change)


def elsewhere(by: int, longer: int) -> Fault:
    """An answer with other bytes than those asked for; its Content-Range says so."""

    def change(true: Answer) -> Answer:
        first, last, size = map(int, re.findall(r"\d+", true.headers["content-range"]))
        span = f"bytes {first + by}-{last + by + longer}/{size}"
        body = DATA[first + by : last + by + longer + 1]
        return Answer(206, true.headers | {"content-range": span, "content-length": str(len(body))}, body)

    return Fault(change=change)


PAGE = b"<html>Log in to this network</html>"
ODD = {
    "the whole object": answer(200, lambda part: DATA, content_range=""),
    "a whole object without end": Fault(change=answer(200, content_range="", content_length="9" * 12).change, endless=True),
    "a part without end": Fault(change=answer(content_length="9" * 12).change, endless=True),
    "another part": elsewhere(100, 0),
    "a longer part": elsewhere(0, 10),
    "a shorter part": elsewhere(0, -10),
    "a part that does not say which": answer(content_range=""),
    "more bytes than it says": answer(body=lambda part: part + bytes(10)),
    "fewer bytes than it says": answer(body=lambda part: part[:-10]),
    "no bytes": answer(body=lambda part: b""),
    "compressed": answer(body=gzip.compress, content_encoding="gzip"),
    "a page": answer(200, lambda part: PAGE, content_type="text/html", content_range="", etag=""),
    "a page of a proxy": answer(400, lambda part: PAGE, content_type="text/html"),
    "not modified": answer(304, lambda part: b""),
    "a way to nowhere": answer(307, lambda part: b"", location="http://127.0.0.1:9/"),
    "nothing": Fault(mute=True),
    "an error without words": answer(500, lambda part: b""),
    "a conflict": Fault(status=409, code="OperationAborted"),
    "no such object": Fault(status=404, code="NoSuchKey"),
    "no such part": Fault(status=416, code="InvalidRange"),
    "another version": Fault(status=412, code="PreconditionFailed"),
    "another object": Fault(path="/bucket/data/other"),
}  # fmt: skip
# A bulk read is cut to the bytes that were asked for, whatever arrives. Wrong bytes are then found by their checksums, and an
# endless answer by its time.
NOT_IN_BULK = ("compressed", "another object", "a part without end")


def known_store(**settings: Any) -> Store:
    """A store that has read the object before, as a loader's store has."""
    store = Store("s3://bucket/data", timeout=2.0, **settings)
    store.read_ranges("one", [0], [10], len(DATA))
    return store


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_costs_a_try(name: str, front: FaultyFront) -> None:
    for ranges, bulk in ((FEW, False), (MANY, True)):
        if bulk and name in NOT_IN_BULK:
            continue
        store = known_store()
        odd = len(front.requests) + (2 if bulk else 0)
        front.rule = lambda request, odd=odd: ODD[name] if request.number == odd else None  # type: ignore[misc]
        parts = store.read_ranges("one", *ranges, len(DATA))
        assert [bytes(p) for p in parts] == [DATA[a : a + n] for a, n in zip(*ranges, strict=True)]
    assert front.faults > 0


@pytest.mark.parametrize("name", ODD)
def test_odd_answers_that_repeat_are_an_error_that_names_the_object(name: str, front: FaultyFront) -> None:
    store = known_store(attempts=2)
    front.rule = lambda request: ODD[name] if request.method == "GET" else None
    with pytest.raises((StoreError, DataError, FileNotFoundError), match="s3://bucket/data/one") as caught:
        store.read_ranges("one", *FEW, len(DATA))
    assert not isinstance(caught.value, ObjectChanged)


def test_a_body_that_trickles_is_asked_for_again(front: FaultyFront) -> None:
    """Every single byte comes in time; only the time of the whole body shows that it is too slow."""
    store = Store("s3://bucket/data", timeout=0.15, attempts=2)
    front.rule = lambda request: Fault(drip=0.05) if request.number == 0 else None
    assert bytes(store.read_ranges("one", *FEW)[0]) == DATA[1000:1050]
    front.rule = lambda request: Fault(drip=0.05)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"data/one, bytes 1000–1050: could not be read in 2 tries.*too slowly"):
        store.read_ranges("one", *FEW)
    assert time.monotonic() - began < 3.0  # two bodies take five seconds


def test_an_object_that_stays_away_is_waited_for_once(front: FaultyFront) -> None:
    store = Store("s3://bucket/data", timeout=0.4, attempts=20)
    front.rule = lambda request: Fault(status=404, code="NoSuchKey")
    with pytest.raises(FileNotFoundError):
        store.read_ranges("one", *FEW, len(DATA))
    asked = len(front.requests)
    assert asked > 1
    with pytest.raises(FileNotFoundError):
        store.read_ranges("one", *FEW, len(DATA))
    assert len(front.requests) == asked + 1
    front.rule = lambda request: None
    store.read_ranges("one", *FEW, len(DATA))


def test_an_object_of_another_size_is_not_the_one_of_the_index(front: FaultyFront) -> None:
    """The size shows it before anything of the object has been read, when there is no ETag to compare."""
    store = Store("s3://bucket/data", timeout=0.2)
    with pytest.raises(DataError, match=r"data/other: has 200000 bytes, but its index says 300000"):
        store.read_ranges("other", *FEW, len(DATA))
    assert bytes(store.read_ranges("other", *FEW, len(OTHER))[0]) == OTHER[1000:1050]


def test_a_clock_that_is_wrong_is_named(front: FaultyFront) -> None:
    front.rule = lambda request: Fault(status=403, code="RequestTimeTooSkewed")
    with pytest.raises(AccessError, match=r"data/one.*Set this machine's clock"):
        Store("s3://bucket/data").read_ranges("one", *FEW)


def test_a_dead_proxy_is_named(front: FaultyFront, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(StoreError, match=r"data/one.*the environment sets http_proxy"):
        Store("s3://bucket/data", attempts=2).read_ranges("one", *FEW)


# The loader


@pytest.fixture(scope="module")
def index(server: FaultyFront) -> Any:
    return dataset("s3://bucket/set")


@pytest.fixture(scope="module")
def reference(index: Any) -> dict[tuple[int, int], bytes]:
    return rows_of(load(index))


def test_a_shard_that_is_away_for_a_moment_quarantines_nothing(
    index: Any, reference: dict[tuple[int, int], bytes], front: FaultyFront
) -> None:
    began: list[float] = []

    def rule(request: Request) -> Fault | None:
        if "000001.tar" not in request.path:
            return None
        began.append(time.monotonic())
        return Fault(status=404, code="NoSuchKey") if began[-1] - began[0] < 1.0 else None

    front.rule = rule
    batches = load(index, timeout=6.0)
    assert front.faults > 0
    assert rows_of(batches) == reference
    assert not any(b.quarantined for b in batches)


@pytest.mark.long
@pytest.mark.parametrize("name", [*(n for n in ODD if n != "the whole object"), "zeros", "another shard"])
def test_odd_answers_change_no_window(
    name: str, index: Any, reference: dict[tuple[int, int], bytes], front: FaultyFront
) -> None:
    odd = ODD | {
        "zeros": answer(body=lambda part: bytes(len(part))),
        "another shard": Fault(path=f"/bucket/set/{index.shard_name(2)}"),
    }
    front.rule = some(0.1, odd[name])
    batches = load(index, timeout=1.0)
    assert front.faults > 0
    assert rows_of(batches) == reference
    assert not any(b.quarantined for b in batches)
