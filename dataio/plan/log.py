"""PlanLog: everything that ever changed a run's sampling plan, as an append-only file of JSON lines.

| kind | keys beside `step` | in force from `step` on |
|---|---|---|
| `weights` | `weights` {entry: number} | these mixture entries have these weights |
| `priority` | `entry`, `prefer`, `top` | the entry's episodes are preferred by a rule (`tiphys.dataio.plan.preferences`) |
| `priority` | `entry`, `file`, `digest` | … by a `.npy` of float32 [episodes] with this SHA-256 |
| `quarantine` | `entry`, `episode` (number), `id`, `reason` | the episode is not drawn any more |
| `skip` | `steps` | the plan jumps this many steps ahead: their rows are never seen |
| `dataset` | `entry`, `dataset`, `digest`, `like`, `weight` | a dataset with this fingerprint joins, learned like `like` |

A plan replays the log, so a resume needs only a step and these lines. The same lines are the channel to a running plan: another
process appends an event to the file in the run's folder, and the run adopts it (`follow`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tiphys.dataio.episode import DataError

log = logging.getLogger(__name__)
Event = dict[str, Any]

KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "priority": ("entry",),
    "quarantine": ("entry", "episode"),
    "skip": ("steps",),
    "dataset": ("entry", "dataset", "digest", "like", "weight"),
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
    if kind == "dataset" and not (isinstance(event["weight"], (int, float)) and 0 <= event["weight"] < float("inf")):
        raise DataError(f"{where}: `weight` must be a number of at least 0, not {event['weight']!r}")
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

    @classmethod
    def following(cls, path: str) -> PlanLog:
        """The log of a file of which nothing is read yet: see `follow`."""
        log = cls()
        log.path = path
        return log

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
        """Events that the file gained since it was last read. DataError for a line that is no event.

        A last line without its end is left for the next time; the torn line of a writer that died is passed over.
        """
        fresh: list[Event] = []
        for where, value in self._lines():
            if not isinstance(value, dict):
                raise DataError(f"{where}: an event is a JSON object, not {type(value).__name__}")
            fresh.append(checked(value, where))
        self._events += fresh
        return fresh

    def _lines(self) -> Iterator[tuple[str, Any]]:
        """(place, JSON value) of each whole line that the file gained."""
        if not self.path or not os.path.exists(self.path):
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            lines = file.read().split(b"\n")
        for line in lines[:-1]:
            where = f"{self.path} at byte {self._read}"
            self._read += len(line) + 1
            if not line:
                continue
            try:
                value = json.loads(line)
            except ValueError:
                continue  # it was never acknowledged
            yield where, value

    def follow(self) -> list[Event]:
        """As `refresh`, for a run that must go on: a line that is no event is named in a warning and passed over."""
        fresh: list[Event] = []
        for where, value in self._lines():
            try:
                fresh.append(checked(value if isinstance(value, dict) else {}, where))
            except DataError as error:
                log.warning("passed over: %s", error)
        self._events += fresh
        return fresh
