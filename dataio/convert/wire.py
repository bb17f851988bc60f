"""An Episode as bytes, as a reader process sends it to its parent: a JSON header and raw arrays, never a pickle.

The libraries in the reader process parse untrusted data. Therefore the parent checks what the reader sends like any
other input.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from tiphys.dataio.convert.limits import (
    EPISODE_BYTES,
    EPISODE_STEPS,
    FIELDS,
    JSON_BYTES,
    bytes_of,
    check_shape,
    parse_json,
)
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.inplace.kept import MAX_BYTES, KeptVideo

_DTYPE_KINDS = "biuf"  # bool, integers, floats


def dump(episode: Episode) -> list[bytes | memoryview]:
    """The parts to send, one after another.

    Raises DataError if a dtype cannot be sent or if the episode is too large.
    """
    header: dict[str, Any] = {
        "id": episode.id,
        "task": episode.task,
        "steps": int(episode.steps),
        "success": None if episode.success is None else bool(episode.success),
        "agent": episode.agent,
        "info": episode.info,
        "fields": {},
    }
    buffers: list[bytes | memoryview] = []
    total = 0
    for name, value in episode.fields.items():
        if isinstance(value, str):
            header["fields"][name] = {"text": value}
            continue
        if isinstance(value, KeptVideo):
            frames = np.asarray(value.frames, "<i8")
            total += len(value.data) + frames.nbytes
            header["fields"][name] = {"video": len(value.data), "rows": len(frames)}
            buffers += [value.data, bytes_of(frames)]
            continue
        array = np.asarray(value)
        if array.dtype.kind in "UST":
            header["fields"][name] = {"texts": array.tolist()}
            continue
        if array.dtype.kind not in _DTYPE_KINDS:
            raise DataError(
                f"field {name!r} has dtype {array.dtype}; only bool, integers, floats and texts can be stored"
            )
        shape = array.shape  # `ascontiguousarray` makes [1] of a scalar
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        total += array.nbytes
        header["fields"][name] = {"dtype": array.dtype.str, "shape": shape}
        buffers.append(bytes_of(array))
    if total > EPISODE_BYTES:
        raise DataError(f"the episode needs {total:,} bytes; the limit is {EPISODE_BYTES:,} bytes")
    text = json.dumps(header, default=_to_json).encode()
    return [struct.pack("<Q", len(text)), text, *buffers]


def _to_json(value: Any) -> Any:
    """NumPy values in `info` as plain ones, for json.dumps."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise DataError(f"`info` holds a {type(value).__name__}, which cannot be stored as JSON")


def load(read_into: Callable[[memoryview], None], where: str) -> Episode:
    """Read one episode. `read_into` fills a view with the next bytes, or raises.

    Raises DataError if the bytes are not a valid episode.
    """
    size = bytearray(8)
    read_into(memoryview(size))
    (length,) = struct.unpack("<Q", size)
    if length > JSON_BYTES:
        raise DataError(f"{where}: the header of an episode has {length:,} bytes; the limit is {JSON_BYTES:,} bytes")
    text = bytearray(length)
    read_into(memoryview(text))
    header = parse_json(bytes(text), where)
    try:
        steps, field_headers = int(header["steps"]), dict(header["fields"])
        if not 0 <= steps <= EPISODE_STEPS or len(field_headers) > FIELDS:
            raise DataError(
                f"{where}: an episode of {steps:,} steps and {len(field_headers)} fields is over the limits of "
                f"{EPISODE_STEPS:,} steps and {FIELDS:,} fields"
            )
        fields = {str(name): _field(entry, read_into, where) for name, entry in field_headers.items()}
        return Episode(
            id=str(header["id"]),
            task=str(header["task"]),
            fields=fields,
            steps=steps,
            success=None if header["success"] is None else bool(header["success"]),
            agent=str(header["agent"]),
            info=dict(header["info"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the reader sent an invalid episode ({error!r})") from None


def _field(entry: dict[str, Any], read_into: Callable[[memoryview], None], where: str) -> Any:
    if "text" in entry:
        return str(entry["text"])
    if "texts" in entry:
        return np.array([str(t) for t in entry["texts"]], dtype=StringDType())
    if "video" in entry:
        size, rows = int(entry["video"]), int(entry["rows"])
        if not 0 < size <= MAX_BYTES + (MAX_BYTES >> 4) or not 0 < rows <= EPISODE_STEPS:
            raise DataError(f"{where}: the reader sent a video of {size:,} bytes for {rows:,} rows")
        data, frames = bytearray(size), np.empty(rows, "<i8")
        read_into(memoryview(data))
        read_into(bytes_of(frames))
        return KeptVideo(bytes(data), frames)
    dtype = np.dtype(str(entry["dtype"]))
    if dtype.kind not in _DTYPE_KINDS:
        raise DataError(f"{where}: the reader sent an array of dtype {dtype}")
    shape = check_shape(entry["shape"], dtype.itemsize, where)
    array = np.empty(math.prod(shape), dtype)
    read_into(bytes_of(array))
    return array.reshape(shape)
