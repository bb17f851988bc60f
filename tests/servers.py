"""Servers for tests: an S3 server (moto), a proxy that injects faults, and two "hosts" that are network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest


@contextlib.contextmanager
def moto_server(bucket: str = "bucket") -> Iterator[str]:
    """Run an S3 server with an empty bucket in a thread of this process. Gives its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        request = urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).close()
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def s3_environment(endpoint: str) -> Iterator[None]:
    """Set the usual environment variables to this endpoint."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@dataclass
class Answer:
    """An HTTP answer as it is sent. Its Content-Length is not corrected."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @classmethod
    def parse(cls, head: bytes, body: bytes) -> Answer:
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return cls(int(first.split(" ")[1]), headers, body)

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Status", *(f"{name}: {value}" for name, value in self.headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass(frozen=True)
class Fault:
    """What the proxy does to one answer.

    status   answer with this status and an S3 error body instead
    code     the S3 error code in that body
    mute     close the connection without an answer
    path     ask the server for this object instead, without a condition on its version
    change   replace the server's answer by the result of this function
    after    number of bytes of the body that are sent before `cut`, `reset` or `stall`
    cut      close the connection there, so that the body is truncated
    reset    break the connection there (RST)
    stall    send nothing for this many seconds there, then go on
    flip     change one bit of the body, in byte number `after`
    drip     seconds between two bytes of the body
    endless  send zeros after the body until the client closes the connection
    """

    status: int = 0
    code: str = "InternalError"
    mute: bool = False
    path: str = ""
    change: Callable[[Answer], Answer] | None = None
    after: int = 0
    cut: bool = False
    reset: bool = False
    stall: float = 0.0
    flip: bool = False
    drip: float = 0.0
    endless: bool = False


@dataclass
class Request:
    number: int  # 0, 1, … in order of arrival
    method: str
    path: str
    headers: dict[str, str] = field(repr=False, default_factory=dict)


class FaultyFront:
    """An HTTP proxy before another server. `rule` decides what happens to each answer. A context manager; it runs in a thread."""

    def __init__(self, upstream: str):
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = host, int(port)
        self.rule: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.faults = 0
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> FaultyFront:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def away(self, seconds: float) -> None:
        """Refuse all connections for a while, and break the open ones."""

        async def leave() -> None:
            port = self._server.sockets[0].getsockname()[1]
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            await asyncio.sleep(seconds)
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

        asyncio.run_coroutine_threadsafe(leave(), self._loop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(len(self.requests), method, path, headers)
                self.requests.append(request)
                fault = self.rule(request)
                self.faults += fault is not None
                if not await self._answer(writer, method, head, body, fault):
                    break
        self._open.discard(writer)
        writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, head: bytes, body: bytes, fault: Fault | None
    ) -> bool:
        """Answer one request. Returns whether the connection stays open."""
        if fault and fault.mute:
            return False
        if fault and fault.path:
            head = re.sub(
                rb"(?i)\r\nif-match:[^\r]*", b"", re.sub(rb" \S+ ", f" {fault.path} ".encode(), head, count=1)
            )
        if fault and fault.status:
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
            writer.write(f"HTTP/1.1 {fault.status} Injected\r\nContent-Length: {len(text)}\r\n\r\n".encode())
            writer.write(b"" if method == "HEAD" else text)
            await writer.drain()
            return True
        answer, content = await self._ask(method, head, body)
        if fault and fault.change:
            changed = fault.change(Answer.parse(answer, content))
            answer, content = changed.head(), changed.body
        writer.write(answer)
        if fault is None:
            writer.write(content)
            await writer.drain()
            return True
        if fault.flip and content:
            place = min(fault.after, len(content) - 1)
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            writer.write(content)
            await writer.drain()
            return True
        if fault.drip:
            for byte in content:
                if writer.is_closing():
                    return False
                writer.write(bytes([byte]))
                await asyncio.sleep(fault.drip)
            return True
        writer.write(content[: fault.after])
        await writer.drain()
        if fault.stall:
            await asyncio.sleep(fault.stall)
        if fault.reset:
            writer.transport.abort()
            return False
        if fault.cut:
            writer.close()
            return False
        writer.write(content[fault.after :])
        await writer.drain()
        while fault.endless and not writer.is_closing():
            writer.write(bytes(1 << 16))
            await writer.drain()
        return True

    async def _ask(self, method: str, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """The head of the other server's answer, with a Content-Length, and the body."""
        reader, writer = await asyncio.open_connection(*self.upstream)
        writer.write(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        content = await reader.read(-1)
        writer.close()
        answer = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answer)
        if not re.search(rb"(?i)\r\ncontent-length:", answer):
            answer = answer[:-2] + f"Content-Length: {len(content)}\r\n\r\n".encode()
        return answer, content


@dataclass(frozen=True)
class Host:
    """A network namespace that stands for a host."""

    name: str
    address: str
    interface: str

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]


@contextlib.contextmanager
def two_hosts(prefix: str = "tiphys") -> Iterator[list[Host]]:
    """Two hosts, joined by a virtual cable (veth). Skips the test, with a message, without root rights or without `ip`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2: this proof did NOT run")
    mark = f"{prefix}{os.getpid()}"
    hosts = [Host(f"{mark}{c}", f"10.77.{os.getpid() % 250}.{i + 1}", f"v{os.getpid()}{c}") for i, c in enumerate("ab")]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", hosts[0].interface, "netns", hosts[0].name, "type", "veth",
            "peer", "name", hosts[1].interface, "netns", hosts[1].name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for device in ("lo", host.interface):
                _ip("-n", host.name, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ip {' '.join(arguments)}: {error.stderr.strip()}: this proof did NOT run")
