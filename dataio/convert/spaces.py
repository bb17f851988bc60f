"""Gymnasium spaces in the JSON form of Minari, and the fields that they become. Needs no gymnasium."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import field_spec
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
            if dtype.kind in "iu":
                return field_spec(name, dtype, shape, values=_values(space))
            low, high = _bounds(space, dtype, shape)
            return field_spec(name, dtype, shape, low=low, high=high)
        if kind == "Discrete":
            start, count = int(space.get("start", 0)), int(space["n"])
            low, high = ((float(start),), (float(start + count - 1),)) if start else (None, None)
            return field_spec(name, space.get("dtype", "int64"), (), values=count, low=low, high=high)
        if kind == "MultiDiscrete":
            counts = np.asarray(space["nvec"], np.int64)
            return field_spec(name, space["dtype"], counts.shape, values=int(counts.max()), modality="discrete")
        if kind == "MultiBinary":
            sizes = space["n"] if isinstance(space["n"], list) else [int(space["n"])]
            return field_spec(name, "int8", check_shape(sizes, 1, where), values=2, modality="discrete")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: the space of {name!r} cannot be read ({type(error).__name__}: {error})") from None
    if kind == "Text":
        return field_spec(name, "str", ())
    raise DataError(f"{where}: the space of {name!r} has type {kind!r}, which cannot be read")


def _values(space: Mapping[str, Any]) -> int:
    """Number of values of an integer Box; 0 (unknown) if it does not begin at 0 or has more than 2^20."""
    low, high = np.asarray(space["low"], np.float64), np.asarray(space["high"], np.float64)
    largest = float(high.max(initial=0))
    return int(largest) + 1 if low.size and not low.any() and largest < 1 << 20 else 0


Bounds = tuple[float, ...] | None


def _bounds(space: Mapping[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> tuple[Bounds, Bounds]:
    """(low, high) in a form that broadcasts over the shape: a single number if all are equal.

    (None, None) if a bound is infinite or the largest number of the dtype, or if the bounds differ and the shape does
    not have one dimension.
    """
    low = np.asarray(space["low"], np.float64).reshape(-1)
    high = np.asarray(space["high"], np.float64).reshape(-1)
    extreme = float(np.finfo(dtype).max) if dtype.kind == "f" else 1.0 if dtype.kind == "b" else np.inf
    if not low.size or not (np.isfinite(low).all() and np.isfinite(high).all()) or high.max() >= extreme:
        return None, None
    if bool(np.all(low == low[0])) and bool(np.all(high == high[0])):
        return (float(low[0]),), (float(high[0]),)
    return (tuple(low.tolist()), tuple(high.tolist())) if len(shape) == 1 else (None, None)


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
    return bool(
        min(shape[:2]) >= 32 and np.all(np.asarray(space["low"]) == 0) and np.all(np.asarray(space["high"]) == 255)
    )
