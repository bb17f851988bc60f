"""`index.parquet` as flat, memory-mapped arrays, without a Python object for each episode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format.encodings import KINDS
from tiphys.dataio.format.rows import FIELD_NAME, row_dtype
from tiphys.dataio.format.table import PART, Shard

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMN = re.compile(r"[a-z_]+|(text|value|chunks)\." + FIELD_NAME.pattern)


def decode(file: Path, out: Path | None, tasks: Sequence[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    """Decode an index file to flat arrays by name: memory-mapped `.npy` files in the folder `out`, or in memory if it is None.

    Number columns keep their values. `task` and `shard` become positions in the two lists. Columns with few distinct strings
    (`agent`, `short`, `text.F`) become codes (−1: null), with `NAME.bytes`, the distinct strings in UTF-8, and `NAME.first`,
    where each begins. `id` and `value.F` become `.bytes` and `.first`, with one item for each episode. `chunks.F` becomes the
    arrays of a `ChunkTable`.

    Raises DataError if the file is damaged or has a task, a shard or a column that is not allowed.
    """
    import pyarrow as pa

    try:
        return _decode(file, Sink(out), tasks, shards)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # an error number means a disk error, not a damaged file
        raise DataError(f"{file.name} is damaged: {error}") from None


def _decode(file: Path, sink: Sink, tasks: Sequence[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, memory_map=True, page_checksum_verification=True) as source:
        names = source.schema_arrow.names
        for name in names:  # column names become file names
            if not _COLUMN.fullmatch(name):
                raise DataError(f"index column {name!r}: an index may not have a column of this name")
        strings = [n for n in names if n in ("agent", "short") or n.startswith("text.")]
        for batch in source.iter_batches(batch_size=PART, columns=[n for n in names if n not in strings]):
            for name in batch.schema.names:
                _decode_column(sink, name, batch.column(name), {"task": tasks, "shard": shards})
        for name in strings:
            _decode_dictionary(sink, name, source.read([name]).column(name))
    return sink.close(_expected(names))


_NUMBERS = {
    "steps": np.int32,
    "rows": np.int32,
    "return": np.float32,
    "success": np.int8,
    "hash": np.uint64,
    "offset": np.int64,
    "sample": np.int64,
    "sample_bytes": np.int64,
    "json": np.int64,
    "json_bytes": np.int64,
}


def _decode_column(sink: Sink, name: str, column: pa.Array, lists: Mapping[str, Sequence[str]]) -> None:
    import pyarrow.compute as pc

    if name in lists:
        encoded = column.dictionary_encode()
        places = {v: i for i, v in enumerate(lists[name])}
        try:
            codes = np.array([places[v] for v in encoded.dictionary.to_pylist()], np.int32)
        except KeyError as error:
            raise DataError(f"index column {name!r} names {error}, which the dataset does not list") from None
        sink.append(name, codes[encoded.indices.to_numpy()], np.int32)
    elif name == "success":
        sink.append(name, pc.fill_null(column.cast("int8"), -1).to_numpy(), np.int8)
    elif name in _NUMBERS:
        sink.append(name, column.to_numpy(zero_copy_only=False), _NUMBERS[name])
    elif name == "id" or name.startswith("value."):
        lengths, data = _string_bytes(column)
        sink.append_lengths(f"{name}.first", lengths)
        sink.append(f"{name}.bytes", data, np.uint8)
    elif name.startswith("chunks."):
        _decode_chunks(sink, name, column)


def _decode_chunks(sink: Sink, name: str, column: pa.Array) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = pc.index_in(pc.struct_field(column, "kind"), pa.array(KINDS))
    sink.append(f"{name}.kind", pc.fill_null(kinds, -1).to_numpy(), np.int8)
    sink.append(f"{name}.rows", pc.fill_null(pc.struct_field(column, "rows"), 1).to_numpy(), np.int32)
    lengths = [
        pc.fill_null(pc.list_value_length(pc.struct_field(column, n)), 0).to_numpy() for n in ("offset", "size", "crc")
    ]
    if not (np.array_equal(lengths[0], lengths[1]) and np.array_equal(lengths[0], lengths[2])):
        raise DataError(f"index column {name!r}: offset, size and crc have different lengths")
    sink.append_lengths(f"{name}.first", lengths[0])
    for part, dtype in (("offset", np.int64), ("size", np.int64), ("crc", np.uint32)):
        sink.append(f"{name}.{part}", pc.struct_field(column, part).flatten().to_numpy(), dtype)


def _decode_dictionary(sink: Sink, name: str, column: pa.ChunkedArray) -> None:
    import pyarrow as pa

    encoded = column.cast(pa.large_string()).dictionary_encode().unify_dictionaries()
    for chunk in encoded.chunks:
        sink.append(name, chunk.indices.fill_null(-1).to_numpy(), np.int32)
    words = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.large_string())
    lengths, data = _string_bytes(words)
    sink.append_lengths(f"{name}.first", lengths)
    sink.append(f"{name}.bytes", data, np.uint8)


def _string_bytes(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and concatenated bytes of a string or binary array, without a Python object for each item."""
    import pyarrow as pa

    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if offsets is None or not len(array):
        return np.zeros(len(array), np.int64), np.zeros(0, np.uint8)
    bounds = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return np.diff(bounds).astype(np.int64), content[bounds[0] : bounds[-1]]


def _expected(columns: Iterable[str]) -> dict[str, Any]:
    """The dtype of every array that these columns decode to (None: bounds), so that arrays without elements are written too."""
    out: dict[str, Any] = {"task": np.int32, "shard": np.int32, **_NUMBERS, "id.bytes": np.uint8, "id.first": None}
    for name in columns:
        if name in ("agent", "short") or name.startswith("text."):
            out |= {name: np.int32, f"{name}.first": None, f"{name}.bytes": np.uint8}
        elif name.startswith("value."):
            out |= {f"{name}.first": None, f"{name}.bytes": np.uint8}
        elif name.startswith("chunks."):
            out |= {f"{name}.kind": np.int8, f"{name}.rows": np.int32, f"{name}.first": None}
            out |= {f"{name}.offset": np.int64, f"{name}.size": np.int64, f"{name}.crc": np.uint32}
    return out


class Sink:
    """Arrays to which values are appended: `.npy` files in `folder`, or in memory if it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._parts: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._last: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray, dtype: Any) -> None:
        with np.errstate(over="ignore"):  # a return beyond the range of float32 becomes infinite
            values = np.ascontiguousarray(values, dtype)
        self._dtypes[name] = values.dtype
        self._lengths[name] = self._lengths.get(name, 0) + len(values)
        if self.folder is None:
            self._parts.setdefault(name, []).append(values)
            return
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = open(self.folder / f"{name}.npy", "wb")  # noqa: SIM115 (closed by close)
            _npy_header(file, values.dtype, 0)
        values.tofile(file)

    def append_lengths(self, name: str, lengths: np.ndarray) -> None:
        """Append to an array of bounds, which holds 0 and then the running sum of the lengths."""
        if name not in self._last:
            self.append(name, np.zeros(1, np.int64), np.int64)
            self._last[name] = 0
        bounds = self._last[name] + np.cumsum(lengths, dtype=np.int64)
        self.append(name, bounds, np.int64)
        self._last[name] = int(bounds[-1]) if len(bounds) else self._last[name]

    def close(self, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All arrays by name. Arrays of `expected` (name -> dtype; None: bounds) without values are added as empty ones."""
        for name, dtype in expected.items():
            if dtype is None:
                self.append_lengths(name, np.zeros(0, np.int64))
            elif name not in self._dtypes:
                self.append(name, np.zeros(0, dtype), dtype)
        if self.folder is None:
            return {n: np.concatenate(parts) for n, parts in self._parts.items()}
        for name, file in self._files.items():
            file.seek(0)
            _npy_header(file, self._dtypes[name], self._lengths[name])
            file.close()
        return load(self.folder)


def _npy_header(file: Any, dtype: np.dtype, length: int) -> None:
    # NumPy pads the header so that the length can grow: the header's size does not depend on the length
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def load(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder that `decode` wrote. They are memory-mapped, but of type ndarray: its element access is faster."""
    out = {}
    for file in sorted(folder.glob("*.npy")):
        empty = file.stat().st_size <= 128
        array = np.load(file, mmap_mode=None if empty else "r", allow_pickle=False)
        out[file.name[: -len(".npy")]] = np.asarray(array)
    return out


class Strings(Sequence[str]):
    """A list of strings, stored as one array of UTF-8 bytes and an array of bounds, without a Python object for each string."""

    def __init__(self, first: np.ndarray, data: np.ndarray) -> None:
        self._first, self._data = first, data

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return self._data[int(self._first[i]) : int(self._first[i + 1])].tobytes().decode(errors="replace")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def many(self, numbers: np.ndarray) -> list[str]:
        """The strings with these numbers (int [n], not negative)."""
        starts, ends = self._first[numbers].tolist(), self._first[numbers + 1].tolist()
        return [self._data[a:z].tobytes().decode(errors="replace") for a, z in zip(starts, ends, strict=True)]


class ChunkTable(NamedTuple):
    """The chunks of one large field in all E episodes, C chunks in total.

    kind    int8 [E]: number of the encoding in `encodings.KINDS`; −1: unknown, or the episode does not have the field
    rows    int32 [E]: rows in each chunk; the last chunk of an episode may have fewer
    first   int64 [E + 1]: episode e has the chunks first[e] … first[e + 1] − 1
    offset  int64 [C]: first byte of the chunk in the episode's shard
    size    int64 [C]: bytes of the chunk
    crc     uint32 [C]: CRC-32C of the chunk
    """

    kind: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray


def chunk_table(loaded: Mapping[str, np.ndarray], field: str) -> ChunkTable | None:
    """The chunks of a large field; None if the index has no column for it."""
    if f"chunks.{field}.first" not in loaded:
        return None
    return ChunkTable(*(loaded[f"chunks.{field}.{name}"] for name in ChunkTable._fields))


def check(loaded: Mapping[str, np.ndarray], tasks: Sequence[TaskSpec], shards: Sequence[Shard], where: str) -> None:
    """Raises DataError if an index points outside its shards or contains impossible counts."""
    steps, rows, shard, offset = (loaded[n] for n in ("steps", "rows", "shard", "offset"))
    size = np.array([s.size for s in shards] or [0], np.int64)
    one = np.array([row_dtype(t).itemsize for t in tasks] or [0], np.int64)
    possible = (steps >= 0) & (rows >= 1) & ((rows == steps) | (rows == steps + 1))
    _require(possible, f"{where}, episode", "rows is neither steps nor steps + 1, or is below 1")
    length = rows * one[loaded["task"]] if len(rows) else rows
    inside = (offset < 0) | _inside(offset, length, size[shard])
    _require(inside, f"{where}, episode", "steps.npy lies outside its shard")
    for name in ("sample", "json"):
        inside = _inside(loaded[name], loaded[f"{name}_bytes"], size[shard])
        _require(inside, f"{where}, episode", f"{name} lies outside its shard")
    for name in [n[: -len(".first")] for n in loaded if n.startswith("chunks.") and n.endswith(".first")]:
        owner = np.repeat(shard, np.diff(loaded[f"{name}.first"]))
        inside = _inside(loaded[f"{name}.offset"], loaded[f"{name}.size"], size[owner])
        _require(inside, f"{where}, {name}, chunk", "it lies outside its shard")


def _inside(begin: np.ndarray, length: np.ndarray, size: np.ndarray) -> np.ndarray:
    return (begin >= 0) & (length >= 0) & (begin <= size) & (length <= size - begin)


def _require(good: np.ndarray, where: str, what: str) -> None:
    if not good.all():
        raise DataError(f"{where} {int(np.argmin(good))}: {what}; the index is damaged or was not made by Tiphys")
