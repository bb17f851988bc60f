"""NPZ export: `tasks.json`, and one file for each episode.

A file holds one array for each field with a value per step. The member `_tiphys.json` holds everything else.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from tiphys.dataio.atomic import to_json
from tiphys.dataio.convert.exported import episode_metadata
from tiphys.dataio.convert.npz import EPISODE_JSON, TASKS
from tiphys.dataio.episode import Episode, TaskSpec
from tiphys.dataio.export import Selection

ONE_TASK_A_FOLDER = False
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same episodes give the same bytes


def write(folder: Path, selection: Selection) -> list[str]:
    """Write the files and return their names; tasks.json, which completes the export, is the last."""
    names = []
    tasks_by_name = {t.name: t for t in selection.tasks}
    for number, episode in enumerate(selection.episodes()):
        name = f"{number:08d}.npz"
        _write(folder / name, episode, tasks_by_name[episode.task])
        names.append(name)
    (folder / TASKS).write_text(to_json({"tasks": [t.to_dict() for t in selection.tasks]}, indent=1))
    return [*names, TASKS]


def _write(path: Path, episode: Episode, task: TaskSpec) -> None:
    metadata = episode_metadata(episode, task)
    metadata["words"] = {}  # texts per step: NumPy could store them only as pickles or padded
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for spec in task.fields:
            value = episode.fields.get(spec.name)
            if value is None or spec.per == "episode":
                continue
            if spec.dtype == "str":
                metadata["words"][spec.name] = [str(t) for t in value]
                continue
            data = io.BytesIO()
            np.save(data, np.asarray(value), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{spec.name}.npy", _ZIP_DATE), data.getvalue(), zipfile.ZIP_DEFLATED, 1)
        archive.writestr(
            zipfile.ZipInfo(EPISODE_JSON, _ZIP_DATE), to_json(metadata, exact=True), zipfile.ZIP_DEFLATED, 1
        )
