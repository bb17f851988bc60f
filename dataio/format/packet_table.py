"""Columns `packets.FIELD` of index.parquet: video samples that stay in a file of their own, chunk by chunk.

A chunk is what decodes alone: the samples of one group of pictures, with the group before it if pictures that lead need that.
Chunks hold any number of rows. All numbers by sample and by row are relative to their chunk, so two episodes may share one.

| part | type | meaning |
|---|---|---|
| `shard` | string | the shard with the samples; null: the shard of the episode |
| `stream` | binary | the sample entry of the MP4, which names codec, size, colours and parameter sets |
| `offset`, `size` | list of int64 | for each chunk: its bytes in the shard |
| `crc` | list of uint32 | for each chunk: CRC-32C of its bytes; empty: nobody has read them |
| `row` | list of int32 | for each chunk: its first row; ascending, from 0 |
| `lead` | list of int32 | for each chunk: the picture of its first row, in the order in which pictures are shown |
| `samples` | list of int32 | for each chunk: its number of samples |
| `sample_size` | list of int32 | for each sample, in the order of decoding: its bytes |
| `gap` | list of int32 | for each sample: bytes of other tracks before it; empty: there are none |
| `rank` | list of int32 | for each sample: its place in the order in which pictures are shown; empty: the order of decoding |
| `frame` | list of int32 | for each row: its picture; empty: each row shows the picture after that of the row before it |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Ints = NDArray[np.int64]
PREFIX = "packets."  # of columns, and of arrays: packets.FIELD~PART, because a field's name may end like a part's
_CHUNK = {"offset": np.int64, "size": np.int64, "row": np.int32, "lead": np.int32, "samples": np.int32}
_EXTRA = {"crc": np.uint32, "sample_size": np.int32, "gap": np.int32, "rank": np.int32, "frame": np.int32}


class PacketChunks(NamedTuple):
    """The chunks of one field in one episode; the module's docstring explains the parts. `shard` "": that of the episode."""

    shard: str
    stream: bytes
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    row: np.ndarray
    lead: np.ndarray
    samples: np.ndarray
    sample_size: np.ndarray
    gap: np.ndarray
    rank: np.ndarray
    frame: np.ndarray

    def to_arrow(self) -> dict[str, Any]:
        return {**self._asdict(), "shard": self.shard or None}


class ChunkSamples(NamedTuple):
    """The n samples of a chunk, in the order of decoding: first byte in the chunk, bytes, and place in the order of showing."""

    begin: Ints
    size: Ints
    rank: Ints


class PacketTable(NamedTuple):
    """The chunks of one field in all E episodes: C chunks, and items by sample or row of which an episode may have none.

    shard         int32 [E]: number of the shard; −1: the episode's own, or the episode does not have the field
    stream        int32 [E]: number of the sample entry; −1: the episode does not have the field
    stream_first, stream_bytes   int64 [n + 1], uint8: the n sample entries
    first         int64 [E + 1]: episode e has the chunks first[e] … first[e + 1] − 1
    offset, size  int64 [C]; row, lead, samples  int32 [C]: as in the file
    NAME_first    int64 [E + 1], and NAME: items of `crc`, `sample_size`, `gap`, `rank`, `frame`
    """

    shard: np.ndarray
    stream: np.ndarray
    stream_first: np.ndarray
    stream_bytes: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    row: np.ndarray
    lead: np.ndarray
    samples: np.ndarray
    crc_first: np.ndarray
    crc: np.ndarray
    sample_size_first: np.ndarray
    sample_size: np.ndarray
    gap_first: np.ndarray
    gap: np.ndarray
    rank_first: np.ndarray
    rank: np.ndarray
    frame_first: np.ndarray
    frame: np.ndarray

    def has(self, episode: int) -> bool:
        return bool(self.stream[episode] >= 0)

    def entry(self, episode: int) -> bytes:
        """The sample entry of the episode's video."""
        code = int(self.stream[episode])
        a, b = (int(x) for x in self.stream_first[code : code + 2])
        return bytes(self.stream_bytes[a:b])

    def chunk_of(self, episode: Any, row: Any) -> Ints:
        """Number of the chunk that holds a row of each of n episodes; of the last one for rows past it. All have the field."""
        low = np.asarray(self.first[episode], np.int64).copy()
        high = np.asarray(self.first[np.asarray(episode) + 1], np.int64).copy()
        row = np.asarray(row, np.int64)
        while (apart := high - low > 1).any():
            middle = np.where(apart, (low + high) // 2, low)
            right = self.row[middle] <= row
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low

    def chunk_at(self, episode: int, row: int) -> int:
        """`chunk_of` one row of one episode."""
        first, end = self.first[episode : episode + 2].tolist()
        return int(first + self.row[first:end].searchsorted(row, side="right") - 1)

    def chunk_samples(self, episode: int, chunk: int) -> ChunkSamples:
        """The samples of a chunk (a number in `offset`) of an episode."""
        count = int(self.samples[chunk])
        before = int(self.samples[int(self.first[episode]) : chunk].sum())
        sizes, gaps, rank = (self.part(name, episode, before, count) for name in ("sample_size", "gap", "rank"))
        assert sizes is not None
        ends = np.cumsum(sizes if gaps is None else sizes + gaps, dtype=np.int64)
        return ChunkSamples(ends - sizes, sizes.astype(np.int64), np.arange(count) if rank is None else rank)

    def part(self, name: str, episode: int, first: int, count: int) -> np.ndarray | None:
        """Items [first, first + count) of `crc`, `sample_size`, `gap`, `rank` or `frame` of an episode; None if it has none."""
        bounds, items = getattr(self, f"{name}_first"), getattr(self, name)
        a, b = int(bounds[episode]), int(bounds[episode + 1])
        return None if a == b else items[a + first : min(a + first + count, b)]


def packet_table(loaded: Mapping[str, np.ndarray], field: str) -> PacketTable | None:
    """The packets of a field; None if the index has no column for it."""
    base = f"{PREFIX}{field}"
    if f"{base}~first" not in loaded:
        return None
    names = (name.replace("_first", ".first").replace("_bytes", ".bytes") for name in PacketTable._fields)
    return PacketTable(*(loaded[f"{base}~{name}"] for name in names))


def arrow_type() -> pa.DataType:
    """The Arrow type of a `packets.FIELD` column."""
    import pyarrow as pa

    lists = {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in {**_CHUNK, **_EXTRA}.items()}
    return pa.struct({"shard": pa.string(), "stream": pa.binary(), **lists})


class Decoder:
    """Decodes one column, batch by batch, to the arrays of a PacketTable.

    sink    as in `format.arrays`
    shards  name of a shard -> its number
    """

    def __init__(self, sink: Any, name: str, shards: Mapping[str, int]) -> None:
        self.sink, self.name, self.shards = sink, name, shards
        self.streams: dict[bytes, int] = {}

    def add(self, column: pa.Array) -> None:
        import pyarrow.compute as pc

        def part(name: str) -> Any:
            return pc.struct_field(column, name)

        self._codes("shard", part("shard"), self._shard)
        self._codes("stream", part("stream"), lambda v: self.streams.setdefault(v, len(self.streams)))
        counts = {n: pc.fill_null(pc.list_value_length(part(n)), 0).to_numpy() for n in {**_CHUNK, **_EXTRA}}
        if not all(np.array_equal(counts["offset"], counts[n]) for n in _CHUNK):
            raise DataError(f"index column {self.name!r}: {', '.join(_CHUNK)} have different lengths")
        self.sink.append_lengths(f"{self.name}~first", counts["offset"])
        for name, dtype in _CHUNK.items():
            self.sink.append(f"{self.name}~{name}", part(name).flatten().to_numpy(zero_copy_only=False), dtype)
        for name, dtype in _EXTRA.items():
            self.sink.append_lengths(f"{self.name}~{name}.first", counts[name])
            self.sink.append(f"{self.name}~{name}", part(name).flatten().to_numpy(zero_copy_only=False), dtype)

    def close(self) -> None:
        self.sink.append_lengths(f"{self.name}~stream.first", np.array([len(s) for s in self.streams], np.int64))
        self.sink.append(f"{self.name}~stream.bytes", np.frombuffer(b"".join(self.streams), np.uint8), np.uint8)

    def _codes(self, part: str, values: Any, number: Any) -> None:
        import pyarrow.compute as pc

        encoded = values.dictionary_encode()
        codes = np.array([*(number(v) for v in encoded.dictionary.to_pylist()), -1], np.int32)

        self.sink.append(
            f"{self.name}~{part}", codes[pc.fill_null(encoded.indices, len(codes) - 1).to_numpy()], np.int32
        )

    def _shard(self, name: str) -> int:
        if name not in self.shards:
            raise DataError(f"index column {self.name!r} names the shard {name!r}, which the dataset does not list")
        return self.shards[name]


def expected(name: str) -> dict[str, Any]:
    """The dtype of every array of a column (None: bounds)."""
    out: dict[str, Any] = {f"{name}~{n}": np.int32 for n in ("shard", "stream")}
    out |= {f"{name}~first": None, f"{name}~stream.first": None, f"{name}~stream.bytes": np.uint8}
    out |= {f"{name}~{n}": dtype for n, dtype in {**_CHUNK, **_EXTRA}.items()}
    return out | {f"{name}~{n}.first": None for n in _EXTRA}


def check(table: PacketTable, loaded: Mapping[str, np.ndarray], shard_sizes: np.ndarray, name: str) -> None:
    """Raises DataError if packets lie outside their shard, or if numbers by chunk, sample and row do not fit each other."""
    episodes, chunks = len(loaded["task"]), len(table.offset)
    for part in ("shard", "stream"):
        if len(getattr(table, part)) != episodes:
            raise DataError(f"{name}: it does not have one {part} for each of {episodes} episodes")
    _require(table.shard < len(shard_sizes), f"{name}, episode", "there is no such shard")
    _require(table.stream < len(table.stream_first) - 1, f"{name}, episode", "there is no such stream")
    count = np.diff(table.first)
    owner = np.repeat(np.arange(episodes), count)
    shard = np.where(table.shard >= 0, table.shard, loaded["shard"])
    offset, size = table.offset, table.size
    inside = (offset >= 0) & (size > 0) & (offset <= shard_sizes[shard[owner]] - size)
    _require(inside, f"{name}, chunk", "it lies outside its shard")
    _require(
        (table.stream >= 0) == (count > 0), f"{name}, episode", "it has chunks without a stream, or a stream alone"
    )
    later = np.ones(chunks, bool)
    later[table.first[:-1][count > 0]] = False  # the first chunk of an episode
    back = np.flatnonzero(later)
    fits = np.ones(chunks, bool)
    fits[back] = (offset[back] >= offset[back - 1]) & (offset[back] + size[back] >= (offset + size)[back - 1])
    fits[back] &= table.row[back] > table.row[back - 1]
    fits[~later] = table.row[~later] == 0
    fits &= (table.samples > 0) & (table.lead >= 0) & (table.lead < table.samples)
    fits &= table.row < np.asarray(loaded["rows"])[owner]
    _require(fits, f"{name}, chunk", "its rows, samples or bytes do not follow those of the chunk before it")
    samples = np.zeros(episodes, np.int64)
    np.add.at(samples, owner, table.samples)
    for part, wanted in (
        ("sample_size", samples),
        ("gap", samples),
        ("rank", samples),
        ("crc", count),
        ("frame", loaded["rows"]),
    ):
        have = np.diff(getattr(table, f"{part}_first"))
        good = (have == wanted) | ((have == 0) & ((table.stream < 0) | (part != "sample_size")))
        _require(good, f"{name}, episode", f"the number of items of {part} does not fit its rows and samples")
    each = np.repeat(np.arange(chunks), table.samples)  # chunk of each sample
    if len(each) == len(table.sample_size):
        _require(table.sample_size > 0, f"{name}, sample", "its size is not positive")
        total = np.bincount(each, table.sample_size, minlength=chunks)
        if len(table.gap) == len(each):
            total += np.bincount(each, table.gap, minlength=chunks)
        if len(table.gap) in (0, len(each)):
            _require(total == size, f"{name}, chunk", "its samples do not fill its bytes")


def _require(good: np.ndarray, where: str, what: str) -> None:
    if not np.all(good):
        raise DataError(f"{where} {int(np.argmin(good))}: {what}; the index is damaged or was not made by Tiphys")
