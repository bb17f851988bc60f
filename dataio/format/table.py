"""`index.parquet`: one row for each episode, written in parts of bounded memory.

Columns

| column | type | meaning |
|---|---|---|
| `id`, `task`, `agent` | string | |
| `hash` | uint64 | first 8 bytes (big endian) of BLAKE2b of the id; decides which episodes are held out |
| `steps`, `rows` | int32 | number of actions; number of rows of `steps.npy` |
| `return` | double | undiscounted sum of the rewards |
| `success` | bool | null: unknown |
| `shard` | string | path in the dataset's folder, or a URL |
| `offset` | int64 | byte of the shard at which row 0 of `steps.npy` begins; −1: the sample has no `steps.npy` |
| `sample`, `sample_bytes` | int64 | first byte and size of the sample: its members with their headers |
| `json`, `json_bytes` | int64 | first byte and size of the content of the `.json` member |
| `short` | string | observed fields with only T rows in an episode of T + 1 rows, joined by commas |
| `text.FIELD` | string | a text with one value for the whole episode |
| `value.FIELD` | binary | an array with one value for the whole episode, little endian |
| `chunks.FIELD` | struct | a large field: `kind`, `rows` of a chunk, and for each chunk `offset` in the shard, `size`, `crc` |
| `packets.FIELD` | struct | a video that stays as it is: see `format.packet_table` |

The file describes itself: the key `tiphys` of its key-value metadata holds the tasks, and the shards with sizes and CRCs. Its
pages have checksums.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format import packet_table
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.format.rows import FIELD_NAME, check_task
from tiphys.dataio.stored import stored, task_specs

if TYPE_CHECKING:
    import pyarrow as pa

PART = 1 << 16  # episodes in a row group
_VIDEO_PART = 1 << 12  # the same where episodes have videos that stay: they have a number for each picture
_MOST_SAMPLES = 1 << 15  # samples of video of which a writer keeps the places in memory
METADATA, METADATA_CRC = "tiphys", "tiphys.crc32c"
_FIELD_COLUMN = re.compile(r"(text|value|chunks|packets)\.(" + FIELD_NAME.pattern + ")")


class Chunks(NamedTuple):
    """The places of the chunks of one large field in one episode."""

    kind: str  # one of encodings.KINDS
    rows: int  # rows of a chunk; the last one may have fewer
    offset: Sequence[int]  # first byte of each chunk in the shard
    size: Sequence[int]  # bytes of each chunk
    crc: Sequence[int]  # CRC-32C of each chunk


@dataclass(frozen=True)
class Shard:
    """A shard: its path in the dataset's folder or its URL, its size in bytes, and the CRC-32C of the whole (−1: unknown).

    `etag` is the version of an object that Tiphys did not write; empty: unknown, or Tiphys wrote it.
    """

    name: str
    size: int
    crc: int = -1
    etag: str = ""

    def to_list(self) -> list[Any]:
        """As JSON."""
        return [self.name, self.size, self.crc, *([self.etag] if self.etag else [])]


@dataclass(frozen=True)
class Record:
    """One row of the table; the module's docstring explains the columns."""

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
    packets: Mapping[str, PacketChunks] = field(default_factory=dict)


def hash_id(episode_id: str) -> int:
    """The 64-bit hash of an episode's id. It is part of the format and never changes."""
    return int.from_bytes(hashlib.blake2b(episode_id.encode(), digest_size=8).digest(), "big")


class TableWriter:
    """Writes records to Parquet parts in a local folder. `finish` combines the parts into one file.

    Fields may appear at any time: a part has the columns that it needs, the final file has all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Path] = []
        self._records: list[Record] = []
        self._samples = 0

    def add(self, record: Record) -> None:
        self._records.append(record)
        self._samples += sum(len(packets.sample_size) for packets in record.packets.values())
        if len(self._records) >= PART or self._samples >= _MOST_SAMPLES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow.parquet as pq

        if self._records:
            part = self.folder / f"part-{len(self.parts):06d}.parquet"
            pq.write_table(_table(self._records), part)
            self.parts.append(part)
            self._records, self._samples = [], 0

    def finish(self, file: Path, tasks: Sequence[TaskSpec], shards: Sequence[Shard]) -> None:
        """Write the final file and remove the parts."""
        self._flush()
        combine([Part(p) for p in self.parts], file, tasks, shards)
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
    for name in sorted({n for r in records for n in r.packets}):
        packets = [r.packets.get(name) for r in records]
        columns[f"packets.{name}"] = pa.array([p and p.to_arrow() for p in packets], packet_table.arrow_type())
    return pa.table(columns)


def chunk_type() -> pa.DataType:
    """The Arrow type of a `chunks.FIELD` column."""
    import pyarrow as pa

    lists = {"offset": pa.list_(pa.int64()), "size": pa.list_(pa.int64()), "crc": pa.list_(pa.uint32())}
    return pa.struct({"kind": pa.string(), "rows": pa.int32(), **lists})


def check_schema(schema: pa.Schema) -> None:
    """Raises DataError if a column is missing, stands twice, or has a name or a type that an index does not have."""
    import pyarrow as pa

    fixed = _table([]).schema
    by_kind = {"text": pa.string(), "value": pa.binary(), "chunks": chunk_type(), "packets": packet_table.arrow_type()}
    for column in schema:
        match = _FIELD_COLUMN.fullmatch(column.name)  # names become file names
        if not match and column.name not in fixed.names:
            raise DataError(f"index column {column.name!r}: an index may not have a column of this name")
        wanted = by_kind[match[1]] if match else fixed.field(column.name).type
        if column.type != wanted or schema.names.count(column.name) > 1:
            raise DataError(
                f"index column {column.name!r}: it must be there once, with type {wanted}, not {column.type}"
            )
    missing = [name for name in fixed.names if name not in schema.names]
    if missing:
        raise DataError(f"index column {missing[0]!r} is missing")


@dataclass(frozen=True)
class Part:
    """An index file that is copied into another: all rows, or those of `keep` (bool [E]), with shards renamed by `rename`."""

    file: Path
    keep: np.ndarray | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


def combine(parts: Iterable[Part], file: Path, tasks: Sequence[TaskSpec], shards: Sequence[Shard]) -> None:
    """Concatenate index files, in bounded memory. The new file has every column that any of them has."""
    import pyarrow.parquet as pq

    parts = list(parts)
    schema = _schema([pq.read_schema(p.file) for p in parts])
    # a dictionary saves nothing if the values differ in every row
    unique = [n for n in schema.names if n in ("id", "hash", "offset", "sample", "json") or n.startswith("value.")]
    dictionary = [n for n in schema.names if n not in unique]
    options = {"compression": "zstd", "use_dictionary": dictionary, "write_page_checksum": True}
    with pq.ParquetWriter(file, schema, **options) as writer:
        for group in _groups(parts, schema):
            writer.write_table(group)
        listed = [s.to_list() for s in shards]
        text = to_json({"version": 1, "tasks": [t.to_dict() for t in tasks], "shards": listed})
        writer.add_key_value_metadata({METADATA: text, METADATA_CRC: str(crc32c(text.encode()))})


def check_ids(file: Path, where: str) -> None:
    """Raises DataError if two episodes of an index file have one id: held-out episodes and quarantine go by ids."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    ids = pq.read_table(file, columns=["id"], memory_map=True)["id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise DataError(
        f"{where}: {len(repeated)} episode ids stand more than once, for example {repeated[0].as_py()!r}; give each episode its "
        "own id. If the same episodes are in two sources, leave one of them out"
    )


def _groups(parts: Iterable[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of all parts in groups of one size, so that the file does not depend on where the parts end."""
    import pyarrow as pa

    most = _VIDEO_PART if any(name.startswith("packets.") for name in schema.names) else PART
    waiting = pa.table([pa.array([], f.type) for f in schema], schema=schema)
    for part in parts:
        for batch in batches(part):
            have = batch.schema.names
            columns = [batch.column(f.name) if f.name in have else pa.nulls(len(batch), f.type) for f in schema]
            waiting = pa.concat_tables([waiting, pa.table(columns, schema=schema)])
            while len(waiting) >= most:
                yield waiting.slice(0, most).combine_chunks()
                waiting = waiting.slice(most)
    if len(waiting):
        yield waiting.combine_chunks()


def _schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all files: first those that every index has, then the others, sorted by name."""
    import pyarrow as pa

    out = _table([]).schema
    for name in sorted({n for s in schemas for n in s.names} - set(out.names)):
        types = {s.field(name).type for s in schemas if name in s.names}
        if len(types) > 1:
            raise DataError(f"index column {name!r} has several types: {', '.join(map(str, types))}")
        out = out.append(pa.field(name, types.pop()))
    return out


def batches(part: Part) -> Iterator[pa.RecordBatch]:
    """The rows of a part that are kept, with their shards renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    with pq.ParquetFile(part.file, memory_map=True, page_checksum_verification=True) as source:
        for batch in source.iter_batches(batch_size=PART):
            keep = None if part.keep is None else part.keep[first : first + len(batch)]
            first += len(batch)
            if part.rename:
                batch = _renamed(batch, part.rename)
            if keep is not None:
                batch = batch.filter(pa.array(keep))
            if len(batch):
                yield batch


def _renamed(batch: pa.RecordBatch, rename: Mapping[str, str]) -> pa.RecordBatch:
    import pyarrow as pa

    def renamed(column: pa.Array) -> pa.Array:
        names = column.dictionary_encode()
        new = pa.array([rename.get(n, n) for n in names.dictionary.to_pylist()], pa.string())
        return pa.DictionaryArray.from_arrays(names.indices, new).cast(pa.string())

    for number, field_ in enumerate(batch.schema):
        if field_.name == "shard":
            batch = batch.set_column(number, field_, renamed(batch.column(number)))
        elif field_.name.startswith(packet_table.PREFIX):
            column = batch.column(number)
            parts = [column.field(i) for i in range(column.type.num_fields)]  # without the mask of the struct itself
            parts[column.type.get_field_index("shard")] = renamed(parts[column.type.get_field_index("shard")])
            new = pa.StructArray.from_arrays(parts, fields=list(column.type), mask=column.is_null())
            batch = batch.set_column(number, field_, new)
    return batch


def shards_of(batch: pa.RecordBatch) -> set[str]:
    """Names of the shards that hold the rows or the packets of a batch's episodes."""
    import pyarrow.compute as pc

    columns = [batch.column("shard")]
    columns += [
        pc.struct_field(batch.column(n), "shard") for n in batch.schema.names if n.startswith(packet_table.PREFIX)
    ]
    return {name for column in columns for name in column.unique().to_pylist() if name is not None}


def _shard(values: Sequence[Any]) -> Shard:
    return stored(Shard, dict(zip(("name", "size", "crc", "etag"), values, strict=False)), "a shard")


def read_tasks_and_shards(file: Path) -> tuple[list[TaskSpec], list[Shard]]:
    """The tasks and shards in the metadata of an index file. Raises DataError if the file is not an index or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file).metadata or {}
        text = metadata[METADATA.encode()]
        if crc32c(text) != int(metadata[METADATA_CRC.encode()]):
            raise DataError(f"{file.name} is damaged: the CRC-32C of its metadata does not match")
        own = json.loads(text)
        if own["version"] != 1:
            raise DataError(f"{file.name} has version {own['version']}; this Tiphys reads version 1")
        tasks = task_specs(own["tasks"], f"{file.name}: tasks")
        for task in tasks:
            check_task(task)
        return tasks, [_shard(s) for s in own["shards"]]
    except DataError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, RecursionError, ValueError, OverflowError) as error:
        raise DataError(f"{file.name} is not an index of a Tiphys dataset: {type(error).__name__}: {error}") from None
