"""Gymnasium spaces in the JSON form of Minari, and the fields that they become. Needs no gymnasium."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tiphys.dataio.bounds import integer_range
from tiphys.dataio.convert.infer import field_spec, modality_of
from tiphys.dataio.convert.limits import check_shape, parse_json
from tiphys.dataio.episode import DataError, FieldSpec

_MAX_DEPTH = 16


def leaves(
    space: Any, name: str, where: str, depth: int = 0
) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Any]]]:
    """(dotted name, path of keys, space) of each leaf. The keys of a Tuple are 0, 1, ….

    Raises DataError if the JSON is not a space, or is nested too deeply.
    """
    if isinstance(space, str):
        space = parse_json(space, where)
    if not isinstance(space, Mapping) or depth > _MAX_DEPTH:
        raise DataError(f"{where}: {str(space)[:80]!r} is not a space, or is nested deeper than {_MAX_DEPTH}")
    kind, inner = space.get("type"), space.get("subspaces")
    if kind == "Dict" and isinstance(inner, Mapping):
        children = [(str(k), inner[k]) for k in sorted(inner)]
    elif kind == "Tuple" and isinstance(inner, list):
        children = [(str(i), s) for i, s in enumerate(inner)]
    else:
        yield name, (), space
        return
    for key, child in children:
        for dotted, path, leaf in leaves(child, f"{name}.{key}", where, depth + 1):
            yield dotted, (key, *path), leaf


def spec(name: str, space: Mapping[str, Any], where: str) -> FieldSpec:
    """The field for a leaf, with the bounds of a Box or the number of values of a discrete space."""
    kind = space.get("type")
    try:
        if kind == "Box":
            dtype, shape = (
                np.dtype(space["dtype"]),
                check_shape(space["shape"], np.dtype(space["dtype"]).itemsize, where),
            )
            if len(shape) == 2 and is_picture(space):
                shape = (*shape, 1)
            _check_bounds(space, shape)
            if dtype.kind in "iu":
                image = modality_of(dtype, shape) == "image" and _is_byte_range(space) and not name.startswith("action")
                modality = "image" if image else "discrete"
                return field_spec(name, dtype, shape, modality=modality, **integer_range(space["low"], space["high"]))
            low, high = _bounds(space, dtype)
            return field_spec(name, dtype, shape, low=low, high=high)
        if kind == "Discrete":
            start = int(space.get("start", 0))
            found = integer_range(start, start + int(space["n"]) - 1)
            return field_spec(name, space.get("dtype", "int64"), (), **found)
        if kind == "MultiDiscrete":
            counts = np.asarray(space["nvec"], np.int64)
            first = np.asarray(space.get("start", 0), np.int64)  # Minari before 0.5 writes none
            found = integer_range(first, first + counts - 1)
            return field_spec(name, space["dtype"], counts.shape, modality="discrete", **found)
        if kind == "MultiBinary":
            sizes = space["n"] if isinstance(space["n"], list) else [int(space["n"])]
            return field_spec(name, "int8", check_shape(sizes, 1, where), values=2, modality="discrete")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: the space of {name!r} cannot be read ({type(error).__name__}: {error})") from None
    if kind == "Text":
        return field_spec(name, "str", ())
    raise DataError(f"{where}: the space of {name!r} has type {kind!r}, which cannot be read")


Bounds = tuple[float, ...] | None


def _check_bounds(space: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for key in ("low", "high"):
        size = np.size(space[key])
        if size not in (1, np.prod(space["shape"], dtype=np.int64)):
            raise ValueError(f"{key} has {size} numbers for shape {shape}")


def _bounds(space: Mapping[str, Any], dtype: np.dtype) -> tuple[Bounds, Bounds]:
    """(low, high): a single number if all entries are equal, else one for each.

    (None, None) if a bound is infinite or the largest number of the dtype.
    """
    low = np.asarray(space["low"], np.float64).reshape(-1)
    high = np.asarray(space["high"], np.float64).reshape(-1)
    extreme = float(np.finfo(dtype).max) if dtype.kind == "f" else 1.0 if dtype.kind == "b" else np.inf
    if not low.size or not (np.isfinite(low).all() and np.isfinite(high).all()) or high.max() >= extreme:
        return None, None
    if bool(np.all(low == low[0])) and bool(np.all(high == high[0])):
        return (float(low[0]),), (float(high[0]),)
    return tuple(low.tolist()), tuple(high.tolist())


def _is_byte_range(space: Mapping[str, Any]) -> bool:
    return bool(np.all(np.asarray(space["low"]) == 0) and np.all(np.asarray(space["high"]) == 255))


def is_picture(space: Mapping[str, Any]) -> bool:
    """Whether Minari would store the space as JPEG: uint8 from 0 to 255, at least 32 × 32."""
    shape = space.get("shape")
    if (
        space.get("type") != "Box"
        or space.get("dtype") != "uint8"
        or not isinstance(shape, list)
        or len(shape) not in (2, 3)
    ):
        return False
    return min(shape[:2]) >= 32 and _is_byte_range(space)
