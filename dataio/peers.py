"""Peers: after a change of the world's size, a process finds in others' caches what was at home there before.

Plain HTTP/1.1. `GET /units/FINGERPRINT?3,17,18` answers 200 with the bytes of those units that are here, one after the other, and
their numbers in the header `Units`; the fingerprint names the data and how they are cut into units. A token for the run stands in
`Authorization`. The server listens on one given interface only. A peer that fails, is slow or does not know is a miss: whoever
asks then goes to the store, so that peers never cost more than the short time that they are given.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MOST_UNITS = 512  # of one request
_MOST_HEAD = 1 << 14  # bytes of a request or answer before its body
_PATIENCE = 3  # failures in a row after which a peer is left alone for a while
_REST = 30.0  # seconds


@dataclass(frozen=True)
class PeerSettings:
    """What a loader needs to serve others: the address of an interface of its own, and the run's secret."""

    host: str
    token: str

    def __post_init__(self) -> None:
        if self.host in ("", "0.0.0.0", "::", "*"):
            raise ValueError(
                f"peers: {self.host!r} is every interface of this machine; give the address of the job's own"
            )
        if len(self.token) < 16 or not self.token.isascii() or not self.token.isprintable():
            raise ValueError(
                "peers: the token must have at least 16 printable characters; secrets.token_urlsafe() makes one"
            )


class PeerServer:
    """Serves units: `read` gives a unit's bytes, or None."""

    def __init__(self, settings: PeerSettings, fingerprint: str, read: Callable[[int], bytes | None]):
        self._settings, self._path, self._read = settings, f"/units/{fingerprint}?", read
        self._server: asyncio.Server | None = None
        self.served = 0  # bytes

    async def start(self) -> str:
        """Listen; returns `host:port`."""
        self._server = await asyncio.start_server(self._serve, self._settings.host, 0, limit=_MOST_HEAD)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                answer = self._answer(head)
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    def _answer(self, head: str) -> bytes:
        request, *lines = head.split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._settings.token}".encode()):
            return _response("401 Unauthorized", b"")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0]
        if method != "GET" or not path.startswith(self._path):
            return _response("404 Not Found", b"")
        asked = path[len(self._path) :].split(",")
        if len(asked) > MOST_UNITS or not all(u.isdecimal() and len(u) < 19 for u in asked):
            return _response("400 Bad Request", b"")
        found = [(unit, data) for unit in map(int, asked) if (data := self._read(unit)) is not None]
        body = b"".join(data for _, data in found)
        self.served += len(body)
        return _response("200 OK", body, ",".join(str(unit) for unit, _ in found))


def _response(status: str, body: bytes, units: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nUnits: {units}\r\n\r\n".encode() + body


@dataclass
class _Peer:
    address: str
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    failures: int = 0
    rests_until: float = 0.0


class Peers:
    """The other processes' servers, by the number of the process in the world that was.

    addresses  `host:port` of each; empty for one that is gone
    """

    def __init__(self, addresses: Sequence[str], token: str, fingerprint: str):
        self._peers = [_Peer(address) for address in addresses]
        self._token, self._fingerprint = token, fingerprint
        self.bytes = 0
        self.asked = 0

    def alive(self, process: int) -> bool:
        """Whether asking this peer is worth while."""
        peer = self._peers[process]
        return bool(peer.address) and time.monotonic() >= peer.rests_until

    async def read(self, process: int, units: Sequence[int], sizes: Sequence[int], timeout: float) -> dict[int, bytes]:
        """Those of the units that the peer had, within `timeout` seconds. Any failure is an empty answer."""
        peer, out = self._peers[process], dict[int, bytes]()
        size_of = dict(zip(units, sizes, strict=True))
        try:
            async with asyncio.timeout(timeout):
                for start in range(0, len(units), MOST_UNITS):
                    self.asked += 1
                    out |= await self._ask(peer, units[start : start + MOST_UNITS], size_of)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            peer.failures += 1
            if peer.failures >= _PATIENCE:
                peer.failures, peer.rests_until = 0, time.monotonic() + _REST
        else:
            peer.failures = 0
        self.bytes += sum(map(len, out.values()))
        return out

    async def _ask(self, peer: _Peer, units: Sequence[int], size_of: dict[int, int]) -> dict[int, bytes]:
        if peer.idle:
            reader, writer = peer.idle.pop()
        else:
            host, _, port = peer.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=_MOST_HEAD)
        try:
            path = f"/units/{self._fingerprint}?{','.join(map(str, units))}"
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: {peer.address}\r\nAuthorization: Bearer {self._token}\r\n\r\n".encode()
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
            found = [int(u) for u in headers["units"].split(",") if u]
            length = int(headers["content-length"])
            if head[0].split(" ")[1] != "200" or not set(found) <= set(units):
                raise ValueError(head[0])
            if length != sum(size_of[u] for u in found):
                raise ValueError("the peer's units have other sizes")
            body = memoryview(await reader.readexactly(length))
        except BaseException as error:  # cancelled too: what comes later on this connection belongs to no one
            writer.close()
            if isinstance(error, (KeyError, IndexError)):
                raise ValueError("not an answer") from error
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
