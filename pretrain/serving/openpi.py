"""One client that speaks openpi's wire: the server speaks first, then each binary frame is answered by one.

The wire is that of `openpi_client.websocket_client_policy`. Tiphys adds keys: `task`, `objective`, `target_return`,
`sample`, `stream` and `limits` of a reset, `reward` and `executed` of an observation, and `native`.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.serving import wire
from tiphys.pretrain.serving.observed import as_text
from tiphys.pretrain.serving.served import Wish
from tiphys.pretrain.serving.sessions import Observed, Session

if TYPE_CHECKING:
    from tiphys.pretrain.serving.server import Server

_CONTROL = frozenset({"endpoint", "session_id", "reward", "executed", "native"})
_RESET = frozenset({"task", "objective", "target_return", "stream", "sample", "limits"})
_IDLE = 60.0  # seconds after which a named session makes room for another one of its connection
_REFUSED = "request refused; the frame before says why"


class Talk:
    """A connection's sessions: its own, and those that it names with `session_id`."""

    def __init__(self, server: Server, connection: Any) -> None:
        self._server, self._connection = server, connection
        self._sessions: dict[str, Session] = {"": server.new_session()}
        self._used: dict[str, float] = {}
        self._ended: set[str] = set()

    async def run(self) -> None:
        """Answer frames until the client leaves. A refused request ends the connection, as in openpi."""
        try:
            await self._connection.send(wire.encode(self._server.metadata))
            took = 0.0
            async for frame in self._connection:
                began = perf_counter()
                try:
                    reply = await self._answer(frame, began, took)
                except Exception as error:
                    await self._connection.send(self._server.refusal(self._connection, error))
                    await self._connection.close(1011, _REFUSED)
                    return
                await self._connection.send(reply)
                took = perf_counter() - began
        finally:
            for session in self._sessions.values():
                self._server.end_session(session)

    async def _answer(self, frame: bytes | str, began: float, took: float) -> bytes:
        if isinstance(frame, str):
            raise DataError("a text frame was sent; send a binary frame of MessagePack, as openpi's client does")
        message = await self._server.decoded(frame)
        name = _text(message, "session_id")
        endpoint = _text(message, "endpoint") or "infer"
        if endpoint not in ("infer", "reset"):
            raise DataError(f"endpoint {endpoint!r} is neither 'infer' nor 'reset'")
        if endpoint == "reset":
            self._ended.discard(name)
        session = self._session(name)
        about: dict[str, Any] = {"session_id": name} if name else {}
        if endpoint == "reset":
            asked, words = wish(message), as_text(message.get("prompt"))
            await self._server.inference.call(lambda: self._server.sessions.reset(session, asked, words))
            return wire.encode({"reset": True, **about})
        acted = await self._server.inference.act(self._observed(session, message))
        timing = {"infer_ms": (perf_counter() - began) * 1e3, **({"prev_total_ms": took * 1e3} if took else {})}
        native = message.get("native") is True
        if native:
            about |= {"execute": acted.execute}
        reply = {
            "actions": acted.fields if native else acted.table,
            "policy_timing": {"infer_ms": acted.seconds * 1e3},
            "server_timing": timing,
        }
        return wire.encode(reply | about)

    def _observed(self, session: Session, message: Mapping[str, Any]) -> Observed:
        values = {name: value for name, value in message.items() if name not in _CONTROL}
        return Observed(
            session,
            self._server.names.sent(values),
            _number(message, "reward"),
            _whole(message, "executed"),
        )

    def _session(self, name: str) -> Session:
        if name in self._ended:
            raise DataError(f"session {name!r} was ended after {_IDLE:.0f} s without a request; reset it to begin anew")
        if name not in self._sessions:
            if self._server.full:
                self._end_idle()
            self._sessions[name] = self._server.new_session()
        self._used[name] = monotonic()
        return self._sessions[name]

    def _end_idle(self) -> None:
        for name in sorted(filter(None, self._sessions), key=self._used.__getitem__)[:1]:
            if monotonic() - self._used[name] > _IDLE and len(self._ended) < 1 << 12:
                self._server.end_session(self._sessions.pop(name))
                self._ended.add(name)


def wish(message: Mapping[str, Any]) -> Wish:
    """What a reset asks of the next episodes. Raises DataError if a key has no valid value."""
    target = message.get("target_return")
    if target is not None and not isinstance(target, str):
        target = _number(message, "target_return")
    sample = message.get("sample")
    if not (sample is None or isinstance(sample, bool)):
        raise DataError("`sample` must be true or false")
    stream = _whole(message, "stream")
    if stream is not None and not 0 <= stream < 1 << 32:
        raise DataError(f"`stream` is {stream}, not a number from 0 to {(1 << 32) - 1}")
    return Wish(_text(message, "task"), _text(message, "objective"), target, stream, sample, _limits(message))


def _limits(message: Mapping[str, Any]) -> tuple[FieldSpec, ...]:
    given = message.get("limits") or []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise DataError("`limits` must be a list of maps, one for each discrete action field")
    out = []
    for one in given:
        name, shape = _text(one, "name"), one.get("shape", [])
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 16 for n in shape):
            raise DataError(f"`limits` of {name!r}: its shape must be a list of sizes")
        bounds = [_bound(one, key, name) for key in ("low", "high")]
        values = _whole(one, "values") or 0
        out.append(FieldSpec(name, "action", "discrete", "int64", tuple(shape), bounds[0], bounds[1], values))
    return tuple(out)


def _bound(one: Mapping[str, Any], key: str, name: str) -> tuple[float, ...] | None:
    found = one.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(n, (int, float)) for n in found):
        raise DataError(f"`limits` of {name!r}: {key} must be a list of numbers")
    return tuple(map(float, found))


def _text(message: Mapping[str, Any], key: str) -> str:
    value = message.get(key, "")
    if not isinstance(value, str) or len(value) > 256:
        raise DataError(f"`{key}` must be a text of at most 256 characters")
    return value


def _number(message: Mapping[str, Any], key: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise DataError(f"`{key}` must be a finite number")
    return number


def _whole(message: Mapping[str, Any], key: str) -> int | None:
    number = _number(message, key)
    if number is not None and not number.is_integer():
        raise DataError(f"`{key}` must be a whole number")
    return None if number is None else int(number)
