"""PlanLog: everything that ever changed a run's sampling plan, as an append-only file of JSON lines.

| kind | keys beside `step` | in force from `step` on |
|---|---|---|
| `weights` | `weights` {entry: number} | these entries of the mixture have these weights |
| `priority` | `entry`, `prefer`, `top` | the entry's episodes are preferred by a rule (`tiphys.dataio.plan.preferences`) |
| `priority` | `entry`, `file`, `digest` | … by a `.npy` of float32 [episodes], of this SHA-256 |
| `quarantine` | `entry`, `episode` (number), `id`, `reason` | the episode is drawn no more |
| `skip` | `steps` | the plan jumps this many steps ahead: their rows are never seen |
| `dataset` | `entry`, `dataset`, `weight`, … | a further entry of the mixture |

A plan replays the log, so resuming needs only a step and these lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from tiphys.dataio.episode import DataError

Event = dict[str, Any]

KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "priority": ("entry",),
    "quarantine": ("entry", "episode"),
    "skip": ("steps",),
    "dataset": ("entry", "dataset", "weight"),
}


def checked(event: Mapping[str, Any], where: str) -> Event:
    """The event as a dict, or a DataError that says what is wrong with it."""
    kind = event.get("kind")
    if kind not in KINDS:
        raise DataError(f"{where}: event kind {kind!r} is none of {', '.join(KINDS)}")
    step = event.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise DataError(f"{where}: a {kind} event needs `step`, a number of at least 0, not {step!r}")
    missing = [k for k in KINDS[kind] if k not in event]
    if missing:
        raise DataError(f"{where}: a {kind} event needs {', '.join(missing)}")
    if kind == "weights":
        weights = event["weights"]
        if not isinstance(weights, Mapping) or not all(
            isinstance(w, (int, float)) and w >= 0 for w in weights.values()
        ):
            raise DataError(f"{where}: `weights` must map entries to numbers of at least 0, not {weights!r}")
    if kind == "priority" and not ("prefer" in event or {"file", "digest"} <= event.keys()):
        raise DataError(f"{where}: a priority event needs `prefer`, or `file` and `digest`")
    if kind == "skip" and (not isinstance(event["steps"], int) or event["steps"] < 1):
        raise DataError(f"{where}: a skip event needs `steps`, at least 1, not {event['steps']!r}")
    return dict(event)


class PlanLog:
    """The events, in the order in which they were written; with a path, also a file that other processes may append to."""

    def __init__(self, path: str = "", events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self._events: list[Event] = []
        self._read = 0  # bytes of the file that are in `_events`
        if path:
            self.refresh()
        for event in events:
            self.append(event)

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: Mapping[str, Any]) -> None:
        """Adds an event; with a path it is on disk when this returns."""
        event = checked(event, self.path or "plan log")
        if not self.path:
            self._events.append(event)
            return
        self.refresh()
        line = json.dumps(event, sort_keys=True, allow_nan=False).encode() + b"\n"
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() > self._read:  # a writer died within its line: end it, so that ours is one
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def refresh(self) -> list[Event]:
        """Events that the file gained since it was last read; a last line without its end is left for the next time."""
        if not self.path or not os.path.exists(self.path):
            return []
        fresh: list[Event] = []
        with open(self.path, "rb") as file:
            file.seek(self._read)
            lines = file.read().split(b"\n")
        for line in lines[:-1]:
            where = f"{self.path} at byte {self._read}"
            self._read += len(line) + 1
            if not line:
                continue
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the torn line of a writer that died; it was never acknowledged
            if not isinstance(event, dict):
                raise DataError(f"{where}: an event is a JSON object, not {type(event).__name__}")
            fresh.append(checked(event, where))
        self._events += fresh
        return fresh
