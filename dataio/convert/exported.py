"""What an export adds to the foreign format, so that converting it back gives the same episodes.

A foreign format holds little more than arrays by step. `episode_metadata` is the rest of an episode as JSON. `restore`
combines the two again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.convert.limits import EPISODE_STEPS, check_shape
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.inplace.kept import KeptVideo


def episode_metadata(episode: Episode, task: TaskSpec) -> dict[str, Any]:
    """id, outcome, info, the fields with one value per episode, and the number of rows of each field by step."""
    texts, values, rows = {}, {}, {}
    for spec in task.fields:
        value = episode.fields.get(spec.name)
        if value is None:
            continue
        if spec.per == "step":
            rows[spec.name] = len(value)
        elif spec.dtype == "str":
            texts[spec.name] = str(value)
        else:
            values[spec.name] = np.asarray(value).tolist()
    return {
        "id": episode.id,
        "task": episode.task,
        "steps": int(episode.steps),
        "success": None if episode.success is None else bool(episode.success),
        "agent": episode.agent,
        "info": dict(episode.info),
        "texts": texts,
        "values": values,
        "rows": rows,
    }


def restore(metadata: Any, arrays: Mapping[str, Any], task: TaskSpec, where: str) -> Episode:
    """The episode, from its `episode_metadata` and its arrays by step, which may have extra rows (padding)."""
    try:
        steps = int(metadata["steps"])
        if not 0 <= steps <= EPISODE_STEPS or metadata["task"] != task.name:
            raise DataError(
                f"{where}: the export states {steps} steps of task {metadata['task']!r}; "
                f"0 to {EPISODE_STEPS:,} steps of task {task.name!r} are expected"
            )
        fields: dict[str, Any] = {}
        for spec in task.fields:
            if spec.per == "step" and spec.name in metadata["rows"]:
                fields[spec.name] = _first_rows(
                    arrays.get(spec.name), int(metadata["rows"][spec.name]), spec.name, where
                )
            elif spec.name in metadata["texts"]:
                fields[spec.name] = str(metadata["texts"][spec.name])
            elif spec.name in metadata["values"]:
                check_shape(spec.shape, np.dtype(spec.dtype).itemsize, where)
                value = np.asarray(metadata["values"][spec.name])
                if value.dtype.kind == "U":  # JSON has no NaN and no infinity: texts stand for them
                    value = value.astype(np.float64)
                fields[spec.name] = checked_cast(value, spec.dtype, f"{where}, {spec.name}").reshape(spec.shape)
        success = metadata["success"]
        return Episode(
            id=str(metadata["id"]),
            task=task.name,
            fields=fields,
            steps=steps,
            success=None if success is None else bool(success),
            agent=str(metadata["agent"]),
            info=dict(metadata["info"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: is not what an export writes ({type(error).__name__}: {error})") from None


def _first_rows(value: Any, rows: int, name: str, where: str) -> Any:
    if isinstance(value, KeptVideo) and 0 <= rows <= len(value.frames):
        return replace(value, frames=value.frames[:rows])
    if value is None or isinstance(value, str) or np.ndim(value) == 0 or not 0 <= rows <= len(value):
        raise DataError(f"{where}: field {name!r} does not have the {rows} rows that the export states")
    array = np.asarray(value)
    return np.array(array[:rows].tolist(), StringDType()) if array.dtype.kind in "UO" else array[:rows]


def tasks_of(value: Any, where: str) -> list[TaskSpec]:
    """The TaskSpecs that an export wrote as JSON."""
    try:
        return [TaskSpec(**t) for t in value]
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: is not the list of tasks that an export writes ({error})") from None
