"""The values of TFDS features, decoded from a tf.Example to arrays [rows, *shape].

TFDS stores a tensor as numbers, or as bytes (`encoding` bytes or zlib). A tensor with several open dimensions is stored
as `PATH/value` and `PATH/shape`, a sequence within a step as `PATH/ragged_flat_values` and `PATH/ragged_row_lengths_0`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.convert.infer import texts
from tiphys.dataio.convert.limits import EPISODE_BYTES, EPISODE_STEPS, check_shape, decode_image, inflate
from tiphys.dataio.convert.tfds import Feature
from tiphys.dataio.convert.tfrecord import Value
from tiphys.dataio.episode import DataError

LENGTH_DIFFERS = "its length differs from step to step; to convert without it, drop it in the mapping file"


def count_steps(example: Mapping[str, Value], features: list[Feature], where: str) -> int:
    """Number of steps. Raises DataError if the features of the steps do not agree."""
    counts: set[float] = set()
    for feature in features:
        if not feature.in_steps or feature.path not in example:
            continue
        value = example[feature.path]
        size = 1 if isinstance(value, list) else math.prod(feature.shape)
        if -1 not in feature.shape or isinstance(value, list):
            counts.add(len(value) / size if size else 0.0)
    if len(counts) != 1 or not next(iter(counts)).is_integer():
        raise DataError(
            f"{where}: the features have different numbers of steps ({', '.join(f'{c:g}' for c in sorted(counts)[:5])})"
        )
    steps = int(next(iter(counts)))
    if not 0 < steps <= EPISODE_STEPS:
        raise DataError(f"{where}: {steps:,} steps; an episode has 1 to {EPISODE_STEPS:,}")
    return steps


def decode(example: Mapping[str, Value], feature: Feature, rows: int, where: str) -> np.ndarray:
    """[rows, *shape] of one feature. Raises DataError if it is missing, or its values do not have that shape."""
    value = example.get(feature.path, example.get(f"{feature.path}/value"))
    if value is None and f"{feature.path}/ragged_flat_values" in example:
        return _ragged(example, feature, rows, where)
    if value is None:
        raise DataError(f"{where}: the feature {feature.path!r} of features.json is missing")
    if feature.kind == "text":
        return texts(_byte_rows(value, rows, where), where)
    if feature.kind == "image":
        return _images(_byte_rows(value, rows, where), feature, where)
    if isinstance(value, list):
        data = _byte_rows(value, rows, where)
        return _check_given(_tensors(data, feature, example.get(f"{feature.path}/shape"), where), feature, where)
    if -1 in feature.shape:
        known = math.prod(s for s in feature.shape if s != -1)
        if feature.shape.count(-1) > 1 or value.size % max(rows * known, 1):
            raise DataError(f"{where}: {value.size} values do not make {rows} rows of shape {feature.shape}")
        shape = tuple(value.size // max(rows * known, 1) if s == -1 else s for s in feature.shape)
    else:
        shape = feature.shape
    if value.size != rows * math.prod(shape):
        raise DataError(f"{where}: {value.size} values do not make {rows} rows of shape {shape}")
    return _check_given(_cast(value, feature.dtype, where).reshape(rows, *shape), feature, where)


def _check_given(value: np.ndarray, feature: Feature, where: str) -> np.ndarray:
    """The value. Raises DataError if the feature is optional and a row has none.

    TFDS then stores the smallest number of the dtype. 0 of an unsigned dtype may be a real value, and is kept.
    """
    if not feature.optional or value.dtype.kind not in "if":
        return value
    smallest = np.finfo(value.dtype).min if value.dtype.kind == "f" else np.iinfo(value.dtype).min
    absent = np.flatnonzero((value == smallest).reshape(len(value), -1).any(axis=1))
    if len(absent):
        raise DataError(
            f"{where}: the feature is optional, and row {int(absent[0])} has no value; to convert without it, drop the "
            f"field in the mapping file (`fields: {{{feature.field}: drop}}`)"
        )
    return value


def _cast(value: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """As `dtype`. TFDS stores the bits of a uint64 as int64. Raises DataError if a value does not fit."""
    return value.view(np.uint64) if dtype == "uint64" and value.dtype == np.int64 else checked_cast(value, dtype, where)


def _byte_rows(value: Value, rows: int, where: str) -> list[bytes]:
    if not isinstance(value, list) or len(value) != rows:
        raise DataError(f"{where}: expected {rows} byte strings, found {len(value)} values, or numbers")
    return value


def _images(data: list[bytes], feature: Feature, where: str) -> np.ndarray:
    """Images of one size. An empty string, which TFDS writes for an absent image, becomes a black image."""
    shape = feature.shape if -1 not in feature.shape and feature.shape else None
    first = next((decode_image(d, where) for d in data if d), None) if shape is None else None
    if first is None and shape is None:
        raise DataError(f"{where}: the episode has no image, and features.json gives no shape")
    size = tuple(shape) if shape is not None else first.shape  # type: ignore[union-attr]
    check_shape((len(data), *size), np.dtype(feature.dtype).itemsize, where, EPISODE_BYTES)
    out = np.zeros((len(data), *size), np.dtype(feature.dtype))
    for row, encoded in enumerate(data):
        if encoded:
            array = decode_image(encoded, f"{where}, step {row}")
            if feature.dtype == "float32" and array.dtype == np.uint8 and array.shape[2] == 4:
                array = np.ascontiguousarray(array).view("<f4")  # TFDS stores the bytes of a float32 (depth) as RGBA
            if array.shape != size:
                raise DataError(f"{where}, step {row}: the image has shape {array.shape}, not {size}")
            out[row] = checked_cast(array, out.dtype, f"{where}, step {row}")
    return out


def _tensors(data: list[bytes], feature: Feature, shapes: Value | None, where: str) -> np.ndarray:
    """Tensors that TFDS stored as bytes (plain or zlib), as [rows, *shape].

    shapes: the shape of each row, if several dimensions are open
    """
    if feature.encoding not in ("bytes", "zlib"):
        raise DataError(f"{where}: stored as bytes with encoding {feature.encoding!r}, which cannot be read")
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    shape = feature.shape
    if shape.count(-1) > 1:
        shape = _stored_shape(feature, shapes, len(data), where)
    open_length = -1 in shape
    known = [max(s, 1) for s in shape] if open_length else shape
    size = math.prod(check_shape((len(data), *known), dtype.itemsize, where)[1:]) * dtype.itemsize
    limit = EPISODE_BYTES // max(len(data), 1) if open_length else size
    rows = [inflate(d, where, wbits=15, limit=limit) if feature.encoding == "zlib" else d for d in data]
    if open_length and len({len(r) for r in rows}) > 1:
        raise DataError(f"{where}: {LENGTH_DIFFERS}")
    if open_length and rows and size and len(rows[0]) % size == 0:
        shape = tuple(len(rows[0]) // size if s == -1 else s for s in shape)
        size = len(rows[0])
    if any(len(r) != size for r in rows):
        raise DataError(f"{where}: a tensor does not have the expected {size} bytes")
    return checked_cast(np.frombuffer(b"".join(rows), dtype).reshape(len(data), *shape), feature.dtype, where)


def _stored_shape(feature: Feature, shapes: Value | None, rows: int, where: str) -> tuple[int, ...]:
    sizes = len(feature.shape)
    if not isinstance(shapes, np.ndarray) or shapes.dtype.kind != "i" or shapes.size != rows * sizes or not rows:
        raise DataError(f"{where}: the shape of each row is missing")
    table = shapes.reshape(rows, sizes)
    if bool(np.any(table != table[0])):
        raise DataError(f"{where}: {LENGTH_DIFFERS}")
    return check_shape(table[0].tolist(), 1, where)


def _ragged(example: Mapping[str, Value], feature: Feature, rows: int, where: str) -> np.ndarray:
    """A ragged feature, whose length must be the same for all steps of this episode.

    TFDS stores it as `ragged_flat_values` and `ragged_row_lengths_0`.
    """
    values = example.get(feature.path + "/ragged_flat_values")
    lengths = example.get(feature.path + "/ragged_row_lengths_0")
    if not isinstance(values, np.ndarray) or not isinstance(lengths, np.ndarray) or len(lengths) != rows:
        raise DataError(f"{where}: the ragged feature has no valid row lengths")
    if rows == 0 or bool(np.any(lengths != lengths[0])) or feature.shape.count(-1) > 1:
        raise DataError(f"{where}: {LENGTH_DIFFERS}")
    if feature.shape.count(-1) == 0 and feature.shape and int(lengths[0]) != feature.shape[0]:
        raise DataError(f"{where}: {int(lengths[0])} values per step, but features.json says {feature.shape[0]}")
    shape = check_shape([int(lengths[0]) if s == -1 else s for s in feature.shape], 8, where)
    if values.size != rows * math.prod(shape):
        raise DataError(f"{where}: {values.size} values do not make {rows} rows of shape {shape}")
    return _cast(values, feature.dtype, where).reshape(rows, *shape)
