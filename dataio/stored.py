"""Dataclasses from JSON that is not trusted: every key, type and size is checked before an object is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec

T = TypeVar("T")
_LARGEST = 1 << 53  # of a whole number: beyond it, JSON readers do not agree
_LONGEST = 1 << 20  # items of a list
_TEXT = 1 << 24  # characters


def stored(kind: Callable[..., T], values: Any, where: str, **made: Any) -> T:
    """An object of a dataclass from the values of its fields.

    Parameters
    ----------
    kind : type
        The dataclass. Its annotations say what a value may be.
    values : mapping
        Field -> value, as JSON gives it.
    where : str
        The place in the file, for errors.
    **made
        Values of fields that the caller has made already.

    Raises
    ------
    DataError
        If a key is missing or unknown, if a value has another type than its field or is too large, or if `kind` refuses it.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: {_short(values)} is not an object with keys")
    known = {f.name: f for f in fields(kind) if f.init}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise DataError(f"{where}: {_short(key)} is no key of it; it has {', '.join(known)}")
        if key not in made and not _is(value, str(known[key].type)):
            raise DataError(f"{where}: {key} is {_short(value)}, not {known[key].type}")
    for name, field in known.items():
        if name not in values and name not in made and field.default is MISSING and field.default_factory is MISSING:
            raise DataError(f"{where}: {name} is missing")
    try:
        return kind(**{**values, **made})
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} is not valid: {error!r}") from None


def task_specs(values: Any, where: str) -> list[TaskSpec]:
    """Tasks from a list of `TaskSpec.to_dict()`. Raises DataError if it is none."""
    if not isinstance(values, list | tuple):
        raise DataError(f"{where}: it is not a list of tasks")
    out = []
    for i, task in enumerate(values):
        found = task.get("fields") if isinstance(task, Mapping) else None
        if not isinstance(found, list | tuple):
            raise DataError(f"{where}, task {i}: it has no list of fields")
        specs = tuple(
            stored(FieldSpec, _with_infinities(spec), f"{where}, task {i}, field {n}") for n, spec in enumerate(found)
        )
        out.append(stored(TaskSpec, task, f"{where}, task {i}", fields=specs))
    return out


def _with_infinities(spec: Any) -> Any:
    """A field's values, in which null stands for no bound: JSON has no infinity."""
    if not isinstance(spec, Mapping):
        return spec
    out = dict(spec)
    for key, unbounded in (("low", -math.inf), ("high", math.inf)):
        if isinstance(out.get(key), list | tuple):
            out[key] = [unbounded if v is None else v for v in out[key]]
    return out


def number(value: Any, where: str, low: float, high: float) -> float:
    """A finite number in [low, high]. Raises DataError if it is none."""
    if not _is(value, "float") or not low <= value <= high:
        raise DataError(f"{where}: {_short(value)} is not a number from {low:g} to {high:g}")
    return float(value)


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value has the type of an annotation. Infinite bounds of a space are allowed, NaN is not."""
    if " | " in kind:
        return any(_is(value, one) for one in kind.split(" | "))
    if kind == "Any":
        return True
    if kind == "None":
        return value is None
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str) and len(value) <= _TEXT
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if kind == "float":
        return _is(value, "int") or (isinstance(value, float) and not math.isnan(value))
    if kind.startswith("tuple["):
        return isinstance(value, list | tuple) and len(value) <= _LONGEST and _are(value, _parts(kind))
    if kind.startswith("Mapping["):
        key, item = _parts(kind)
        return isinstance(value, Mapping) and all(_is(k, key) and _is(v, item) for k, v in value.items())
    raise TypeError(f"no rule for values of type {kind}")


def _are(values: Any, kinds: list[str]) -> bool:
    if kinds[-1] == "...":
        return all(_is(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(_is(value, kind) for value, kind in zip(values, kinds))


def _parts(kind: str) -> list[str]:
    """`tuple[a, tuple[b, c]]` -> [`a`, `tuple[b, c]`]."""
    out, depth, inner = [""], 0, kind[kind.index("[") + 1 : -1]
    for letter in inner:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            out.append("")
        else:
            out[-1] += letter
    return [part.strip() for part in out]


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Mapping | list) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else text[:59] + "…"
