"""Peers: units that another loader has come from there; a peer that is dead, slow, wrong or of another run is a miss."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.dataio.loading_fixtures import dataset, digest_batch
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.servers import Host, two_hosts
from tiphys.dataio import peers
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.peers import MOST_UNITS, Peers, PeerServer, PeerSettings
from tiphys.dataio.placement import Home

SECRET = "a-secret-of-the-run-0123456789"
UNITS = {u: bytes([u % 256]) * (u % 97 + 1) for u in range(0, 3000, 3)}


def size(unit: int) -> int:
    return unit % 97 + 1


async def with_server(work: Callable[[str, PeerServer], Any], secret: str = SECRET) -> Any:
    server = PeerServer(PeerSettings("127.0.0.1", secret), "data", UNITS.get)
    return await work(await server.start(), server)


def ask(units: list[int], secret: str = SECRET, fingerprint: str = "data") -> dict[int, bytes]:
    async def work(address: str, server: PeerServer) -> dict[int, bytes]:
        peers = Peers([address], secret, fingerprint)
        return await peers.read(0, units, [size(u) for u in units], 5.0)

    return asyncio.run(with_server(work))


def test_a_peer_sends_the_units_that_it_has_and_no_others() -> None:
    units = list(range(2 * MOST_UNITS + 10))  # several requests on one connection
    assert ask(units) == {u: UNITS[u] for u in units if u % 3 == 0}
    assert ask([]) == {}
    assert ask([1, 2]) == {}


def test_another_secret_or_fingerprint_gets_nothing() -> None:
    assert ask([0, 3], secret="another-secret-0123456789") == {}
    assert ask([0, 3], fingerprint="other-data") == {}


def test_invalid_requests_are_refused() -> None:
    async def work(address: str, server: PeerServer) -> list[bytes]:
        host, port = address.split(":")
        out = []
        for path in ("/units/data?1;2", "/units/data?-1", f"/units/data?{'1,' * 600}1", "/etc/passwd", "/units/data?"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {SECRET}\r\n\r\n".encode())
            out.append(await reader.readline())
            writer.close()
        return out

    for line in asyncio.run(with_server(work)):
        assert line.split()[1] in (b"400", b"404")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_every_interface_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="every interface"):
        PeerSettings(host, SECRET)


ANSWERS = {
    "silent": b"",
    "not HTTP": b"hello\r\n\r\n",
    "too much": b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\nUnits: 0\r\n\r\n" + b"x" * 99999,
    "not asked for": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nUnits: 97\r\n\r\nx",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nUnits: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_peer_with_invalid_answers_is_a_miss_within_its_time_and_then_left_alone(name: str) -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWERS[name])
            await asyncio.sleep(10)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        peers = Peers([f"127.0.0.1:{port}"], SECRET, "data")
        for _ in range(3):
            assert peers.alive(0)
            began = time.monotonic()
            assert await peers.read(0, [0], [1], 0.1) == {}
            assert time.monotonic() - began < 2.0
        assert not peers.alive(0)
        server.close()

    asyncio.run(scenario())


def test_a_dead_peer_is_a_miss() -> None:
    async def scenario() -> dict[int, bytes]:
        peers = Peers(["", "127.0.0.1:9"], SECRET, "data")
        assert not peers.alive(0)
        return await peers.read(1, [0], [1], 0.5)

    assert asyncio.run(scenario()) == {}


HALF = """
import asyncio
async def serve(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\nUnits: 0\\r\\n\\r\\n" + bytes(500))
    await writer.drain()
    print("half", flush=True)
    await asyncio.sleep(60)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_peer_killed_in_the_middle_of_an_answer_is_a_miss_at_once() -> None:
    server = subprocess.Popen([sys.executable, "-c", HALF], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port, lines = int(server.stdout.readline()), server.stdout

    async def scenario() -> float:
        peers = Peers([f"127.0.0.1:{port}"], SECRET, "data")
        asked = asyncio.create_task(peers.read(0, [0], [1000], 60.0))
        assert await asyncio.to_thread(lines.readline) == "half\n"
        server.kill()
        began = time.monotonic()
        assert await asked == {}
        assert await peers.read(0, [0], [1000], 60.0) == {}
        return time.monotonic() - began

    try:
        assert asyncio.run(scenario()) < 10
    finally:
        server.kill()
        server.wait()


def test_a_peer_that_has_almost_nothing_is_not_asked_again() -> None:
    async def work(address: str, server: PeerServer) -> None:
        peers = Peers([address], SECRET, "data")
        for start in range(0, 5000, 500):
            assert peers.alive(0)
            units = [3 * u + 1 for u in range(start, start + 500)]
            assert await peers.read(0, units, [size(u) for u in units], 5.0) == {}
            if not peers.alive(0):
                break
        assert start == 4000

    asyncio.run(with_server(work))


def test_a_peer_that_is_busy_with_our_own_requests_does_not_count_as_failed() -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nUnits: 0\r\n\r\nx")

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        peers = Peers([f"127.0.0.1:{server.sockets[0].getsockname()[1]}"], SECRET, "data")
        began = time.monotonic()
        answers = await asyncio.gather(*(peers.read(0, [0], [1], 0.25) for _ in range(40)))
        assert time.monotonic() - began < 2.0
        assert 4 <= sum(map(bool, answers)) < 40
        assert peers.alive(0)
        server.close()

    asyncio.run(scenario())


def test_an_answer_is_bounded_and_takes_a_bounded_share_of_the_servers_time() -> None:
    large = {u: bytes(3 << 20) for u in range(6)}

    def read(unit: int) -> bytes | None:
        time.sleep(0.01)
        return large.get(unit)

    async def scenario() -> None:
        server = PeerServer(PeerSettings("127.0.0.1", SECRET), "data", read)
        peers = Peers([await server.start()], SECRET, "data")
        began = time.monotonic()
        found = await peers.read(0, list(large), [3 << 20] * 6, 10.0)
        assert found == large  # in several answers of at most MOST_BYTES
        assert peers.asked == 3
        # After each of the first two answers, the server's own loader gets its share of the time
        assert time.monotonic() - began > 2 * 0.02 * 3

    asyncio.run(scenario())


SERVE = """
import asyncio, sys
from tiphys.dataio.peers import PeerServer, PeerSettings
async def main():
    server = PeerServer(PeerSettings(sys.argv[1], sys.argv[2]), "data", {7: b"seven"}.get)
    print(await server.start(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
READ = """
import asyncio, sys
from tiphys.dataio.peers import Peers
print(asyncio.run(Peers([sys.argv[1]], sys.argv[2], "data").read(0, [7, 8], [5, 5], 5.0)))
"""


@pytest.mark.root
def test_a_peer_on_another_host_is_reached_through_its_interface_and_no_other() -> None:
    with two_hosts() as (one, other):
        server = subprocess.Popen(
            one.command(sys.executable, "-c", SERVE, one.address, SECRET), stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()

            def read(host: Host, where: str) -> str:
                return subprocess.run(
                    host.command(sys.executable, "-c", READ, where, SECRET), capture_output=True, text=True, check=True
                ).stdout.strip()

            assert read(other, address) == "{7: b'seven'}"
            assert read(one, address.replace(one.address, "127.0.0.1")) == "{}"
        finally:
            server.kill()
            server.wait()


def test_fewer_processes_find_what_the_others_have_cached(tmp_path: Any) -> None:
    index = dataset(str(tmp_path / "set"))
    peers = PeerSettings("127.0.0.1", SECRET)
    settings = LoaderSettings(cache=CacheBudget(memory=16 << 20), unit_rows=2)

    def loader(home: Home, **more: Any) -> TrajectoryLoader:
        return TrajectoryLoader(
            make_plan(index, buckets=8), home, digest_batch, NEEDS, settings=settings, peers=peers, **more
        )

    def collect(one: TrajectoryLoader) -> tuple[dict[tuple[int, int], bytes], float]:
        rows, peer_bytes = {}, 0.0
        with one:
            for batch in one:
                rows |= rows_of([batch])
                peer_bytes += batch.counters["bytes_peer"]
                batch.release()
        return rows, peer_bytes

    expected, none = collect(loader(Home(0, 1), start=4, stop=8))
    assert none == 0
    with loader(Home(0, 2), stop=4) as first, loader(Home(1, 2), stop=4) as second:
        for old in (first, second):
            for batch in old:
                batch.release()
        new = loader(Home(0, 1), start=4, stop=8)
        new.connect_peers([first.peer_address, second.peer_address])
        found, from_peers = collect(new)
        assert found == expected
        assert from_peers > 0
        half_dead = loader(Home(0, 1), start=4, stop=8)
        half_dead.connect_peers([first.peer_address, "127.0.0.1:9"])
        assert collect(half_dead)[0] == expected
        third = loader(Home(0, 1), start=4, stop=8)
        third.connect_peers([first.peer_address, second.peer_address])
        batch = next(third)
        begun = rows_of([batch])
        batch.release()
        assert second.pid is not None
        os.kill(second.pid, signal.SIGKILL)
        assert begun | collect(third)[0] == expected
        second.close()
        dead = loader(Home(0, 1), start=4, stop=8)
        dead.connect_peers(["", second._peer_address])
        assert collect(dead) == (expected, 0.0)


def test_silent_connections_do_not_shut_out_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_GREETING", 0.2)
    monkeypatch.setattr(peers, "_MOST_CONNECTIONS", 4)

    async def try_it() -> dict[int, bytes]:
        server = PeerServer(PeerSettings("127.0.0.1", SECRET), "data", lambda unit: b"x")
        host, port = (await server.start()).split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
        for reader, _ in silent:  # each is closed without an answer
            assert await asyncio.wait_for(reader.read(), 10) == b""
        return await Peers([f"{host}:{port}"], SECRET, "data").read(0, [1], [1], 5.0)

    assert asyncio.run(try_it()) == {1: b"x"}
