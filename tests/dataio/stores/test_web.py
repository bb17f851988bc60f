"""Web servers that data chose: read by ranges as others are, but no redirect leads to a host that the user does not allow."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.folder_server import FolderServer
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import ObjectChanged, Store, StoreError

DATA = os.urandom(100_000)
STARTS, SIZES = [5, 90_000, 40_000], [10, 9_000, 0]


@contextmanager
def redirecting(target: str) -> Iterator[str]:
    """A server of 127.0.0.1 that redirects every request to the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target + self.path)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "a b%20é.tar").write_bytes(DATA)
    with FolderServer(tmp_path) as server:
        yield server


def read(url: str) -> list[bytes]:
    """Ranges of an object whose URL stands in a dataset."""
    return [bytes(p) for p in Store("memory://dataset", attempts=2).read_ranges(f"{url}/a b%20é.tar", STARTS, SIZES)]


def test_ranges_are_read(served: FolderServer) -> None:
    assert read(served.url) == [DATA[a : a + n] for a, n in zip(STARTS, SIZES, strict=True)]
    store = Store("memory://dataset", attempts=2)
    assert store.head(f"{served.url}/a b%20é.tar").size == len(DATA)
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        store.read_ranges(f"{served.url}/none.tar", [0], [5])
    with pytest.raises(DataError, match="ends before"):
        store.read_ranges(f"{served.url}/a b%20é.tar", [200_000], [5])
    with pytest.raises(DataError, match="has 100000 bytes, but its index says 5"):
        store.read_ranges(f"{served.url}/a b%20é.tar", [0], [5], whole=5)


def test_an_object_that_is_replaced_is_an_error(served: FolderServer) -> None:
    store, name = Store("memory://dataset", attempts=2), "a b%20é.tar"
    store.read_ranges(f"{served.url}/{name}", [0], [5])
    (served.folder / name).write_bytes(DATA[:-1])
    with pytest.raises(ObjectChanged):
        store.read_ranges(f"{served.url}/{name}", [0], [5])


def test_a_redirect_to_another_host_is_refused(served: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = served.url.replace("127.0.0.1", "localhost")
    with redirecting(inner) as url:
        with pytest.raises(StoreError, match=r"redirects to the host 'localhost'.*TIPHYS_SHARD_HOSTS=localhost"):
            read(url)
        assert not served.requests
        monkeypatch.setenv("TIPHYS_SHARD_HOSTS", "a.org,localhost")
        assert read(url)[0] == DATA[5:15]


@pytest.mark.parametrize("target", ["file:///etc/passwd?", "ftp://127.0.0.1/"])
def test_a_redirect_to_another_scheme_is_refused(target: str) -> None:
    with redirecting(target) as url, pytest.raises(StoreError, match=r"(?i)redirect"):
        read(url)


def test_a_redirect_on_the_same_host_and_those_of_the_users_own_url_are_followed(served: FolderServer) -> None:
    with redirecting(served.url) as url:
        assert read(url)[0] == DATA[5:15]
    with redirecting(served.url.replace("127.0.0.1", "localhost")) as url:
        assert bytes(Store(url).read_ranges("a b%20é.tar", [0], [5])[0]) == DATA[:5]
