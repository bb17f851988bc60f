"""Gymnasium spaces as JSON (Minari's serialisation), and nested values of them as dotted fields. Needs no gymnasium."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.limits import check_shape, parse_json
from tiphys.dataio.episode import DataError, FieldSpec

_DEPTH = 16


def leaves(
    space: Any, name: str, where: str, depth: int = 0
) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Any]]]:
    """(dotted name, path of keys, space) of each leaf. A Tuple's keys are its numbers."""
    if isinstance(space, str):
        space = parse_json(space, where)
    if not isinstance(space, Mapping) or depth > _DEPTH:
        raise DataError(f"{where}: {str(space)[:80]!r} is not a space")
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
    """The field of a leaf: bounds of a Box, number of values of a discrete space."""
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
        raise DataError(f"{where}: the space of {name!r} is not understood ({type(error).__name__}: {error})") from None
    if kind == "Text":
        return field_spec(name, "str", ())
    raise DataError(f"{where}: {name!r} is a space of type {kind!r}, which is not read")


def _values(space: Mapping[str, Any]) -> int:
    """Number of values of an integer Box that begins at 0; 0 where it does not, or is open."""
    low, high = np.asarray(space["low"], np.float64), np.asarray(space["high"], np.float64)
    most = float(high.max(initial=0))
    return int(most) + 1 if low.size and not low.any() and most < 1 << 20 else 0


Bounds = tuple[float, ...] | None


def _bounds(space: Mapping[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> tuple[Bounds, Bounds]:
    """Bounds that broadcast over the shape: one number where all are equal. None where any is infinite."""
    low = np.asarray(space["low"], np.float64).reshape(-1)
    high = np.asarray(space["high"], np.float64).reshape(-1)
    extreme = float(np.finfo(dtype).max) if dtype.kind == "f" else 1.0 if dtype.kind == "b" else np.inf
    if not low.size or not (np.isfinite(low).all() and np.isfinite(high).all()) or high.max() >= extreme:
        return None, None
    if bool(np.all(low == low[0])) and bool(np.all(high == high[0])):
        return (float(low[0]),), (float(high[0]),)
    return (tuple(low.tolist()), tuple(high.tolist())) if len(shape) == 1 else (None, None)


def is_picture(space: Mapping[str, Any]) -> bool:
    """Whether Minari would store it as JPEG: uint8 0…255 of at least 32 × 32."""
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
