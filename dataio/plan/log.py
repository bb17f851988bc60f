"""PlanLog: all events that change a run's sampling plan, as JSON lines that are only ever appended.

| kind | keys in addition to `step` | effect from `step` on |
|---|---|---|
| `weights` | `weights` {entry: number} | these mixture entries have these weights |
| `priority` | `entry`, `prefer`, `top` | the entry's episodes are preferred by a rule (`tiphys.dataio.plan.preferences`) |
| `priority` | `entry`, `file`, `digest` | the same, by a `.npy` file of floats [episodes] with this SHA-256 |
| `quarantine` | `entry`, `episode` (number), `id`, `reason` | the episode is not drawn any more |
| `skip` | `steps` | the plan jumps ahead by this many steps: their rows are never drawn |
| `dataset` | `entry`, `dataset`, `digest`, `like`, `weight` | a dataset with this fingerprint joins, learned like `like` |
| `data` | `entry`, `old`, `new` (fingerprints) | none: a record that corrected values of the entry's dataset were accepted |

A plan replays its log, so a resume needs only a step and these lines. Another process can change a running plan: it appends an
event to the file in the run's folder, and the run reads it (`follow`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger

log = logger(__name__)
Event = dict[str, Any]

KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "priority": ("entry",),
    "quarantine": ("entry", "episode"),
    "skip": ("steps",),
    "dataset": ("entry", "dataset", "digest", "like", "weight"),
    "data": ("entry", "old", "new"),
}


def checked(event: Mapping[str, Any], where: str) -> Event:
    """The event as a dict. Raises DataError if the event is invalid; `where` begins the message."""
    kind = event.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{where}: event kind {kind!r} is none of {', '.join(KINDS)}")
    step = event.get("step")
    if not _is_count(step):
        raise DataError(f"{where}: a {kind} event needs `step`, a whole number of at least 0, not {step!r}")
    missing = [k for k in KINDS[kind] if k not in event]
    if missing:
        raise DataError(f"{where}: a {kind} event needs {', '.join(missing)}")
    if kind == "weights":
        weights = event["weights"]
        if not isinstance(weights, Mapping) or not all(_is_weight(w) for w in weights.values()):
            raise DataError(
                f"{where}: `weights` must map names of entries to finite numbers of at least 0, not {weights!r}"
            )
    if kind == "dataset" and not _is_weight(event["weight"]):
        raise DataError(f"{where}: `weight` must be a finite number of at least 0, not {event['weight']!r}")
    if kind == "priority" and not ("prefer" in event or {"file", "digest"} <= event.keys()):
        raise DataError(f"{where}: a priority event needs `prefer`, or `file` and `digest`")
    if kind == "quarantine" and not _is_count(event["episode"]):
        raise DataError(f"{where}: `episode` must be the number of an episode, not {event['episode']!r}")
    if kind == "skip" and not (_is_count(event["steps"]) and event["steps"] > 0):
        raise DataError(f"{where}: a skip event needs `steps`, a whole number of at least 1, not {event['steps']!r}")
    return dict(event)


def described(event: Mapping[str, Any]) -> str:
    """An event of the plan's log, for people."""
    if event["kind"] == "weights":
        return "mixture weights " + ", ".join(f"{name} = {weight:g}" for name, weight in event["weights"].items())
    if event["kind"] == "dataset":
        return f"dataset {event['dataset']} joins with weight {event['weight']:g}, learned like {event['like']}"
    rest = {k: v for k, v in event.items() if k not in ("kind", "step")}
    return f"{event['kind']} {json.dumps(rest)}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


class PlanLog:
    """The events of a plan, in the order in which they were added. With a path, they are also in a file, to which other
    processes may append.

    Parameters
    ----------
    path : str
        The file, which need not exist yet; empty: the log is in memory only.
    events : iterable of mapping
        Events to append.

    Raises
    ------
    DataError
        If an event, or a line of the file, is invalid.
    """

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
        """The log of a file, of which no line has been read yet. Read it with the method `follow`.

        Parameters
        ----------
        path : str
            The file, which need not exist yet.

        Returns
        -------
        PlanLog
            An empty log.
        """
        log = cls()
        log.path = path
        return log

    @property
    def events(self) -> tuple[Event, ...]:
        """The events that were added or read so far."""
        return tuple(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: Mapping[str, Any]) -> None:
        """Add an event. If the log has a file, the event is on disk when this returns.

        Parameters
        ----------
        event : mapping
            `kind`, `step`, and the keys of the kind (see the table above).

        Raises
        ------
        DataError
            If the event, or a line that another process appended, is invalid.
        """
        event = checked(event, self.path or "plan log")
        if not self.path:
            self._events.append(event)
            return
        self.refresh()
        line = json.dumps(event, sort_keys=True, allow_nan=False).encode() + b"\n"
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() > self._read:  # a writer died within its line: end that line first
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def refresh(self) -> list[Event]:
        """Read the events that were appended to the file since it was last read.

        An incomplete last line is left for the next call. The incomplete line of a writer that died is ignored, with a warning.

        Returns
        -------
        list of dict
            The new events.

        Raises
        ------
        DataError
            If a line is no valid event.
        """
        fresh: list[Event] = []
        for where, value in self._lines():
            if not isinstance(value, dict):
                raise DataError(f"{where}: an event must be a JSON object, not {type(value).__name__}")
            fresh.append(checked(value, where))
        self._events += fresh
        return fresh

    def _lines(self) -> Iterator[tuple[str, Any]]:
        """(file and byte, JSON value) of each complete line that was appended since the last call.

        A line that is not JSON is left out with a warning: its writer died before `append` returned, or it was edited.
        """
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
            except (ValueError, RecursionError) as error:
                log.warning("ignored: %s: not JSON (%s): %s", where, error, line[:80].decode(errors="replace"))
                continue
            yield where, value

    def follow(self) -> list[Event]:
        """Like `refresh`, for a run that must not stop: invalid lines are ignored, with a warning.

        Returns
        -------
        list of dict
            The new events.
        """
        fresh: list[Event] = []
        for where, value in self._lines():
            try:
                fresh.append(checked(value if isinstance(value, dict) else {}, where))
            except DataError as error:
                log.warning("ignored: %s", error)
        self._events += fresh
        return fresh
