"""Exports datasets to Minari HDF5, LeRobot v3 or NPZ. `tiphys.dataio.convert` reads each of them back without loss."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        return f"{self.episodes:,} episodes as {self.format}: {where}"


def export(
    dataset: str, destination: str, *, format: str, progress: Callable[[int, int], None] | None = None, **options: Any
) -> ExportReport:
    """Write all episodes of a dataset in another format.

    destination  an empty folder, in any store. A Minari or LeRobot folder holds one task: several tasks become
                 several folders in it
    format       minari | lerobot | npz
    progress     called with (episodes done, episodes in total)
    options      of the format. lerobot: `fps`, the frames per second that its metadata states (default 10)

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
    done = 0

    def counted(episodes: Iterator[Episode]) -> Iterator[Episode]:
        nonlocal done
        for episode in episodes:
            yield episode
            done += 1
            if progress is not None:
                progress(done, index.episodes)

    groups: list[tuple[str, tuple[TaskSpec, ...]]]
    if module.ONE_TASK_A_FOLDER and len(index.tasks) > 1:
        groups = [(folder, (task,)) for folder, task in _folders(index.tasks).items()]
    else:
        groups = [("", index.tasks)]
    for folder, tasks in groups:
        with tempfile.TemporaryDirectory(prefix="tiphys-export-") as scratch:
            names = module.write(
                Path(scratch), tasks, lambda tasks=tasks: counted(episodes_of(index, tasks)), **options
            )
            for name in names:
                store.upload(f"{folder}/{name}" if folder else name, str(Path(scratch) / name))
    return ExportReport(destination, format, done, tuple(folder for folder, _ in groups))


def episodes_of(index: EpisodeIndex, tasks: tuple[TaskSpec, ...]) -> Iterator[Episode]:
    """The episodes of these tasks in the order of the dataset. One episode is in memory at a time."""
    from tiphys.dataio.dataset import read_episode

    wanted = {number for number, task in enumerate(index.tasks) if task in tasks}
    for number in range(index.episodes):
        if int(index.task[number]) in wanted:
            yield read_episode(index, number)


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
