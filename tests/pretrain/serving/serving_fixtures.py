"""A policy server in a thread, and clients of the bare wire."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("websockets", reason="needs the serve extra")
pytest.importorskip("msgpack", reason="needs the serve extra")

from websockets.sync.client import ClientConnection, connect

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tiphys.dataio.episode import TaskSpec
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.serving import wire
from tiphys.pretrain.serving.served import Served, Settings
from tiphys.pretrain.serving.server import Door, Server

FRAMES = {
    name: bytes.fromhex(text)
    for name, text in json.loads((Path(__file__).parent / "data" / "frames.json").read_text()).items()
}
ARM = np.arange(5, dtype=np.float32)


def policy(*tasks: TaskSpec, paradigm: str = "bc", sample: bool = False, **options: Any) -> Policy:
    """A policy with random weights."""
    objectives = fixtures.make(tasks or (fixtures.ARM,), paradigm, **{"context": 80, "scheme": "compact", **options})
    return Policy(acting.model(objectives), Processor.from_dict(objectives.processor()), sample=sample)


def served(*tasks: TaskSpec, settings: Settings | None = None, **options: Any) -> Served:
    return Served(policy(*tasks, **options), settings or Settings(sessions=8), "digest")


@contextmanager
def serving(of: Served, door: Door | None = None, **options: Any) -> Iterator[Server]:
    """A server that listens while the block runs."""
    server = Server(of, door or Door(port=0), **options)
    del of  # the server may be given a newer one
    ready = threading.Event()
    stopping: list[Any] = []

    async def run() -> None:
        stop = asyncio.Event()
        stopping.extend((asyncio.get_running_loop(), stop))
        try:
            await server.run(stop, ready.set)
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(30)
        assert server.port
        yield server
    finally:
        loop, stop = stopping
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@contextmanager
def client(server: Server, path: str = "", **options: Any) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{server.port}{path}", compression=None, max_size=None, **options) as found:
        yield found


def asked(connection: ClientConnection, **message: Any) -> dict[str, Any]:
    """The reply to a message."""
    connection.send(wire.encode(message))
    reply = connection.recv(30)
    assert isinstance(reply, bytes), reply
    return wire.decode(reply)
