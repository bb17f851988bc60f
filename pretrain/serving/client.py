"""A policy that a server holds, used like a `Policy`: `reset`, `restart` and `act` in a number of environments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.errors import Explained
from tiphys.dataio.observation import given_fields, native
from tiphys.dataio.private import read_regular
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.serving import wire

_PROCESSOR_BYTES = 256 << 20
_KEYS = 1 << 14  # of the metadata of a policy of many tasks
_SECONDS = 30.0  # to open a connection, and of one answer


class ServerRefused(Explained, RuntimeError):
    """A server cannot be reached or refuses. The message says which one and why."""


class RemotePolicy:
    """A policy that acts in a server of `tiphys serve`.

    Each environment is a connection, so the server answers those that ask at the same time together.

    Parameters
    ----------
    url : str
        ``ws://host:port`` of the server.
    api_key : str
        The server's key; "": none.
    sample : bool, optional
        Draw actions instead of taking the most probable ones; None: as the server does.
    processor : Processor
        The processor of the policy that the server must hold.
    digest : str
        The digest of that policy; "": any.
    """

    def __init__(
        self, url: str, processor: Processor, *, api_key: str = "", sample: bool | None = None, digest: str = ""
    ) -> None:
        self.url, self.processor, self.sample = url, processor, sample
        self._key, self._digest = api_key, digest
        self._connections: list[Any] = []

    @classmethod
    def of(cls, folder: str | Path, url: str, **options: Any) -> RemotePolicy:
        """The policy of a local folder, whose weights are not loaded. Raises DataError or OSError if it has no processor."""
        file = Path(folder) / "processor.json"
        return cls(url, Processor.from_dict(json.loads(read_regular(file, _PROCESSOR_BYTES))), **options)

    def reset(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | str | None = None,
        prompt: Any = None,
        goal: Any = None,
        query: str = "",
        future: Any = None,
    ) -> None:
        """Begin new episodes of a task. As `Policy.reset`, but without demonstrations, goals, queries and futures.

        Raises
        ------
        DataError
            If there is a prompt, a goal, a query or a future.
        ServerRefused
            If the server cannot be reached, or holds another policy.
        """
        if prompt is not None or goal is not None or query or future is not None:
            raise DataError("a server takes no demonstration, goal, query or future; evaluate without --server")
        self._asked = {"task": task, "objective": objective, "target_return": target_return, "sample": self.sample}
        self._spec = self.processor.tasks[task]
        self._fields = {f.name: f for f in self._spec.fields}
        self._chunks: list[list[dict[str, Any]]] = [[] for _ in range(environments)]
        self._earned = [0.0] * environments
        self._limits: list[dict[str, Any]] = []
        while len(self._connections) < environments:
            self._connections.append(self._open()[0])

    def sessions(self) -> int:
        """How many environments the server takes at once. Raises ServerRefused as `reset`."""
        found = self._open()
        found[0].close()
        return int(found[1].get("sessions", 1))

    def limit(self, declared: Sequence[FieldSpec]) -> None:
        """As `Policy.limit`, from the next `restart` on."""
        actions = {f.name for f in self._spec.with_role("action")}
        self._limits = [_limit(f) for f in declared if f.name in actions and f.modality == "discrete"]

    def restart(self, environment: int, *, stream: int | None = None) -> None:
        """As `Policy.restart`. Raises ServerRefused if the server refuses."""
        self._chunks[environment], self._earned[environment] = [], 0.0
        self._send(environment, {"endpoint": "reset", "stream": stream, "limits": self._limits, **self._asked})
        self._received(self._connections[environment])

    def act(self, observations: Sequence[Any], rewards: Sequence[float], environments: Sequence[int]) -> list[Any]:
        """As `Policy.act`. Raises ServerRefused if the server refuses."""
        for i, reward in zip(environments, rewards, strict=True):
            self._earned[i] += reward
        asking = [(i, o) for i, o in zip(environments, observations, strict=True) if not self._chunks[i]]
        for i, observation in asking:
            fields, words = given_fields(observation, self._fields)
            sent = {name: value for name, value in fields.items() if name in self._fields}
            said = {} if words is None else {"prompt": words}
            self._send(i, {**sent, **said, "reward": self._earned[i], "native": True})
            self._earned[i] = 0.0
        for i, _ in asking:
            reply = self._received(self._connections[i])
            actions, steps = reply["actions"], int(reply["execute"])
            self._chunks[i] = [{name: values[step] for name, values in actions.items()} for step in range(steps)]
        return [self._native(self._chunks[i].pop(0)) for i in environments]

    def _native(self, fields: Mapping[str, Any]) -> Any:
        whole = {f.name for f in self._spec.with_role("action") if f.modality == "discrete" and f.shape == ()}
        return native({name: int(value) if name in whole else value for name, value in fields.items()})

    def _open(self) -> tuple[Any, dict[str, Any]]:
        """A new connection, and what the server says of itself."""
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        options: dict[str, Any] = {"compression": None, "max_size": None, "open_timeout": _SECONDS}
        try:
            connection = connect(self.url, additional_headers=headers, **options)
        except InvalidStatus as error:
            body = bytes(error.response.body or b"").decode("utf-8", "replace").strip()[:300]
            raise ServerRefused(f"{self.url}: status {error.response.status_code}: {body}") from None
        except (OSError, ValueError, WebSocketException) as error:
            raise ServerRefused(f"{self.url}: no server can be reached there ({error})") from None
        try:
            found = self._received(connection)
            if found.get("server") != "tiphys":
                raise ServerRefused(f"{self.url}: the server there is not one of `tiphys serve`")
            if self._digest and found.get("digest") != self._digest:
                raise ServerRefused(
                    f"{self.url}: the server holds another policy (step {found.get('step')}) than the one here"
                )
        except Exception:
            connection.close()
            raise
        return connection, found

    def _send(self, environment: int, message: Mapping[str, Any]) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            self._connections[environment].send(wire.encode(message))
        except ConnectionClosed:
            raise ServerRefused(f"{self.url}: the server has closed the connection") from None

    def _received(self, connection: Any) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        try:
            frame = connection.recv(_SECONDS)
        except (ConnectionClosed, TimeoutError) as error:
            raise ServerRefused(f"{self.url}: no answer came ({error})") from None
        if isinstance(frame, str):
            raise ServerRefused(f"{self.url}: {frame}")
        return wire.decode(frame, keys=_KEYS)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()
        self._connections = []


def _limit(field: FieldSpec) -> dict[str, Any]:
    bounds = {key: None if value is None else list(value) for key, value in (("low", field.low), ("high", field.high))}
    return {"name": field.name, "shape": list(field.shape), "values": field.values, **bounds}
