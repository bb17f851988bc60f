"""A policy behind a WebSocket: who may connect, which wire a client speaks, and what it is told if it is refused."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger, printable, redacted, say
from tiphys.dataio.private import read_regular
from tiphys.pretrain.serving import openpi, vla_eval, wire
from tiphys.pretrain.serving.inference import Inference
from tiphys.pretrain.serving.observed import Names
from tiphys.pretrain.serving.served import Served
from tiphys.pretrain.serving.sessions import Session, Sessions

_ELSEWHERE = 1 << 18  # bytes of a frame from which it is decoded in another thread, so that the others do not wait
_WAITING_FRAMES = 2  # of a client that does not wait for answers
_KEY_BYTES = 4096


@dataclass(frozen=True)
class Door:
    """Where the server listens, and who may come in.

    Attributes
    ----------
    host : str
        Address to listen at.
    port : int
        TCP port; 0: a free one.
    api_key : str
        What clients must send as ``Authorization: Api-Key KEY``; "": nothing.
    open : bool
        Serve without a key at an address that other machines reach.

    Raises
    ------
    DataError
        If other machines reach the address, and there is neither a key nor `open`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    open: bool = False

    def __post_init__(self) -> None:
        if not (self.open or self.api_key or _is_loopback(self.host)):
            raise DataError(
                f"--host {self.host}: whoever reaches this address could use the policy; give an --api-key-file, or --open"
            )


def read_key(path: str | Path) -> str:
    """The API key in a file: its only line. Raises DataError if it is none, OSError if it cannot be read."""
    try:
        key = read_regular(path, _KEY_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise DataError(f"{path}: an API key is one line of ASCII characters without spaces")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """Serves a policy to many clients until it is stopped.

    Parameters
    ----------
    served : Served
        The policy.
    door : Door
        Where it listens.
    names : Names
        How names of clients become names of fields.
    batch : int
        Most requests of a forward pass.
    wait : float
        Longest time, in seconds, that a request waits for those of other clients.
    """

    def __init__(
        self, served: Served, door: Door, names: Names | None = None, *, batch: int = 32, wait: float = 0.005
    ) -> None:
        self.served, self.door, self.names = served, door, names or Names()
        self.sessions = Sessions(lambda: self.served)
        self.inference = Inference(self.sessions, batch, wait)
        self.port = 0  # once it listens
        self._taken = 0

    @property
    def metadata(self) -> dict[str, Any]:
        """What clients are told when they connect."""
        return self.served.metadata

    @property
    def version(self) -> str:
        """The version of Tiphys."""
        try:
            return version("tiphys")
        except PackageNotFoundError:  # a source tree on the Python path
            return ""

    @property
    def full(self) -> bool:
        return self._taken >= self.served.settings.sessions

    def new_session(self) -> Session:
        """Raises DataError if there are as many sessions as may be."""
        if self.full:
            raise DataError(
                f"the server has {self._taken} sessions, which is the most that it was started for (--sessions)"
            )
        self._taken += 1
        return Session()

    def end_session(self, session: Session) -> None:
        self._taken -= 1
        self.inference.end(session)

    async def decoded(self, frame: bytes) -> dict[str, Any]:
        """The map that a frame holds. Raises `wire.Frame`."""
        if len(frame) < _ELSEWHERE:
            return wire.decode(frame)
        return await asyncio.to_thread(wire.decode, frame)

    def refusal(self, connection: Any, error: Exception) -> str:
        """The sentence that a client gets for an error. It is printed too; a defect with its traceback, which stays here."""
        who = _address(connection)
        if isinstance(error, DataError):
            text = redacted(printable(str(error), kept=""))
            say(f"{who}: refused: {text}", error=True)
            return text
        _log.error("%s: an error inside the server", who, exc_info=error)
        return f"an error inside the server ({type(error).__name__}); its output says more"

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is set. `ready` is called once the port is open, and then `port` is known.

        Raises
        ------
        OSError
            If it cannot listen there.
        """
        from websockets.asyncio.server import serve

        async with AsyncExitStack() as stack:
            stack.enter_context(self.inference)
            listening = await stack.enter_async_context(
                serve(
                    self._connected,
                    self.door.host,
                    self.door.port,
                    process_request=self._admit,
                    compression=None,
                    max_size=wire.MOST_BYTES,
                    max_queue=_WAITING_FRAMES,
                    server_header=None,
                    logger=_quiet,
                )
            )
            self.port = next(iter(listening.sockets)).getsockname()[1]
            ready()
            await stop.wait()

    async def _connected(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        talk = vla_eval.Talk if _path(connection.request) == vla_eval.PATH else openpi.Talk
        try:
            client = talk(self, connection)
        except DataError as error:  # the last place was taken since the request was admitted
            await connection.close(1013, self.refusal(connection, error)[:120])
            return
        try:
            await client.run()
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == 1009:
                say(f"{_address(connection)}: refused: a frame has more than {wire.MOST_BYTES:,} bytes", error=True)
        except Exception as error:
            self.refusal(connection, error)
            await connection.close(1011)

    def _admit(self, connection: Any, request: Any) -> Any:
        """The answer to an HTTP request; None: the WebSocket is opened."""
        if _path(request) == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if request.headers.get_all("Origin"):
            return self._refused(
                connection, HTTPStatus.FORBIDDEN, "web pages may not use this server; it is for programs"
            )
        if self.door.api_key and not self._has_key(request.headers.get_all("Authorization")):
            said = "this server needs its key; send the header `Authorization: Api-Key KEY`"
            return self._refused(connection, HTTPStatus.UNAUTHORIZED, said)
        if self.full:
            said = f"all {self.served.settings.sessions} sessions of this server are taken; try again later"
            return self._refused(connection, HTTPStatus.SERVICE_UNAVAILABLE, said)
        return None

    def _has_key(self, headers: list[str]) -> bool:
        wanted = f"Api-Key {self.door.api_key}".encode()
        return len(headers) == 1 and hmac.compare_digest(headers[0].encode("utf-8", "replace"), wanted)

    @staticmethod
    def _refused(connection: Any, status: HTTPStatus, said: str) -> Any:
        say(f"{_address(connection)}: refused with status {status.value}: {said}", error=True)
        return connection.respond(status, said + "\n")


def _path(request: Any) -> str:
    return str(request.path).partition("?")[0].rstrip("/") or "/"


def _address(connection: Any) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client"


_log = logger("tiphys.serve")
# What websockets logs of a handshake at DEBUG holds the keys of clients, so its logger stays silent.
_quiet = logger("tiphys.serve.websockets")
_quiet.setLevel(logging.CRITICAL)
