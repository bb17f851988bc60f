"""NPZ: `tasks.json` and one file an episode, with an array a field; what is no array stands in the member
`_tiphys.json`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tiphys.dataio.convert.exported import episode_metadata
from tiphys.dataio.convert.npz import ABOUT, TASKS
from tiphys.dataio.episode import Episode, TaskSpec

ONE_TASK_A_FOLDER = False
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same episodes give the same bytes


def write(folder: Path, tasks: tuple[TaskSpec, ...], episodes: Callable[[], Iterator[Episode]]) -> list[str]:
    """Write the files; returns their names, the one that completes them last."""
    names = []
    known = {t.name: t for t in tasks}
    for number, episode in enumerate(episodes()):
        name = f"{number:08d}.npz"
        _write(folder / name, episode, known[episode.task])
        names.append(name)
    (folder / TASKS).write_text(json.dumps({"tasks": [t.to_dict() for t in tasks]}, indent=1))
    return [*names, TASKS]


def _write(path: Path, episode: Episode, task: TaskSpec) -> None:
    about = episode_metadata(episode, task)
    about["words"] = {}  # texts by step: NumPy could only store them as pickles or padded
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for spec in task.fields:
            value = episode.fields.get(spec.name)
            if value is None or spec.per == "episode":
                continue
            if spec.dtype == "str":
                about["words"][spec.name] = [str(t) for t in value]
                continue
            data = io.BytesIO()
            np.save(data, np.asarray(value), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{spec.name}.npy", _EPOCH), data.getvalue(), zipfile.ZIP_DEFLATED, 1)
        archive.writestr(zipfile.ZipInfo(ABOUT, _EPOCH), json.dumps(about), zipfile.ZIP_DEFLATED, 1)
