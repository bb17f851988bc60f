"""`index.parquet`: one row an episode, written in parts of bounded memory and decoded into flat, memory-mapped arrays.

Columns

| column | type | meaning |
|---|---|---|
| `id`, `task`, `agent` | string | |
| `hash` | uint64 | first 8 bytes (big endian) of BLAKE2b of the id: who is held out follows from it |
| `steps`, `rows` | int32 | actions; rows of `steps.npy` |
| `return` | double | undiscounted sum of the rewards |
| `success` | bool | null: unknown |
| `shard` | string | path in the dataset's folder, or a URL |
| `offset` | int64 | byte of the shard at which row 0 of `steps.npy` begins; −1: the sample has no `steps.npy` |
| `sample`, `sample_bytes` | int64 | the sample's members with their headers |
| `json`, `json_bytes` | int64 | the data of the `.json` member |
| `short` | string | observed fields that lack the last, observation-only row though others have it, joined by commas |
| `text.FIELD` | string | a text that is one for the whole episode |
| `value.FIELD` | binary | an array that is one for the whole episode, little endian |
| `chunks.FIELD` | struct | a large field: `kind`, `rows` of a chunk, and for each chunk `offset` in the shard, `size`, `crc` |

The file's key-value metadata holds, under `tiphys`, the tasks and the shards with their sizes and CRCs: it describes itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataio.episode import DataError, TaskSpec

if TYPE_CHECKING:
    import pyarrow as pa

PART = 1 << 16  # episodes of a row group
METADATA = b"tiphys"
FIELD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*(\.[A-Za-z0-9_\-]+)*")  # what a field may be called
_COLUMN = re.compile(r"[a-z_]+|(text|value|chunks)\." + FIELD.pattern)


class Chunks(NamedTuple):
    """Where the chunks of one large field of one episode lie."""

    kind: str
    rows: int  # of a chunk; the last may have fewer
    offset: Sequence[int]  # of the chunk's first byte in the shard
    size: Sequence[int]
    crc: Sequence[int]  # CRC-32C


@dataclass(frozen=True)
class Shard:
    """A shard as the index knows it: path in the dataset's folder or URL, size in bytes, CRC-32C of the whole (−1: unknown)."""

    name: str
    size: int
    crc: int = -1


@dataclass(frozen=True)
class Record:
    """One row of the table."""

    id: str
    task: str
    steps: int
    rows: int
    total_return: float
    shard: str
    sample: int
    sample_bytes: int
    offset: int = -1
    success: bool | None = None
    agent: str = ""
    json: int = 0
    json_bytes: int = 0
    short: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, bytes] = field(default_factory=dict)
    chunks: Mapping[str, Chunks] = field(default_factory=dict)


def hash_id(episode_id: str) -> int:
    """The 64-bit hash of an episode's id, the same for ever."""
    return int.from_bytes(hashlib.blake2b(episode_id.encode(), digest_size=8).digest(), "big")


class TableWriter:
    """Writes records to Parquet parts in a local folder; `finish` makes one file of them.

    Fields may appear at any time: parts have the columns that they need, the final file has all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Path] = []
        self._records: list[Record] = []

    def add(self, record: Record) -> None:
        self._records.append(record)
        if len(self._records) >= PART:
            self._flush()

    def _flush(self) -> None:
        import pyarrow.parquet as pq

        if self._records:
            part = self.folder / f"part-{len(self.parts):06d}.parquet"
            pq.write_table(_table(self._records), part)
            self.parts.append(part)
            self._records = []

    def finish(self, file: Path, tasks: Sequence[TaskSpec], shards: Sequence[Shard]) -> None:
        """Write the one file and remove the parts."""
        self._flush()
        combine(self.parts, file, tasks, shards)
        for part in self.parts:
            part.unlink()
        self.parts = []


def _table(records: Sequence[Record]) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": pa.array([r.id for r in records], pa.string()),
        "task": pa.array([r.task for r in records], pa.string()),
        "agent": pa.array([r.agent for r in records], pa.string()),
        "hash": pa.array([hash_id(r.id) for r in records], pa.uint64()),
        "steps": pa.array([r.steps for r in records], pa.int32()),
        "rows": pa.array([r.rows for r in records], pa.int32()),
        "return": pa.array([r.total_return for r in records], pa.float64()),
        "success": pa.array([r.success for r in records], pa.bool_()),
        "shard": pa.array([r.shard for r in records], pa.string()),
        "short": pa.array([",".join(r.short) for r in records], pa.string()),
    }
    for name in ("offset", "sample", "sample_bytes", "json", "json_bytes"):
        columns[name] = pa.array([getattr(r, name) for r in records], pa.int64())
    for name in sorted({n for r in records for n in r.texts}):
        columns[f"text.{name}"] = pa.array([r.texts.get(name) for r in records], pa.string())
    for name in sorted({n for r in records for n in r.values}):
        columns[f"value.{name}"] = pa.array([r.values.get(name) for r in records], pa.binary())
    for name in sorted({n for r in records for n in r.chunks}):
        parts = [r.chunks.get(name) for r in records]
        columns[f"chunks.{name}"] = pa.array([p and p._asdict() for p in parts], chunk_type())
    return pa.table(columns)


def chunk_type() -> pa.DataType:
    """The Arrow type of a `chunks.FIELD` column."""
    import pyarrow as pa

    lists = {"offset": pa.list_(pa.int64()), "size": pa.list_(pa.int64()), "crc": pa.list_(pa.uint32())}
    return pa.struct({"kind": pa.string(), "rows": pa.int32(), **lists})


def combine(parts: Iterable[Path], file: Path, tasks: Sequence[TaskSpec], shards: Sequence[Shard]) -> None:
    """Concatenate index tables into one file, with every column that any of them has, in bounded memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(p, memory_map=True) for p in parts]
    schema = _table([]).schema
    for name in sorted({n for f in files for n in f.schema_arrow.names} - set(schema.names)):
        types = {f.schema_arrow.field(name).type for f in files if name in f.schema_arrow.names}
        if len(types) > 1:
            raise DataError(f"index column {name!r} has several types: {', '.join(map(str, types))}")
        schema = schema.append(pa.field(name, types.pop()))
    plain = [n for n in schema.names if n in ("id", "hash", "offset", "sample", "json") or n.startswith("value.")]
    dictionary = [n for n in schema.names if n not in plain]
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=dictionary) as writer:
        for source in files:
            for batch in source.iter_batches(batch_size=PART):
                columns = [
                    batch.column(f.name) if f.name in batch.schema.names else pa.nulls(len(batch), f.type)
                    for f in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))
        described = {
            "version": 1,
            "tasks": [t.to_dict() for t in tasks],
            "shards": [[s.name, s.size, s.crc] for s in shards],
        }
        writer.add_key_value_metadata({METADATA.decode(): json.dumps(described)})
    for source in files:
        source.close()


def describe(file: Path) -> tuple[list[TaskSpec], list[Shard]]:
    """The tasks and shards that an index file names in its metadata."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file).metadata or {}
    if METADATA not in metadata:
        raise DataError(
            f"{file.name} is a Parquet file, but not a Tiphys index: it has no {METADATA.decode()!r} metadata"
        )
    described = json.loads(metadata[METADATA])
    if described["version"] != 1:
        raise DataError(f"{file.name} has version {described['version']}; this Tiphys reads version 1")
    return [TaskSpec(**t) for t in described["tasks"]], [Shard(*s) for s in described["shards"]]


def decode(file: Path, out: Path | None, tasks: Sequence[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    """An index file as flat arrays by name; under `out` as memory-mapped `.npy` files, else in memory.

    Numbers stand as they are. `task` and `shard` count in the lists given. Strings of a few values (`agent`, `short`, `text.F`) are codes
    (−1: null) with `NAME.first`, `NAME.bytes`: the distinct strings as UTF-8 and where each begins. `id` and `value.F` have `.first` and
    `.bytes` by episode. `chunks.F` has `.kind`, `.rows`, and `.first`: where an episode's entries begin in `.offset`, `.size`, `.crc`.
    """
    import pyarrow.parquet as pq

    sink = Sink(out)
    with pq.ParquetFile(file, memory_map=True) as source:
        names = source.schema_arrow.names
        for name in names:  # they become file names
            if not _COLUMN.fullmatch(name):
                raise DataError(f"index column {name!r}: not a name that an index may have")
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

    from dataio.encodings import KINDS

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
    """Lengths and concatenated bytes of a string or binary array, without a Python object each."""
    import pyarrow as pa

    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if offsets is None or not len(array):
        return np.zeros(len(array), np.int64), np.zeros(0, np.uint8)
    bounds = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return np.diff(bounds).astype(np.int64), content[bounds[0] : bounds[-1]]


def _expected(columns: Iterable[str]) -> dict[str, Any]:
    """Every array that a table of these columns decodes to, with its dtype: those without any element exist too."""
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
    """Arrays that grow at their end: `.npy` files under a folder, or in memory where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._parts: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._last: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray, dtype: Any) -> None:
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
        """Append to an array of bounds: 0 first, then the running sum of the lengths."""
        if name not in self._last:
            self.append(name, np.zeros(1, np.int64), np.int64)
            self._last[name] = 0
        bounds = self._last[name] + np.cumsum(lengths, dtype=np.int64)
        self.append(name, bounds, np.int64)
        self._last[name] = int(bounds[-1]) if len(bounds) else self._last[name]

    def close(self, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All arrays; of `expected` (name -> dtype; None: bounds) those that nothing was appended to are empty."""
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
    # NumPy leaves room for the first extent to grow, so the header's size does not depend on the length
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def load(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder that `decode` has written, memory-mapped, as plain arrays (their element access is faster)."""
    out = {}
    for file in sorted(folder.glob("*.npy")):
        empty = file.stat().st_size <= 128
        array = np.load(file, mmap_mode=None if empty else "r", allow_pickle=False)
        out[file.name[: -len(".npy")]] = np.asarray(array)
    return out
