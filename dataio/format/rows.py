"""`steps.npy`: the small fields of an episode as a structured array with one row for each step. Each row has its own CRC-32C.

The CRC is the last column of a row. After a CRC register has read some data and then the CRC of these data, its state is always
the same. Therefore the CRC of whole rows depends only on the size of a row and their number: one pass over its bytes verifies a
window, and only a window that fails is searched row by row.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec

FIELD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*(\.[A-Za-z0-9_\-]+)*")
MAX_STEP = 1 << 30  # most bytes of one step of a field
SMALL_FIELD = 4096  # most bytes a step of a field that is stored in steps.npy
ONLY_WITH_ACTION = ("action", "reward", "terminated", "truncated")  # roles without a value in a row without an action
_BLOCK = 256  # most rows whose CRC is computed at once, so that few constants are kept


def is_small(field: FieldSpec) -> bool:
    """Whether a field is a column of `steps.npy`."""
    by_step = field.per == "step" and field.dtype != "str" and field.modality != "image"
    return by_step and field.bytes_per_step <= SMALL_FIELD


def is_large(field: FieldSpec) -> bool:
    """Whether a field is stored in members of its own: images, fields of more than 4 KiB a step, text that changes by step."""
    if field.per == "step":
        return not is_small(field)
    return field.modality == "image" or field.bytes_per_step > SMALL_FIELD


def plain(value: Any) -> Any:
    """For `json.dumps(default=…)`: a NumPy scalar as a Python scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def check_task(task: TaskSpec) -> None:
    """Raises DataError if a field's name, dtype or shape cannot be stored."""
    seen: set[str] = set()
    for field in task.fields:
        where = f"task {task.name!r}, field {field.name!r}"
        if not FIELD_NAME.fullmatch(field.name) or len(field.name) > 64 or field.name in ("steps", "json"):
            raise DataError(
                f"{where}: a field's name must consist of letters, digits, - and _ in parts joined by dots, with at most "
                "64 characters, and must not be `steps` or `json`"
            )
        if field.name.lower() in seen:  # WebDataset readers convert extensions to lower case
            raise DataError(
                f"{where}: another field has this name, apart from upper and lower case; rename one of them"
            )
        seen.add(field.name.lower())
        if field.dtype == "str":
            if field.shape:
                raise DataError(f"{where}: a text must have shape (), not {field.shape}")
            continue
        try:
            dtype = np.dtype(field.dtype)
        except TypeError:
            raise DataError(f"{where}: {field.dtype!r} is not a dtype of NumPy") from None
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise DataError(f"{where}: {field.dtype} cannot be stored; use bool, integers or floats of up to 64 bits")
        varies = field.modality == "image" and field.dtype == "uint8" and field.per == "step"
        if any(n < (0 if varies else 1) for n in field.shape) or field.bytes_per_step > MAX_STEP:
            raise DataError(f"{where}: shape {field.shape} is empty or takes more than {MAX_STEP} bytes a step")


def row_dtype(task: TaskSpec) -> np.dtype:
    """The dtype of one row of `steps.npy`: packed, little endian, and determined by the task alone."""
    columns: list[Any] = [("_step", "<u4"), ("_return_to_go", "<f4"), ("_valid", "u1")]
    for field in sorted((f for f in task.fields if is_small(f)), key=lambda f: f.name):
        columns.append((field.name, np.dtype(field.dtype).newbyteorder("<"), field.shape))
    return np.dtype([*columns, ("_crc", "<u4")])


class RowLayout:
    """Where the fields of a task are stored.

    dtype     of one row of `steps.npy`
    small     fields that are columns of `steps.npy`
    large     fields with members of their own
    episodic  fields with one value for the whole episode, which is in the .json member and in the index
    observed  fields by step that may have a value after the last action
    names     the names of all fields
    """

    def __init__(self, task: TaskSpec) -> None:
        self.task = task
        self.dtype = row_dtype(task)
        self.small = [f for f in task.fields if is_small(f)]
        self.large = [f for f in task.fields if is_large(f)]
        self.episodic = [f for f in task.fields if not is_small(f) and not is_large(f)]
        self.observed = [f for f in task.fields if f.per == "step" and f.role not in ONLY_WITH_ACTION]
        self.names = frozenset(f.name for f in task.fields)

    def row_count(self, episode: Episode) -> int:
        """Rows of the episode: T, or T + 1 if any field has a value after the last action; at least 1."""
        values = (np.shape(episode.fields.get(f.name, ())) for f in self.observed)
        return max(episode.steps, 1, *(shape[0] for shape in values if shape))


def column(field: FieldSpec, episode: Episode, rows: int) -> np.ndarray:
    """A field's values by step, checked against its spec: [T, *shape], or also [rows, *shape] for an observed field.

    Raises DataError if the field is missing, or its length, shape or dtype is not the declared one.
    """
    where = f"episode {episode.id!r} of task {episode.task!r}, field {field.name!r}"
    value = episode.fields.get(field.name)
    if value is None:
        raise DataError(f"{where}: it is missing; add it to the episode, or remove it from the task")
    array = np.asarray(value)
    allowed = {episode.steps} if field.role in ONLY_WITH_ACTION else {episode.steps, rows}
    if array.ndim == 0 or len(array) not in allowed:
        counts = " or ".join(map(str, sorted(allowed)))
        raise DataError(f"{where}: it has shape {array.shape}, but must have {counts} rows")
    if field.dtype == "str":
        return array
    varies = field.modality == "image" and 0 in field.shape
    if array.shape[1:] != field.shape and not (varies and array.ndim == 1 + len(field.shape)):
        raise DataError(f"{where}: a step has shape {array.shape[1:]}, but the task declares {field.shape}")
    if not np.can_cast(array.dtype, np.dtype(field.dtype), "safe"):
        raise DataError(f"{where}: {array.dtype} values do not fit the declared {field.dtype} without loss; cast them")
    return np.ascontiguousarray(checked_cast(array, np.dtype(field.dtype).newbyteorder("<"), where))


def returns_to_go(episode: Episode, rows: int) -> np.ndarray:
    """float64 [rows]: undiscounted sum of the rewards from each row on. A reward with several elements counts as their sum."""
    out = np.zeros(rows)
    if episode.steps and episode.fields.get("reward") is not None:
        with np.errstate(invalid="ignore"):  # a signalling NaN of damaged data
            reward = np.asarray(episode.fields["reward"], np.float64)
        reward = reward[: episode.steps].reshape(episode.steps, -1).sum(1)
        out[: episode.steps] = np.cumsum(reward[::-1])[::-1]
    return out


def pack_rows(layout: RowLayout, episode: Episode) -> np.ndarray:
    """The episode's rows as the structured array that becomes `steps.npy`. Raises DataError if a field does not fit its spec."""
    count = layout.row_count(episode)
    rows = np.zeros(count, layout.dtype)
    rows["_step"] = np.arange(count)
    rows["_valid"][: episode.steps] = 1
    for field in layout.small:
        values = column(field, episode, count)
        rows[field.name][: len(values)] = values
    where = f"episode {episode.id!r} of task {episode.task!r}: the sum of its rewards"
    rows["_return_to_go"] = checked_cast(returns_to_go(episode, count), np.float32, where, "scale the rewards down")
    raw = rows.view(np.uint8).reshape(count, layout.dtype.itemsize)
    rows["_crc"] = np.fromiter(map(crc32c, raw[:, :-4]), np.uint32, count)
    return rows


@lru_cache(maxsize=4096)
def _constant(row_bytes: int, rows: int) -> int:
    """The CRC-32C of `rows` intact rows of this size. It is the same for any content, so it is computed from zeros."""
    zeros = bytes(row_bytes - 4)
    return crc32c((zeros + crc32c(zeros).to_bytes(4, "little")) * rows)


def broken_row(view: memoryview, row_bytes: int) -> int:
    """Number of the first row whose CRC does not match, or −1 if all rows are intact.

    If `view` does not consist of whole rows, the result is the number of whole rows.
    """
    rows, rest = divmod(len(view), row_bytes)
    if not rest and 0 < rows <= _BLOCK and crc32c(view) == _constant(row_bytes, rows):
        return -1
    if rest:
        return rows
    for first in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - first)
        block = view[first * row_bytes : (first + count) * row_bytes]
        if crc32c(block) == _constant(row_bytes, count):
            continue
        for row in range(count):
            one = block[row * row_bytes : (row + 1) * row_bytes]
            if crc32c(one) != _constant(row_bytes, 1):
                return first + row
    return -1
