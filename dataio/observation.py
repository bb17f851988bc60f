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
