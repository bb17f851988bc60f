"""A record of finished stages, one JSON line each, so that a benchmark of hours can be stopped and continued."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Stages:
    """The stages of one benchmark. A stage that is in the record is not done again.

    A stage is known by its name, by its `what` (task, seed, …), and by a digest of the settings that made it. With other
    settings it is done again, and the older line stays in the file.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open or begin the record `stages.jsonl` of a folder. Raises BlockingIOError if another process works in it."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "stages.jsonl").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BlockingIOError(f"{self.folder}: another process works in this folder") from error
        self.used: dict[str, dict[str, Any]] = {}  # the records that this process asked for
        self._known = {_key(r["stage"], r["what"], r["settings"]): r for r in self._read()}

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def run(
        self, stage: str, what: Mapping[str, Any], settings: Any, do: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The record of a stage, after doing it if it is not there yet.

        Parameters
        ----------
        stage : str
            ``collected``, ``trained``, ``evaluated``, …
        what : mapping
            What is done: task, seed, … It is part of the record.
        settings : JSON value
            All that the result depends on. Only its digest is recorded.
        do : function
            Does it, and returns a JSON object: the record's ``result``.

        Returns
        -------
        dict
            ``stage``, ``what``, ``settings``, ``result``, and the ``seconds`` and ``cpu_seconds`` that it took.
        """
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        key = _key(stage, what, digest)
        if key not in self._known:
            began, used = time.monotonic(), cpu_seconds()
            result = dict(do())
            record: dict[str, Any] = {"stage": stage, "what": dict(what), "settings": digest, "result": result}
            record["seconds"] = round(time.monotonic() - began, 2)
            record["cpu_seconds"] = round(cpu_seconds() - used, 2)
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._known[key] = record
            print(f"{stage} {' '.join(map(str, what.values()))}: {record['seconds']:.0f} s", flush=True)
        self.used[key] = self._known[key]
        return self._known[key]

    def _read(self) -> Iterator[dict[str, Any]]:
        """All whole lines. A line that a crash cut off is removed, so that the next one does not join it."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.truncate(len(whole.encode()))
        yield from (json.loads(line) for line in whole.splitlines())


def cpu_seconds() -> float:
    """Processor time of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _key(stage: str, what: Mapping[str, Any], settings: str) -> str:
    return json.dumps([stage, dict(what), settings], sort_keys=True)
