"""Native observations and actions to dotted fields, and back. It needs only NumPy: published policies contain this file."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError


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
        value = _text(value, name)
        if below not in known and name not in known and name in _WORDS and isinstance(value, str):
            words = value
            continue
        field = name if name in known and below not in known else below
        fields[field] = _picture(value, known[field]) if field in known else value
    return fields, words


def _text(value: Any, name: str) -> Any:
    """The text of an array that holds one; other values as they are. Batches of one hold their text in a list."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "U":
        return value
    if value.size != 1:
        raise DataError(
            f"{name!r} of the observation holds {value.size} texts; give one observation for each environment"
        )
    return str(value.item())


def _picture(value: Any, field: Any) -> Any:
    """A picture as it is stored. LeRobot's frames hold colours first, and uint8 as fractions."""
    if field.modality != "image" or len(field.shape) != 3 or np.shape(value) == tuple(field.shape):
        return value
    height, width, channels = field.shape
    if np.ndim(value) == 4 and len(value) == 1:
        value = value[0]  # a batch of one
    if np.shape(value) == tuple(field.shape):
        return value
    if np.ndim(value) != 3 or np.shape(value)[0] != channels or (height and np.shape(value)[1:] != (height, width)):
        return value
    value = np.moveaxis(np.asarray(value), 0, -1)
    return np.rint(value * 255.0).astype(np.uint8) if value.dtype.kind == "f" and field.dtype == "uint8" else value


def same_numbers(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is the wanted one but for axes of length 1, which change nothing. 0 in `wanted`: an extent that varies."""
    shape, wanted = (tuple(n for n in extents if n != 1) for extents in (shape, wanted))
    return len(shape) == len(wanted) and all(b in (0, a) for a, b in zip(shape, wanted, strict=True))


def fit_shapes(fields: Mapping[str, Any], known: Mapping[str, Any], any_size: Container[str] = ()) -> dict[str, Any]:
    """An observation whose values have the shapes of their fields. Only axes of length 1 may differ before.

    Parameters
    ----------
    fields : mapping of str to array or str
        The observation, as `given_fields` returns it.
    known : mapping of str to FieldSpec
        The fields that count.
    any_size : container of str
        Pictures that are resized, so that they may have any height and width.

    Raises
    ------
    DataError
        If a value has another shape: the message has both.
    """
    fitted = dict(fields)
    for name, spec in known.items():
        if name not in fields or spec.modality == "text":
            continue
        shape, wanted = np.shape(fields[name]), tuple(spec.shape)
        if name in any_size and len(shape) == len(wanted) == 3:
            wanted = (0, 0, wanted[2])
        if not same_numbers(shape, wanted):
            if len(shape) > len(wanted):
                what = "give one observation for each environment, without a batch axis"
            elif spec.modality == "image":
                what = "give pictures of this size, with the colours last or first"
            else:
                what = "give the values that the dataset has, in its order"
            raise DataError(
                f"{name!r} of the observation has the shape {list(shape)}, but the policy was trained on {list(wanted)}; {what}"
            )
        if shape != wanted and 0 not in wanted:
            fitted[name] = np.reshape(fields[name], wanted)
    return fitted


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
