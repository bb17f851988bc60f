"""Sends the lines of `metrics.jsonl` to experiment trackers, beside training.

The file is the truth and the queue: a thread reads on where it stopped, and nothing waits in memory but the lines that it is just
sending. What was sent stands in ``<run>/track/TRACKER.json``; so a resumed run fills in what is missing, and sends no line twice.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_json
from tiphys.dataio.messages import redacted, say
from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.callbacks.metrics_writer import numbers
from tiphys.pretrain.callbacks.trackers import TRACKERS, Tracker

if TYPE_CHECKING:
    from tiphys.pretrain.trainer import Trainer
    from tiphys.recipes.sections.results import Track

_MOST_LINES = 100  # that are sent before it is written down that they were
_LOOK = 1.0  # seconds after which the file is looked at although no step was done
_PATIENCE = 60.0  # seconds that the end of training waits for a tracker


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl. It is known by its kind, its step, and its number among the lines that share both."""

    kind: str
    step: int
    number: int
    values: Mapping[str, Any]

    @property
    def numbers(self) -> dict[str, float]:
        """Its numbers, with names such as `train/loss`."""
        found = {f"{self.kind}/{name}": value for name, value in numbers(dict(self.values)) if name != "step"}
        return {name: value for name, value in found.items() if not isinstance(value, bool)}


class Lines:
    """The lines of metrics.jsonl that a tracker does not have yet.

    Parameters
    ----------
    folder : str or Path
        The run's folder.
    tracker : str
        Name of the tracker.

    Attributes
    ----------
    id : str
        The run's id in the tracker.
    """

    def __init__(self, folder: str | Path, tracker: str) -> None:
        self._metrics = Path(folder) / "metrics.jsonl"
        self._state = Path(folder) / "track" / f"{tracker}.json"
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            found = json.loads(self._state.read_text(encoding="utf-8"))
        self.id: str = found.get("id") or uuid.uuid4().hex
        # kind -> step and number of the last line that was sent
        self._sent: dict[str, tuple[int, int]] = {kind: (s, n) for kind, (s, n) in found.get("sent", {}).items()}
        self._read: dict[str, tuple[int, int]] = {}  # the same of the last line that was read
        self._at = 0

    def new(self) -> list[Line]:
        """The next lines that were not sent, at most `_MOST_LINES`. They count as sent at once, also after a crash."""
        out: list[Line] = []
        with suppress(FileNotFoundError), open(self._metrics, "rb") as file:
            file.seek(self._at)
            while len(out) < _MOST_LINES and (text := file.readline()).endswith(b"\n"):
                self._at += len(text)
                line = self._line(text)
                if line is not None and (line.step, line.number) > self._sent.get(line.kind, (-1, -1)):
                    self._sent[line.kind] = (line.step, line.number)
                    out.append(line)
        if out:
            self._write()
        return out

    def give_back(self, lines: Sequence[Line]) -> None:
        """These were not sent after all, so the next launch sends them."""
        for line in reversed(lines):
            self._sent[line.kind] = (line.step, line.number - 1)
        self._write()

    def _line(self, text: bytes) -> Line | None:
        """A line that has a step and numbers."""
        with suppress(ValueError):
            values = json.loads(text)
            step = values.get("step") if isinstance(values, dict) else None
            if isinstance(step, int):
                kind = str(values.get("kind", "train"))
                last, number = self._read.get(kind, (-1, -1))
                self._read[kind] = (step, number + 1 if step == last else 0)
                line = Line(kind, *self._read[kind], values)
                return line if line.numbers else None
        return None

    def _write(self) -> None:
        self._state.parent.mkdir(exist_ok=True)
        write_json(self._state, {"id": self.id, "sent": self._sent})


class Delivery:
    """Brings a run's lines to one tracker. Its client is made when there is something to send.

    Parameters
    ----------
    name : str
        Name of the tracker, a key of `TRACKERS`.
    track : Track
        The recipe's section.
    run : Tracked
        The run.
    """

    def __init__(self, name: str, track: Track, run: Tracked) -> None:
        self.name, self._track, self._run = name, track, run
        self._lines = Lines(run.folder, name)
        self._tracker: Tracker | None = None

    def send(self) -> None:
        """Send the lines that the tracker does not have yet. Raises what its client raises."""
        while batch := self._lines.new():
            sent = 0
            try:
                tracker = self._tracker = self._tracker or self._made()
                for line in batch:
                    tracker.send(line.step, line.numbers)
                    sent += 1
            except BaseException:
                self._lines.give_back(batch[sent:])
                raise

    def _made(self) -> Tracker:
        (Path(self._run.folder) / "track").mkdir(exist_ok=True)
        project, name = self._track.project or self._run.name, self._track.name or Path(self._run.folder).name
        return TRACKERS[self.name](
            project, name, self._lines.id, self._run.recipe, str(Path(self._run.folder) / "track")
        )

    def finish(self) -> None:
        """Leave the run. Raises what the tracker's client raises."""
        if self._tracker is not None:
            self._tracker.finish()


@dataclass(frozen=True)
class Tracked:
    """What trackers are told about a run: its name, its folder and its recipe as nested dicts."""

    name: str
    folder: str
    recipe: Mapping[str, Any]


class TrackRun(Callback):
    """Rank 0 sends the lines of `metrics.jsonl` to the trackers of a recipe, in a thread for each.

    Parameters
    ----------
    track : Track
        The recipe's section.
    run : Tracked
        The run.
    """

    def __init__(self, track: Track, run: Tracked) -> None:
        self._track, self._run = track, run
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def on_start(self, trainer: Trainer) -> None:
        for name in self._track.to if trainer.world.rank == 0 else ():
            thread = threading.Thread(target=self._deliver, args=(name,), name=f"track {name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _deliver(self, name: str) -> None:
        try:
            delivery = Delivery(name, self._track, self._run)
            while not self._ended.wait(_LOOK):
                delivery.send()
            delivery.send()
            delivery.finish()
        except BaseException as error:  # clients of trackers end processes by themselves
            warn(name, error)

    def close(self, trainer: Trainer) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
            if thread.is_alive():
                warn(thread.name.removeprefix("track "), TimeoutError(f"it did not end within {_PATIENCE:.0f} s"))
        self._threads = []


def send_rest(track: Track, run: Tracked) -> None:
    """Send the lines that were written after training ended, such as those of an evaluation beside it."""
    for name in track.to:
        try:
            delivery = Delivery(name, track, run)
            delivery.send()
            delivery.finish()
        except Exception as error:
            warn(name, error)


def warn(name: str, error: BaseException) -> None:
    """Say that a tracker failed."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    say(
        f"track.to: {name} failed, so this launch sends nothing more to it ({redacted(said)}); training goes on, metrics.jsonl "
        "has everything, and the next launch sends what is missing",
        error=True,
    )
