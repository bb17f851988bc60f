"""Where the time goes between a command and its first step. The supervisor and rank 0 each add their part."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from tiphys.dataio.atomic import write_json
from tiphys.launch.launches import Launch


class StartTimes:
    """Seconds by name, from now on. `add` ends a part that began where the last one ended.

    Other processes of this machine continue from the file that `leave` writes; the clock is the wall clock, which they share.
    """

    def __init__(self) -> None:
        self.began = self._last = time.time()
        self.parts: dict[str, float] = {}

    def add(self, name: str) -> None:
        now = time.time()
        self.parts[name] = self.parts.get(name, 0.0) + max(now - self._last, 0.0)
        self._last = now

    def leave(self, launch: Launch) -> None:
        with suppress(OSError):
            write_json(_file(launch), {"began": self.began, "last": self._last, "parts": self.parts})

    @classmethod
    def continued(cls, launch: Launch | None) -> StartTimes:
        """Those of the supervisor, which this rank continues; empty ones if there are none."""
        times = cls()
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(_file(launch).read_text(encoding="utf-8")) if launch is not None else {}
            times.parts = {str(name): float(seconds) for name, seconds in values["parts"].items()}
            times.began, times._last = float(values["began"]), float(values["last"])
        return times

    def line(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items() if seconds >= 0.05)
        return f"start        {self._last - self.began:.1f} s: {parts}"


def _file(launch: Launch) -> Path:
    return launch.folder / "start.json"
