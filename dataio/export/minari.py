"""Minari HDF5 export (format of Minari 0.5).

`data/metadata.json` holds the spaces and counts, `data/main_data.hdf5` a group for each episode. Observation fields
become the observation space, action fields the action space; other numeric fields per step go into `infos`. Minari
expects T + 1 rows of observations and infos. Fields with T rows repeat their last row, which `exported.restore` removes
again. Images are stored raw. Load the result with `minari.MinariDataset(FOLDER/data)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.atomic import to_json
from tiphys.dataio.convert.exported import episode_metadata
from tiphys.dataio.convert.minari import EXPORTED, MAIN
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.export import Selection

ONE_TASK_A_FOLDER = True
_RESULTS = {"reward": "rewards", "terminated": "terminations", "truncated": "truncations"}
_LONGEST_TEXT = 1 << 20
_MAIN = f"data/{MAIN}"


def write(folder: Path, selection: Selection) -> list[str]:
    """Write the two files and return their names, metadata.json last."""
    import h5py

    (task,) = selection.tasks
    observation_keys, action_keys = _space_keys(task, "observation"), _space_keys(task, "action")
    if not observation_keys or not action_keys:
        raise DataError(f"task {task.name!r} has no observations or no actions per step; Minari needs both")
    characters: set[str] = set()
    steps = count = 0
    (folder / "data").mkdir()
    with h5py.File(folder / _MAIN, "w", track_order=True) as file:
        for episode in selection.episodes():
            if not episode.steps:
                raise DataError(f"episode {episode.id!r} has no actions, so Minari cannot hold it")
            characters |= _write(
                file.create_group(f"episode_{count}"), episode, task, observation_keys, action_keys, count
            )
            steps, count = steps + episode.steps, count + 1
    charset = "".join(sorted(characters)) or " "
    metadata = {
        "total_episodes": count,
        "total_steps": steps,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(_space(task, observation_keys, charset)),
        "action_space": json.dumps(_space(task, action_keys, charset)),
        "dataset_id": task.name,
        "minari_version": "0.5.4",  # the first version that reads images without JPEG
        EXPORTED: {"task": task.to_dict(), "observations": observation_keys, "actions": action_keys},
    }
    if task.random is not None and task.expert is not None:
        metadata |= {"ref_min_score": task.random, "ref_max_score": task.expert}
    (folder / "data/metadata.json").write_text(to_json(metadata))
    return [_MAIN, "data/metadata.json"]


def _space_keys(task: TaskSpec, role: str) -> dict[str, str]:
    """field -> its key in the Dict space of the role; "" if the field is the whole space."""
    fields = [f for f in task.with_role(role) if f.per == "step"]
    fields += [f for f in task.with_role("text") if f.per == "step" and f.name.startswith(f"{role}.")]
    if [f.name for f in fields] == [role]:
        return {role: ""}
    return {f.name: f.name.removeprefix(role + ".") for f in fields}


def _space(task: TaskSpec, keys: dict[str, str], charset: str) -> dict[str, Any]:
    """The space of these fields in Minari's JSON form."""
    leaves = {key: _leaf(task.field(name), charset) for name, key in keys.items()}
    return leaves[""] if "" in leaves else {"type": "Dict", "subspaces": dict(sorted(leaves.items()))}


def _leaf(field: FieldSpec, charset: str) -> dict[str, Any]:
    if field.dtype == "str":
        return {"type": "Text", "max_length": _LONGEST_TEXT, "min_length": 0, "charset": charset}
    dtype, shape = _dtype(field), list(field.shape)
    if field.modality == "discrete" and not shape and field.values > 0 and field.low is None and dtype.kind in "iu":
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": field.values}
    if dtype.kind == "f":
        low, high = (-np.inf if field.low is None else field.low), (np.inf if field.high is None else field.high)
    else:
        limits = np.iinfo(dtype)
        low, high = (0, field.values - 1) if field.values else (limits.min, limits.max)
        if field.low is not None and field.high is not None:
            low, high = field.low, field.high
    low, high = (field.entries(b if isinstance(b, tuple) else (b,)).tolist() for b in (low, high))
    return {"type": "Box", "dtype": dtype.name, "shape": shape, "low": low, "high": high}


def _dtype(field: FieldSpec) -> np.dtype:
    """The dtype in Gymnasium's spaces, which have no booleans."""
    return np.dtype("int8" if field.dtype == "bool" else field.dtype)


def _write(
    group: Any,
    episode: Episode,
    task: TaskSpec,
    observation_keys: dict[str, str],
    action_keys: dict[str, str],
    number: int,
) -> set[str]:
    """Write one episode; returns the characters of its texts."""
    import h5py

    group.attrs["id"], group.attrs["total_steps"] = number, episode.steps
    characters: set[str] = set()
    rows = episode.steps + 1
    for part, keys in (("observations", observation_keys), ("actions", action_keys)):
        for name, key in keys.items():
            path = f"{part}/{key}" if key else part
            field, value = task.field(name), episode.fields[name]
            if part == "observations":
                value = _padded(np.asarray(value), rows)
            if field.dtype == "str":
                characters |= set("".join(str(t) for t in value))
                strings = np.array([str(t) for t in value], object)
                group.create_dataset(path, data=strings, dtype=h5py.string_dtype("utf-8"))
            else:
                group.create_dataset(path, data=np.asarray(value).astype(_dtype(field), copy=False))
    for name, part in _RESULTS.items():
        kind = np.float64 if name == "reward" else bool
        value = episode.fields.get(name)
        group[part] = np.zeros(episode.steps, kind) if value is None else np.asarray(value)
    step_texts = {}
    for field in task.fields:
        if (
            field.per == "episode"
            or field.name in observation_keys
            or field.name in action_keys
            or field.name in _RESULTS
        ):
            continue
        if field.dtype == "str":
            step_texts[field.name] = [str(t) for t in episode.fields[field.name]]
        else:
            group.create_dataset(f"infos/{field.name}", data=_padded(np.asarray(episode.fields[field.name]), rows))
    rest = {**episode_metadata(episode, task), "words": step_texts}
    group.create_dataset(EXPORTED, data=to_json(rest, exact=True), dtype=h5py.string_dtype("utf-8"))
    return characters


def _padded(value: np.ndarray, rows: int) -> np.ndarray:
    """The array with its last row repeated up to `rows` rows."""
    return value if len(value) == rows else np.concatenate([value, np.repeat(value[-1:], rows - len(value), axis=0)])
