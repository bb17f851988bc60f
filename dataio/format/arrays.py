"""`index.parquet` as flat, memory-mapped arrays, without a Python object for each episode."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiphys.dataio.atomic import write_json
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format import packet_table
from tiphys.dataio.format.encodings import KINDS
from tiphys.dataio.format.rows import row_dtype
from tiphys.dataio.format.table import PART, Shard, check_schema
from tiphys.dataio.private import read_private

if TYPE_CHECKING:
    import pyarrow as pa

_SEAL = "seal.json"
_RATIO, _RATIO_FREE = 200, 256 << 20  # decoded bytes for each byte of the file; decoded bytes that are always allowed


def decode(file: Path, out: Path | None, tasks: Sequence[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    """Decode an index file to flat arrays by name: memory-mapped `.npy` files in the folder `out`, or in memory if it is None.

    Number columns keep their values. `task` and `shard` become positions in the two lists. Columns with few distinct strings
    (`agent`, `short`, `text.F`) become codes (−1: null), with `NAME.bytes`, the distinct strings in UTF-8, and `NAME.first`,
    where each begins. `id` and `value.F` become `.bytes` and `.first`, with one item for each episode. `chunks.F` becomes the
    arrays of a `ChunkTable`.

    Raises DataError if the file is damaged, has a task, a shard or a column that is not allowed, or becomes much more than a real
    index of its size. `format.limited.decode` does the same for a file that is not trusted.
    """
    import pyarrow as pa

    try:
        return _decode(file, Sink(out, _RATIO_FREE + _RATIO * file.stat().st_size), tasks, shards)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # an error number means a disk error, not a damaged file
        raise DataError(f"{file.name} is damaged: {error}") from None


def _decode(file: Path, sink: Sink, tasks: Sequence[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, memory_map=True, page_checksum_verification=True) as source:
        check_schema(source.schema_arrow)
        names = source.schema_arrow.names
        strings = [n for n in names if n in ("agent", "short") or n.startswith("text.")]
        places = {name: number for number, name in enumerate(shards)}
        packets = {n: packet_table.Decoder(sink, n, places) for n in names if n.startswith(packet_table.PREFIX)}
        for batch in source.iter_batches(batch_size=PART, columns=[n for n in names if n not in strings]):
            for name in batch.schema.names:
                if name in packets:
                    packets[name].add(batch.column(name))
                else:
                    _decode_column(sink, name, batch.column(name), {"task": tasks, "shard": shards})
        for decoder in packets.values():
            decoder.close()
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
        if column.null_count:
            raise DataError(f"index column {name!r}: an episode has no value")
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
        elif name.startswith(packet_table.PREFIX):
            out |= packet_table.expected(name)
    return out


class Sink:
    """Arrays to which values are appended: `.npy` files in `folder`, or in memory if it is None. Together at most `limit` bytes.

    Raises DataError if they become more.
    """

    def __init__(self, folder: Path | None, limit: int = 1 << 62) -> None:
        self.folder, self.left = folder, limit
        self._parts: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._last: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray, dtype: Any) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # a return beyond the range of float32 becomes infinite
            values = np.ascontiguousarray(values, dtype)
        self.left -= values.nbytes
        if self.left < 0:
            raise DataError("a small file becomes a huge index; refused as a decompression bomb")
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
    return {path.name[: -len(".npy")]: _mapped(path) for path in sorted(folder.glob("*.npy"))}


def _mapped(path: Path) -> np.ndarray:
    with read_private(path) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if version != (1, 0) or dtype.hasobject or len(shape) != 1:
            raise DataError(f"{path} was not written by Tiphys")
        if not shape[0]:
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))


def seal(folder: Path) -> None:
    """Record size, digest and version of each array of a folder, which `check_seal` compares."""
    names = sorted(path.name for path in folder.glob("*.npy"))
    write_json(folder / _SEAL, {name: [*_version(folder / name), _sha256(folder / name)] for name in names})


def check_seal(folder: Path) -> None:
    """Raises DataError if a folder does not hold the arrays that `seal` recorded. Files touched since then are read in full."""
    try:
        with read_private(folder / _SEAL) as file:
            sealed = json.load(file)
        if sorted(sealed) != sorted(path.name for path in folder.glob("*.npy")):
            raise DataError(f"{folder} does not hold the arrays that were written there")
        for name, (*version, digest) in sealed.items():
            if _version(folder / name) != version and _sha256(folder / name) != digest:
                raise DataError(f"{folder / name} is not what was written there")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} cannot be read: {error}") from None


def _version(path: Path) -> list[int]:
    """What changes whenever a file's content does: no user but root can set a file's ctime."""
    found = os.stat(path, follow_symlinks=False)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(path: Path) -> str:
    with read_private(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


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


def packet_fields(loaded: Mapping[str, np.ndarray]) -> list[str]:
    """The fields of which the index has packets."""
    prefix, suffix = packet_table.PREFIX, "~first"
    return [n[len(prefix) : -len(suffix)] for n in loaded if n.startswith(prefix) and n.endswith(suffix)]


def check(loaded: Mapping[str, np.ndarray], tasks: Sequence[TaskSpec], shards: Sequence[Shard], where: str) -> None:
    """Raises DataError if an index points outside its shards or contains impossible counts."""
    _check_lengths(loaded, where)
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
        _check_chunks(chunk_table(loaded, name.removeprefix("chunks.")), loaded, tasks, where, name)
    for field in packet_fields(loaded):
        table = packet_table.packet_table(loaded, field)
        assert table is not None
        packet_table.check(table, loaded, size, f"{where}, {packet_table.PREFIX}{field}")


def _check_lengths(loaded: Mapping[str, np.ndarray], where: str) -> None:
    """Each column must have one value for each episode."""
    episodes = len(loaded["task"])
    parts = [".bytes", ".offset", ".size", ".crc"]
    for name, array in loaded.items():
        if name.startswith(packet_table.PREFIX):
            continue  # `packet_table.check` knows them
        codes = name.endswith(".first") and name.removesuffix(".first") in loaded  # distinct texts, not episodes
        column = name in ("offset", "size") or not name.endswith(tuple(parts))
        if column and not codes and len(array) != episodes + name.endswith(".first"):
            raise DataError(f"{where}: column {name!r} does not have one value for each of {episodes} episodes")


def _check_chunks(
    table: ChunkTable | None, loaded: Mapping[str, np.ndarray], tasks: Sequence[TaskSpec], where: str, name: str
) -> None:
    """An episode's chunks must follow each other in the shard, and be as many as its rows need."""
    assert table is not None
    follows = np.ones(len(table.offset), bool)
    follows[1:] = table.offset[1:] >= table.offset[:-1] + table.size[:-1]
    follows[table.first[:-1][np.diff(table.first) > 0]] = True  # the first chunk of an episode follows none
    _require(follows, f"{where}, {name}, chunk", "it does not follow the chunk before it")
    count, frames = np.diff(table.first), np.maximum(table.rows, 1)
    fits = (table.kind < 0) | (count == -(-loaded["rows"] // frames)) | (count == -(-loaded["steps"] // frames))
    field = name.removeprefix("chunks.")
    whole = [any(f.name == field and f.per == "episode" for f in task.fields) for task in tasks] or [False]
    fits |= np.array(whole)[loaded["task"]] & (count == 1)
    _require(fits, f"{where}, {name}, episode", "the number of chunks does not fit its rows")


def _inside(begin: np.ndarray, length: np.ndarray, size: np.ndarray) -> np.ndarray:
    return (begin >= 0) & (length >= 0) & (begin <= size) & (length <= size - begin)


def _require(good: np.ndarray, where: str, what: str) -> None:
    if not good.all():
        raise DataError(f"{where} {int(np.argmin(good))}: {what}; the index is damaged or was not made by Tiphys")
