"""Peers: after the number of processes has changed, loaders read from each other's caches what was at home there before.

The protocol is plain HTTP/1.1. `GET /units/FINGERPRINT?3,17,18` is answered with status 200, the bytes of those of the units
that are here, one after the other, and their numbers in the header `Units`. The fingerprint names the data and how it is cut
into units. The run's secret is sent in the header `Authorization`. The server listens on one given interface only, and takes a
bounded share of its process's time.

A peer that fails, is slow or does not have a unit is a miss: the unit is then read from the store. So peers never cost more than
the short time that they are given. A peer that has almost nothing is not asked again.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_UNITS = 512  # in one request
MOST_BYTES = 8 << 20  # of one answer's body, unless a single unit is larger
_MOST_HEAD = 1 << 14  # bytes of a request or answer before its body
_MOST_CONNECTIONS = 256
_SHARE = 0.25  # of the server process's time that peers may take
_AT_ONCE = 2  # requests of one loader to one peer
_GREETING = 10.0  # seconds within which a connection must show the secret
_PATIENCE = 3  # failures in a row after which a peer is not asked for `_REST` seconds
_REST = 30.0
_ENOUGH, _LEAST = 4096, 0.02  # a peer that had less than this share of so many units is not asked again


@dataclass(frozen=True)
class PeerSettings:
    """What a loader needs to serve others: the address of one of its machine's interfaces, and the run's secret.

    Raises ValueError if the address means every interface, or if the secret is too short.
    """

    host: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.host in ("", "0.0.0.0", "::", "*"):
            raise ValueError(
                f"peers: {self.host!r} means every interface of this machine; give the address of the job's network"
            )
        if len(self.secret) < 16 or not self.secret.isascii() or not self.secret.isprintable():
            raise ValueError(
                "peers: the secret must have at least 16 printable ASCII characters; secrets.token_urlsafe() makes one"
            )


class PeerServer:
    """Serves units to peers. `read` returns a unit's bytes, or None."""

    def __init__(self, settings: PeerSettings, fingerprint: str, read: Callable[[int], Buffer | None]):
        self._settings, self._path, self._read = settings, f"/units/{fingerprint}?", read
        self._server: asyncio.Server | None = None
        self._turn = asyncio.Lock()
        self._connections = 0
        self.served = 0  # bytes

    async def start(self) -> str:
        """Start to listen. Returns `host:port`."""
        self._server = await asyncio.start_server(self._serve, self._settings.host, 0, limit=_MOST_HEAD)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        known = False  # whether the other side has shown the secret
        try:
            while self._connections <= _MOST_CONNECTIONS:
                async with asyncio.timeout(
                    None if known else _GREETING
                ):  # silent strangers must not take all connections
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                if not (known or self._allowed(head)):
                    writer.write(_response("401 Unauthorized", b""))
                    return
                known = True
                async with self._turn:
                    began = time.perf_counter()
                    writer.write(self._answer(head))
                    await asyncio.sleep((time.perf_counter() - began) * (1 / _SHARE - 1))
                async with asyncio.timeout(_REST):  # an answer that is not taken holds memory here
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._connections -= 1
            writer.close()

    def _allowed(self, head: str) -> bool:
        lines = head.split("\r\n")[1:]
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        given = headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, f"Bearer {self._settings.secret}".encode())

    def _answer(self, head: str) -> bytes:
        if not self._allowed(head):
            return _response("401 Unauthorized", b"")
        request = head.split("\r\n")[0]
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0]
        if method != "GET" or not path.startswith(self._path):
            return _response("404 Not Found", b"")
        asked = path[len(self._path) :].split(",")
        if len(asked) > MOST_UNITS or not all(u.isdecimal() and len(u) < 19 for u in asked):
            return _response("400 Bad Request", b"")
        parts: list[Buffer] = []
        found, size = list[str](), 0
        for unit in asked:
            data = self._read(int(unit)) if size < MOST_BYTES else None
            if data is not None:
                found.append(unit)
                parts.append(data)
                size += memoryview(data).nbytes
        self.served += size
        return _response("200 OK", b"".join(parts), ",".join(found))


def _response(status: str, body: bytes, units: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nUnits: {units}\r\n\r\n".encode() + body


@dataclass
class _Peer:
    address: str
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    failures: int = 0
    rests_until: float = 0.0
    asked: int = 0  # units
    had: int = 0
    busy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))


def _requests(units: Sequence[int], size_of: dict[int, int]) -> list[list[int]]:
    """The units, split into requests of as many units as one answer may hold."""
    out, bytes_of_last = list[list[int]](), MOST_BYTES
    for unit in units:
        if bytes_of_last + size_of[unit] > MOST_BYTES or len(out[-1]) == MOST_UNITS:
            out.append([])
            bytes_of_last = 0
        out[-1].append(unit)
        bytes_of_last += size_of[unit]
    return out


class Peers:
    """The servers of other loaders, by number.

    addresses  `host:port` of each; empty for one that is gone
    """

    def __init__(self, addresses: Sequence[str], secret: str, fingerprint: str):
        self._peers = [_Peer(address) for address in addresses]
        self._secret, self._fingerprint = secret, fingerprint
        self.bytes = 0  # received
        self.asked = 0  # requests

    def alive(self, number: int) -> bool:
        """Whether it is worth asking this peer now."""
        peer = self._peers[number]
        return bool(peer.address) and time.monotonic() >= peer.rests_until

    async def read(self, number: int, units: Sequence[int], sizes: Sequence[int], timeout: float) -> dict[int, bytes]:
        """Those of the units that the peer has, as far as they arrive within `timeout` seconds. A failure is no error."""
        peer, out = self._peers[number], dict[int, bytes]()
        try:
            await asyncio.wait_for(peer.busy.acquire(), timeout)
        except TimeoutError:  # the peer is answering our other requests: not its fault
            return out
        try:
            async with asyncio.timeout(timeout):
                await self._read(peer, units, dict(zip(units, sizes, strict=True)), out)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            peer.failures += 1
            if peer.failures >= _PATIENCE:
                peer.failures, peer.rests_until = 0, time.monotonic() + _REST
        else:
            peer.failures = 0
        finally:
            peer.busy.release()
        self.bytes += sum(map(len, out.values()))
        return out

    async def _read(self, peer: _Peer, units: Sequence[int], size_of: dict[int, int], out: dict[int, bytes]) -> None:
        """Put what the peer has into `out`. A peer that has almost nothing is never asked again."""
        for some in _requests(units, size_of):
            self.asked += 1
            found = await self._ask(peer, some, size_of)
            out |= found
            peer.asked += len(some)
            peer.had += len(found)
        if peer.asked >= _ENOUGH:
            if peer.had < _LEAST * peer.asked:
                peer.rests_until = float("inf")
            peer.asked = peer.had = 0

    async def _ask(self, peer: _Peer, units: Sequence[int], size_of: dict[int, int]) -> dict[int, bytes]:
        if peer.idle:
            reader, writer = peer.idle.pop()
        else:
            host, _, port = peer.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=_MOST_HEAD)
        try:
            path = f"/units/{self._fingerprint}?{','.join(map(str, units))}"
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: {peer.address}\r\nAuthorization: Bearer {self._secret}\r\n\r\n".encode()
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
            found = [int(u) for u in headers["units"].split(",") if u]
            length = int(headers["content-length"])
            if head[0].split(" ")[1] != "200" or not set(found) <= set(units):
                raise ValueError(head[0])
            if length != sum(size_of[u] for u in found):
                raise ValueError("the peer's units have different sizes")
            body = memoryview(await reader.readexactly(length))
        except BaseException as error:  # also if cancelled: later bytes on this connection would belong to no request
            writer.close()
            if isinstance(error, (KeyError, IndexError)):
                raise ValueError("not a valid answer") from error
            raise
        peer.idle.append((reader, writer))
        out, at = {}, 0
        for unit in found:
            out[unit] = bytes(body[at : at + size_of[unit]])
            at += size_of[unit]
        return out

    def close(self) -> None:
        for peer in self._peers:
            for _, writer in peer.idle:
                writer.close()
            peer.idle.clear()
