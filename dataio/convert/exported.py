"""What an export leaves beside the foreign format, so that converting it back gives the same episodes.

A foreign format holds arrays by step and little else. `describe` is the rest of an episode as JSON; `restore` joins the
two again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from tiphys.dataio.convert.limits import EPISODE_STEPS, check_shape
from tiphys.dataio.episode import DataError, Episode, TaskSpec


def describe(episode: Episode, task: TaskSpec) -> dict[str, Any]:
    """id, outcome, info, whatever is one for the episode, and how many rows each field has."""
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


def restore(about: Any, fields: Mapping[str, Any], task: TaskSpec, where: str) -> Episode:
    """The episode of `describe` and of the arrays by step, which may have rows too many (padding)."""
    try:
        steps = int(about["steps"])
        if not 0 <= steps <= EPISODE_STEPS or about["task"] != task.name:
            raise DataError(f"{where}: {steps} steps of task {about['task']!r}")
        out: dict[str, Any] = {}
        for spec in task.fields:
            if spec.per == "step" and spec.name in about["rows"]:
                out[spec.name] = _rows(fields.get(spec.name), int(about["rows"][spec.name]), spec.name, where)
            elif spec.name in about["texts"]:
                out[spec.name] = str(about["texts"][spec.name])
            elif spec.name in about["values"]:
                check_shape(spec.shape, np.dtype(spec.dtype).itemsize, where)
                out[spec.name] = np.array(about["values"][spec.name], spec.dtype).reshape(spec.shape)
        success = about["success"]
        return Episode(
            str(about["id"]),
            task.name,
            out,
            steps,
            None if success is None else bool(success),
            str(about["agent"]),
            dict(about["info"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not what an export writes ({type(error).__name__}: {error})") from None


def _rows(value: Any, rows: int, name: str, where: str) -> np.ndarray:
    if value is None or isinstance(value, str) or np.ndim(value) == 0 or not 0 <= rows <= len(value):
        raise DataError(f"{where}: field {name!r} has fewer than its {rows} rows")
    array = np.asarray(value)
    return np.array(array[:rows].tolist(), StringDType()) if array.dtype.kind in "UO" else array[:rows]


def tasks_of(value: Any, where: str) -> list[TaskSpec]:
    """TaskSpecs that an export wrote as JSON."""
    try:
        return [TaskSpec(**t) for t in value]
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not the tasks of an export ({error})") from None
