"""Native observations and actions to dotted fields, and back. It needs only NumPy: published policies contain this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def observation_fields(observation: Any, name: str = "observation") -> dict[str, Any]:
    """A native observation as fields: `{"observation": array}`, or `{"observation.image": array, "observation.mission": str}`.

    The parts of a mapping are named by their keys, those of a tuple by their numbers. Arrays and scalars become arrays (arrays
    are not copied), texts stay `str`. `name` is the root; with `action`, an action is flattened the same way.
    """
    if isinstance(observation, Mapping):
        parts = observation.items()
    elif isinstance(observation, tuple):
        parts = ((str(i), part) for i, part in enumerate(observation))  # type: ignore[assignment]
    elif isinstance(observation, str):
        return {name: observation}
    else:
        return {name: np.asarray(observation)}
    fields: dict[str, Any] = {}
    for key, part in parts:
        fields.update(observation_fields(part, f"{name}.{key}"))
    return fields


_WORDS = ("instruction", "task", "language_instruction")  # names under which others give what is to be done


def given_fields(observation: Any, known: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A native observation as fields of a task, and the words that it gives under another name than the task's text field.

    An environment's observation has names below `observation`. A sample of a dataset has whole names: the frame of a LeRobot
    dataset `{"observation.state": …, "task": "…"}`, or the step of an RLDS dataset `{"observation": {…}, "language_instruction":
    "…"}`.

    Parameters
    ----------
    observation : observation
        As the environment or the dataset gives it.
    known : mapping of str to FieldSpec
        The fields of the task.
    """
    if not isinstance(observation, Mapping):
        return observation_fields(observation), None
    fields: dict[str, Any] = {}
    words: str | None = None
    for path, value in observation_fields(observation, "").items():
        name = path[1:]
        below = f"observation.{name}"
        if below not in known and name not in known and name in _WORDS and isinstance(value, str):
            words = value
            continue
        field = name if name in known and below not in known else below
        fields[field] = _picture(value, known[field]) if field in known else value
    return fields, words


def _picture(value: Any, field: Any) -> Any:
    """A picture as it is stored. LeRobot's frames hold colours first, and uint8 as fractions."""
    if field.modality != "image" or len(field.shape) != 3 or np.shape(value) == tuple(field.shape):
        return value
    height, width, channels = field.shape
    if np.ndim(value) != 3 or np.shape(value)[0] != channels or (height and np.shape(value)[1:] != (height, width)):
        return value
    value = np.moveaxis(np.asarray(value), 0, -1)
    return np.rint(value * 255.0).astype(np.uint8) if value.dtype.kind == "f" and field.dtype == "uint8" else value


def native(fields: Mapping[str, Any], name: str = "action") -> Any:
    """The inverse of `observation_fields` for one root: the value itself, or nested dicts of values.

    A tuple comes back as a dict with the keys "0", "1", …; no environment of this project takes tuples as actions. Raises
    KeyError if there is no field under `name`.
    """
    if name in fields:
        return fields[name]
    prefix = name + "."
    keys = dict.fromkeys(f[len(prefix) :].split(".", 1)[0] for f in fields if f.startswith(prefix))
    if not keys:
        raise KeyError(f"there is no field {name!r} or {prefix}…; the fields are {', '.join(fields) or 'none'}")
    return {key: native(fields, prefix + key) for key in keys}
