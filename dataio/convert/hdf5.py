"""Untrusted HDF5 files: only plain datasets stored in the file itself, whose size is checked before they are read.

Soft and external links, datasets stored in other files, object references and compound types are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import texts
from tiphys.dataio.convert.limits import EPISODE_BYTES, FIELDS, check_shape
from tiphys.dataio.convert.names import AmbiguousNames
from tiphys.dataio.convert.source import Source, SourceUnavailable, is_failure
from tiphys.dataio.episode import DataError

_KINDS = "biuf"  # dtype kinds that are read as arrays
_DEPTH = 16
_BLOCK_ROWS = 256  # rows of byte strings read at a time


@contextmanager
def open_hdf5(source: Source, path: str) -> Iterator[Any]:
    """The file as a read-only h5py.File. Raises DataError if it is not readable HDF5."""
    import h5py

    with source.open(path) as stream:
        try:
            file = h5py.File(source.local_path(path) or stream, "r")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            check_disk(error, source.where(path))
            raise DataError(f"{source.where(path)}: not a readable HDF5 file ({error})") from None
        with file:
            try:
                yield file
            except (SourceUnavailable, FileNotFoundError):
                raise
            except (OSError, RuntimeError) as error:  # any access to a group can hit damage
                check_disk(error, source.where(path))
                raise DataError(f"{source.where(path)}: the HDF5 structure is damaged ({error})") from None


def is_hdf5(source: Source, path: str) -> bool:
    with source.open(path) as stream:
        return stream.read(8) == b"\x89HDF\r\n\x1a\n"


def hdf5_files(source: Source) -> list[str]:
    return [p for p in source.files if p.endswith((".hdf5", ".h5"))]


def names(group: Any) -> list[str]:
    """The names of a group's members in natural order (demo_2 before demo_10)."""
    found = list(group)
    if not all(isinstance(name, str) for name in found):  # h5py returns names that are not UTF-8 as bytes
        raise DataError(f"{group.name}: has a member whose name is not UTF-8")
    return sorted(found, key=_natural_key)


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key in which runs of digits compare as numbers."""
    parts, number = [], ""
    for letter in name:
        if letter.isdigit():
            number += letter
        else:
            if number:
                parts.append((int(number), ""))
                number = ""
            parts.append((-1, letter))
    return parts + ([(int(number), "")] if number else [])


def has(group: Any, name: str) -> bool:
    """Whether the group has this member. A link is not followed, unlike by h5py's `name in group` and `group.get`."""
    return hasattr(group, "keys") and "/" not in name and bool(group.id.links.exists(name.encode()))


def member(group: Any, name: str, where: str) -> Any:
    """A member of the group, if it is stored in this file."""
    import h5py

    if not has(group, name):
        raise DataError(f"{where}: has no {name!r}")
    kind = group.id.links.get_info(name.encode()).type
    if kind != h5py.h5l.TYPE_HARD:
        names = {h5py.h5l.TYPE_SOFT: "SoftLink", h5py.h5l.TYPE_EXTERNAL: "ExternalLink"}
        raise DataError(f"{where}/{name}: is a link ({names.get(kind, 'of another kind')}); links are not followed")
    try:
        return group[name]
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        check_disk(error, f"{where}/{name}")
        raise DataError(f"{where}/{name}: cannot be opened ({error})") from None


def datasets(group: Any, where: str, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """All datasets below a group: dotted name -> h5py.Dataset."""
    out: dict[str, Any] = {}
    if depth > _DEPTH:
        raise DataError(f"{where}: groups are nested deeper than {_DEPTH} levels")
    for name in names(group):
        child = member(group, name, where)
        dotted = f"{prefix}.{name}" if prefix else name
        found = datasets(child, f"{where}/{name}", dotted, depth + 1) if hasattr(child, "keys") else {}
        if hasattr(child, "shape"):
            found = {dotted: child}
        for key in found.keys() & out.keys():
            raise AmbiguousNames(
                f"{where}: {out[key].name!r} and {found[key].name!r} both have the name {key!r} if `.` is written for `/`; "
                "rename one of them in the file"
            )
        out.update(found)
        if len(out) > FIELDS:
            raise DataError(f"{where}: has more than {FIELDS:,} datasets")
    return out


def length(dataset: Any, where: str) -> int:
    """The number of rows."""
    if not getattr(dataset, "shape", None):
        raise DataError(f"{where}: expected an array with one row per step")
    return int(dataset.shape[0])


def is_text(dataset: Any) -> bool:
    import h5py

    return h5py.check_string_dtype(dataset.dtype) is not None


def read(dataset: Any, where: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) as a plain array; text as StringDType."""
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{where}: expected a dataset")
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{where}: its bytes are stored in other files, which are not opened")
    if dataset.shape is None:
        raise DataError(f"{where}: the dataset is empty (it has no shape)")
    string = h5py.check_string_dtype(dataset.dtype)
    rows = _row_count(dataset, start, stop)
    shape = check_shape(
        (rows, *dataset.shape[1:]) if dataset.shape else (), dataset.dtype.itemsize, where, EPISODE_BYTES
    )
    _check_chunks(dataset, where)
    try:
        value = dataset[start : start + rows] if dataset.shape else dataset[()]
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        check_disk(error, where)
        raise DataError(f"{where}: cannot be read ({error})") from None
    if string is not None:
        flat = texts(np.asarray(value, dtype=object).reshape(-1).tolist(), where)
        return flat.reshape(shape)
    if dataset.dtype.kind not in _KINDS:
        raise DataError(f"{where}: dtype {dataset.dtype} is not supported")
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_bytes_rows(dataset: Any, where: str, start: int = 0, stop: int | None = None) -> list[bytes]:
    """Rows of a dataset of byte strings: uint8 [n, size] or a variable-length array of uint8."""
    import h5py

    varying = h5py.check_vlen_dtype(dataset.dtype)
    if varying is None:
        array = read(dataset, where, start, stop)
        if array.dtype != np.uint8 or array.ndim != 2:
            raise DataError(f"{where}: expected encoded images, not {array.dtype} of shape {array.shape}")
        return [row.tobytes() for row in array]
    if varying != np.uint8 or dataset.external or dataset.is_virtual or len(dataset.shape) != 1:
        raise DataError(f"{where}: expected encoded images, one variable-length array of uint8 per row")
    rows = _row_count(dataset, start, stop)
    try:
        stop = start + rows
        blocks = (dataset[i : min(i + _BLOCK_ROWS, stop)] for i in range(start, stop, _BLOCK_ROWS))
        return [row.tobytes() for block in blocks for row in block]
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        check_disk(error, where)
        raise DataError(f"{where}: cannot be read ({error})") from None


def _row_count(dataset: Any, start: int, stop: int | None) -> int:
    """How many of the rows [start, stop) exist; 1 for a scalar."""
    if not dataset.shape:
        return 1
    return max(0, min(int(dataset.shape[0]) if stop is None else stop, int(dataset.shape[0])) - start)


def _check_chunks(dataset: Any, where: str) -> None:
    """Check the chunk size: a chunk is decompressed whole, even if only some of its rows are read."""
    if dataset.chunks is not None:
        size = math.prod(int(c) for c in dataset.chunks) * dataset.dtype.itemsize
        if size > EPISODE_BYTES:
            raise DataError(f"{where}: its chunks have {size:,} bytes each; at most {EPISODE_BYTES:,} are read")


def check_disk(error: Exception, where: str) -> None:
    """Raises SourceUnavailable if HDF5 failed because a read from the disk failed, not because the file is damaged.

    HDF5 opens local files itself, and states the error of the system only in its text.
    """
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found.group(1)) if found else error.errno if isinstance(error, OSError) else None
    if is_failure(number):
        raise SourceUnavailable(f"{where}: {error}") from error


def attribute(holder: Any, name: str) -> Any:
    """An attribute as a plain Python value; None if it is missing or of an unsupported kind."""
    try:
        value = holder.attrs.get(name)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        check_disk(error, f"{holder.name}, attribute {name}")
        return None
    if isinstance(value, bytes | np.bytes_):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool) else None


def attributes(holder: Any, where: str) -> dict[str, Any]:
    """All attributes: name -> plain Python value, or None for one of an unsupported kind."""
    try:
        found = sorted(str(n) for n in holder.attrs)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        check_disk(error, where)
        raise DataError(f"{where}: the attributes cannot be read ({error})") from None
    if len(found) > FIELDS:
        raise DataError(f"{where}: has {len(found):,} attributes; at most {FIELDS:,} are read")
    return {name: attribute(holder, name) for name in found}
