"""Exports datasets to Minari HDF5, LeRobot v3 or NPZ. `tiphys.dataio.convert` reads each of them back without loss."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import counted

if TYPE_CHECKING:
    from tiphys.dataio.episode import Episode, TaskSpec
    from tiphys.dataio.index import EpisodeIndex

FORMATS = {
    "minari": "tiphys.dataio.export.minari",
    "lerobot": "tiphys.dataio.export.lerobot",
    "npz": "tiphys.dataio.export.npz",
}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. `str(report)` is one line for people."""

    destination: str
    format: str
    episodes: int
    folders: tuple[str, ...]  # below the destination; "" is the destination itself

    def __str__(self) -> str:
        where = ", ".join(f"{self.destination}/{f}" if f else self.destination for f in self.folders)
        return f"{counted(self.episodes, 'episode')} as {self.format}: {where}"


def export(
    dataset: str, destination: str, *, format: str, progress: Callable[[int, int], None] | None = None, **options: Any
) -> ExportReport:
    """Write all episodes of a dataset in another format.

    destination  an empty folder, in any store. A Minari or LeRobot folder holds one task: several tasks become
                 several folders in it
    format       minari | lerobot | npz
    progress     called with (episodes done, episodes in total)
    options      of the format. lerobot: `fps`, the frames per second that its metadata states (default: those of its
                 videos, or 10)

    The files of a task are made in a temporary folder on this machine and then uploaded. The file that completes a
    folder (metadata.json, info.json or tasks.json) is uploaded last.
    Raises DataError if the format is unknown or cannot hold a task, FileExistsError if the destination is not empty.
    """
    from tiphys.dataio.episode import DataError
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.storage import Store

    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    index = EpisodeIndex.open(dataset)
    store = Store(destination)
    if store.list():
        raise FileExistsError(f"{destination} is not empty; choose another folder")
    module = importlib.import_module(FORMATS[format])
    counter = _Counter(index.episodes, progress)
    groups: list[tuple[str, tuple[TaskSpec, ...]]]
    if module.ONE_TASK_A_FOLDER and len(index.tasks) > 1:
        groups = [(folder, (task,)) for folder, task in _folders(index.tasks).items()]
    else:
        groups = [("", index.tasks)]
    for folder, tasks in groups:
        with tempfile.TemporaryDirectory(prefix="tiphys-export-") as scratch:
            names = module.write(Path(scratch), Selection(index, tasks, counter), **options)
            for name in names:
                store.upload(f"{folder}/{name}" if folder else name, str(Path(scratch) / name))
    return ExportReport(destination, format, counter.done, tuple(folder for folder, _ in groups))


@dataclass
class _Counter:
    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0

    def add(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Selection:
    """The episodes of some tasks of a dataset, in the dataset's order."""

    index: EpisodeIndex
    tasks: tuple[TaskSpec, ...]
    _counter: _Counter

    def numbers(self) -> list[int]:
        """Numbers of the episodes."""
        wanted = {number for number, task in enumerate(self.index.tasks) if task in self.tasks}
        return [number for number in range(self.index.episodes) if int(self.index.task[number]) in wanted]

    def episodes(self, without: Collection[str] = ()) -> Iterator[Episode]:
        """One after the other, so that one is in memory at a time. `without`: names of fields that are left out."""
        from tiphys.dataio.dataset import read_episode

        for number in self.numbers():
            yield read_episode(self.index, number, without)
            self._counter.add()


def _folders(tasks: tuple[TaskSpec, ...]) -> Mapping[str, TaskSpec]:
    """Folder name -> task, with a different name for each task."""
    out: dict[str, TaskSpec] = {}
    for task in tasks:
        name = base = re.sub(r"[^A-Za-z0-9_-]+", "-", task.name).strip("-") or "task"
        number = 1
        while name in out:
            number += 1
            name = f"{base}-{number}"
        out[name] = task
    return out
