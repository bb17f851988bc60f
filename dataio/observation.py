"""Native observations and actions as dotted fields, and back. NumPy only: published policies carry this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def observation_fields(observation: Any, name: str = "observation") -> dict[str, Any]:
    """A native observation as fields: `{"observation": array}`, or `{"observation.image": array, "observation.mission": str}`.

    Mappings nest by key and tuples by number; arrays and scalars become arrays (not copied), texts stay `str`.
    `name` is the root: `action` flattens an action the same way.
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

    A tuple comes back as a dict keyed "0", "1", …; no environment that this project knows takes tuples as actions.
    """
    if name in fields:
        return fields[name]
    prefix = name + "."
    keys = dict.fromkeys(f[len(prefix) :].split(".", 1)[0] for f in fields if f.startswith(prefix))
    if not keys:
        raise KeyError(f"no field {name!r} or {prefix}… among {', '.join(fields) or 'no fields'}")
    return {key: native(fields, prefix + key) for key in keys}
