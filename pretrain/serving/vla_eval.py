"""One client that speaks vla-eval's wire: the client speaks first, and each frame is a message with a type and a number.

The wire is version 1 of `vla_eval.protocol`. The client sends an observation for every step and gets one action, so a chunk is
handed out action by action. An error is a message, and the connection stays open.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.serving import wire
from tiphys.pretrain.serving.sessions import Observed

if TYPE_CHECKING:
    from tiphys.pretrain.serving.server import Server

PATH = "/vla-eval"
_VERSION = 1
_TYPES = ("hello", "observation", "episode_start", "episode_end", "error")


class Talk:
    """One connection: one session, whose episodes the client begins and ends."""

    def __init__(self, server: Server, connection: Any) -> None:
        self._server, self._connection = server, connection
        self._session = server.new_session()
        self._left: list[np.ndarray] = []  # actions of the last chunk that were not handed out yet

    async def run(self) -> None:
        """Answer messages until the client leaves."""
        try:
            async for frame in self._connection:
                number = 0
                try:
                    if isinstance(frame, str):
                        raise DataError("a text frame was sent; send a binary frame of MessagePack, as vla-eval does")
                    kind, payload, number = _parts(await self._server.decoded(frame))
                    answer = await self._answer(kind, payload)
                except Exception as error:
                    self._left = []
                    answer = ("error", {"error": self._server.refusal(self._connection, error)})
                if answer is not None:
                    await self._send(*answer, number)
        finally:
            self._server.end_session(self._session)

    async def _answer(self, kind: str, payload: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
        if kind == "hello":
            own = {"harness_version": f"tiphys {self._server.version}", "protocol_version": _VERSION}
            return "hello", {**own, "model_server": "tiphys", "capabilities": {}, **self._server.metadata}
        if kind in ("episode_start", "episode_end"):
            self._left = []
            await self._server.inference.call(lambda: self._server.sessions.reset(self._session))
        if kind != "observation":
            return None
        if not self._left:
            acted = await self._server.inference.act(Observed(self._session, self._server.names.sent(payload)))
            self._left = list(acted.table[: acted.execute])
        return "action", {"actions": self._left.pop(0)}

    async def _send(self, kind: str, payload: Mapping[str, Any], number: int) -> None:
        message = {"type": kind, "payload": payload, "seq": number, "timestamp": time()}
        await self._connection.send(wire.encode(message, keys=str))


def _parts(message: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], int]:
    if missing := [key for key in ("type", "payload", "seq", "timestamp") if key not in message]:
        raise DataError(f"the message lacks {', '.join(missing)}")
    kind, payload, number = message["type"], message["payload"], message["seq"]
    if kind not in _TYPES:
        raise DataError(f"the type {str(kind)[:40]!r} of the message is none of {', '.join(_TYPES)}")
    if not isinstance(payload, dict) or not isinstance(number, int):
        raise DataError("`payload` must be a map, and `seq` a whole number")
    return str(kind), payload, number
