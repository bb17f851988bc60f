"""`EpisodeIndex`: where each step of each episode is stored. `decoding` makes the arrays of a window of its bytes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.decoding import decode
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.format import encodings
from tiphys.dataio.format.arrays import ChunkTable, Strings, chunk_table, load, packet_fields
from tiphys.dataio.format.document import DATASET, STATISTICS, cache_folder, decoded, fetch, parse
from tiphys.dataio.format.packet_table import PacketTable, packet_table
from tiphys.dataio.format.places import PACKETS, STEPS, Chunk, Range, WantedFields
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, RowLayout, is_large, is_small
from tiphys.dataio.format.table import Shard, hash_id
from tiphys.dataio.statistics import FieldStatistics

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.storage import Store


class EpisodeIndex:
    """The episodes of a dataset as arrays, and the byte ranges of their rows. Open one with `EpisodeIndex.open(url)`.

    The arrays have one element for each of the E episodes, and are memory-mapped and read-only if the index was opened from a
    dataset. An index can be sent to another process: only its place on the disk is pickled, not the arrays.

    Parameters
    ----------
    url : str
        The dataset's folder, in any store.
    document : Mapping[str, Any]
        `dataset.json` as `format.document.parse` returns it.
    arrays : Mapping[str, numpy.ndarray]
        `index.parquet` as `format.arrays.decode` returns it.
    fingerprint : str
        Changes if the dataset changes.

    Attributes
    ----------
    url, document, fingerprint
        As given.
    tasks : tuple[TaskSpec, ...]
        The dataset's tasks.
    shards : tuple[Shard, ...]
        The dataset's shards: name, bytes, CRC-32C.
    layouts : tuple[RowLayout, ...]
        How each task's rows are stored.
    task : int32 [E]
        Each episode's task, as a number in `tasks`.
    steps : int32 [E]
        T, the number of actions.
    rows : int32 [E]
        Rows of `steps.npy`: T, or T + 1 if an observation follows the last action.
    shard : int32 [E]
        Each episode's shard, as a number in `shards`.
    rows_offset : int64 [E]
        Byte of the shard at which row 0 of `steps.npy` begins; −1 if the episode has no `steps.npy` (an image of a foreign tar).
    total_return : float32 [E]
        Undiscounted sum of the rewards.
    success : int8 [E]
        1: success, 0: failure, −1: unknown.
    hash : uint64 [E]
        Hash of the episode's id; see `held_out`.
    ids : Sequence[str]
        The episodes' ids.
    """

    def __init__(
        self, url: str, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray], fingerprint: str
    ) -> None:
        self.url = url
        self.document = document
        self.fingerprint = fingerprint
        self.tasks: tuple[TaskSpec, ...] = tuple(document["tasks"])
        self.shards: tuple[Shard, ...] = tuple(document["shards"])
        self._arrays = arrays
        self._folder: Path | None = None
        self.task, self.steps, self.rows, self.shard = (arrays[n] for n in ("task", "steps", "rows", "shard"))
        self.total_return, self.success, self.hash = arrays["return"], arrays["success"], arrays["hash"]
        self.rows_offset = arrays["offset"]
        self.ids = Strings(arrays["id.first"], arrays["id.bytes"])
        self.layouts = tuple(RowLayout(t) for t in self.tasks)
        self._row_bytes = np.array([one.dtype.itemsize for one in self.layouts] or [0], np.int64)
        self._chunk_tables: dict[str, ChunkTable] = {}
        self._packet_tables: dict[str, PacketTable | None] = {}
        self._wanted_fields: dict[tuple[int, tuple[str, ...]], WantedFields] = {}

    @classmethod
    def open(cls, url: str, cache_dir: str = "") -> EpisodeIndex:
        """Open the index of a dataset.

        The first time on a machine, the index is downloaded and decoded to memory-mapped arrays in the cache, under its digest.
        Afterwards it is opened from there.

        Parameters
        ----------
        url : str
            The dataset's folder, in any store, or that of a raw LeRobot dataset that has been indexed.
        cache_dir : str
            Folder of the cache; by default $TIPHYS_CACHE, or ~/.cache/tiphys if that is not set.

        Raises
        ------
        FileNotFoundError
            If there is no dataset.
        DataError
            If `dataset.json` or `index.parquet` is damaged, or they do not belong together.
        """
        from tiphys.dataio.inplace import place
        from tiphys.dataio.storage import Store

        store = Store(url)
        try:
            raw = store.read(DATASET)
        except FileNotFoundError as error:
            if (indexed := place.resolve(url, cache_dir)) != url:
                return cls.open(indexed, cache_dir)
            with suppress(FileNotFoundError):
                store.read_new(DATASET)  # a GET: the answer to a HEAD does not say that the bucket is missing
            raise FileNotFoundError(
                f"{url}: there is no dataset ({DATASET} is missing); make one with `tiphys collect`, `convert` or `index`"
            ) from error
        document = parse(raw, f"{url}/{DATASET}")
        place.check_source(document, url)
        folder = decoded(store, document, cache_folder(cache_dir))
        index = cls(url, document, load(folder), hashlib.sha256(raw).hexdigest()[:32])
        index._folder = folder
        return index

    def __reduce__(self) -> Any:  # a spawned process gets the folder of the arrays, not their content
        if self._folder is None:
            return EpisodeIndex, (self.url, self.document, self._arrays, self.fingerprint)
        return _reopen, (self.url, self.document, str(self._folder), self.fingerprint)

    # Episodes

    @property
    def episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.task)

    @cached_property
    def statistics(self) -> Mapping[str, Mapping[str, FieldStatistics]]:
        """Task -> small field -> statistics. Raises DataError if those in `dataset.json` are damaged."""
        stored = self.document["statistics"]
        try:
            return {t: {f: FieldStatistics.from_dict(s) for f, s in fields.items()} for t, fields in stored.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.url}/{DATASET}: its statistics are damaged: {error!r}") from None

    @cached_property
    def statistics_with_histograms(self) -> Mapping[str, Mapping[str, FieldStatistics]]:
        """`statistics` with histograms, from which any quantiles follow. This reads `statistics.parquet`.

        Without that file, or for a field that it lacks, there is no histogram. Raises DataError if it is damaged.
        """
        from tiphys.dataio.format.limited import read_statistics

        wanted = self.document.get("digests", {}).get(STATISTICS)
        if wanted is None:
            return self.statistics
        with tempfile.TemporaryDirectory(prefix="tiphys-statistics-") as folder:
            file = Path(folder) / STATISTICS
            if fetch(self.store, STATISTICS, file) != wanted:
                raise DataError(
                    f"{self.url}/{STATISTICS} does not have the SHA-256 that {DATASET} names; run `tiphys verify --repair`"
                )
            sketches = read_statistics(file, f"{self.url}/{STATISTICS}").sketches
        found = {key: sketch.cells for key, sketch in sketches.items() if sketch.count}
        return {
            task: {name: replace(one, histogram=found.get((task, name))) for name, one in fields.items()}
            for task, fields in self.statistics.items()
        }

    def id(self, episode: int) -> str:
        """The episode's id."""
        return self.ids[episode]

    def has(self, episode_id: str) -> bool:
        """Whether the dataset has an episode with this id."""
        return bool((np.asarray(self.hash) == np.uint64(hash_id(episode_id))).any())

    def held_out(self, share: float) -> np.ndarray:
        """The episodes that are held out for validation, which depends on their ids alone.

        Parameters
        ----------
        share : float
            Share of all possible ids, in [0, 1].

        Returns
        -------
        bool [E]
        """
        return np.asarray(self.hash) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))

    def text(self, field: str) -> tuple[np.ndarray, Sequence[str]]:
        """The texts of a text field with one value for the whole episode: codes int32 [E] (−1: none), and the distinct texts."""
        return self._strings(f"text.{field}")

    def agents(self) -> tuple[np.ndarray, Sequence[str]]:
        """Who acted: codes int32 [E] (−1: unknown), and the distinct names."""
        return self._strings("agent")

    def _strings(self, name: str) -> tuple[np.ndarray, Sequence[str]]:
        if name not in self._arrays:
            return np.full(self.episodes, -1, np.int32), []
        return self._arrays[name], Strings(self._arrays[f"{name}.first"], self._arrays[f"{name}.bytes"])

    def shard_name(self, shard: int) -> str:
        """The shard's path in the dataset's folder, or its URL if it belongs to another dataset. `Store` accepts both."""
        return self.shards[shard].name

    @cached_property
    def store(self) -> Store:
        """The dataset's folder as a `Store`."""
        from tiphys.dataio.storage import Store

        return Store(self.url)

    # Ranges

    def row_bytes(self, task: int) -> int:
        """Bytes of one row of `steps.npy` of a task (a number in `tasks`)."""
        return int(self._row_bytes[task])

    def row_ranges(self, episodes: Any, starts: Any, rows: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The byte ranges of `steps.npy` of n windows.

        Parameters
        ----------
        episodes, starts, rows : int [n]
            Episode, first row and number of rows of each window. Rows past the episode's end are cut off.

        Returns
        -------
        shard : int32 [n]
            Number in `shards`.
        offset, size : int64 [n]
            Bytes. Size 0: the episode has no `steps.npy`, or no row is left.
        """
        e, s = np.asarray(episodes), np.asarray(starts, np.int64)
        one = self._row_bytes[self.task[e]]
        first = self.rows_offset[e]
        count = np.clip(np.minimum(np.asarray(rows, np.int64), self.rows[e] - s), 0, None)
        return self.shard[e], first + s * one, np.where(first < 0, 0, count * one)

    def ranges(self, episode: int, start: int, rows: int, fields: Sequence[str]) -> list[Range]:
        """The byte ranges of the rows [start, start + rows) of an episode.

        Parameters
        ----------
        episode : int
            Number of the episode.
        start, rows : int
            First row and number of rows. Rows past the episode's end are cut off.
        fields : Sequence[str]
            Names of the fields that are needed.

        Returns
        -------
        list[Range]
            First the range of `steps.npy`, if the episode has one. Then one range for each large field of `fields` that has
            chunks in these rows: from its first to its last chunk, including the tar headers between them.

        Raises
        ------
        DataError
            If no row is left, or the task does not have one of the fields.
        """
        task, shard, first = self.task.item(episode), self.shard.item(episode), self.rows_offset.item(episode)
        have = self.rows.item(episode)
        rows = min(rows, have - start)
        if start < 0 or rows <= 0:
            raise DataError(f"episode {self.id(episode)!r} has no rows from {start} on: it has {have}")
        one = self._row_bytes.item(task)
        out = [Range(shard, first + start * one, rows * one, STEPS)] if first >= 0 else []
        for spec in self.wanted(task, fields).large:
            chunks = self.chunks(episode, spec, start, rows)
            if chunks:
                begin, end = chunks[0].offset, chunks[-1].offset + chunks[-1].size
                out.append(Range(self._shard_of(episode, spec.name), begin, end - begin, spec.name))
        return out

    def _shard_of(self, episode: int, field: str) -> int:
        """The shard that holds a large field of an episode."""
        packets = self.packets(field)
        elsewhere = -1 if packets is None else int(packets.shard[episode])
        return self.shard.item(episode) if elsewhere < 0 else elsewhere

    def read(self, ranges: Sequence[Range]) -> list[Buffer]:
        """The bytes of ranges, one after the other from the store: for single episodes, not for training."""
        out: list[Any] = [b""] * len(ranges)
        for shard in dict.fromkeys(r.shard for r in ranges):
            mine = [i for i, r in enumerate(ranges) if r.shard == shard]
            starts, sizes = [ranges[i].offset for i in mine], [ranges[i].size for i in mine]
            about = self.shards[shard]
            self.store.expect(about.name, about.etag)
            for i, data in zip(mine, self.store.read_ranges(about.name, starts, sizes), strict=True):
                out[i] = data
        return out

    def wanted(self, task: int, fields: Sequence[str]) -> WantedFields:
        """The named fields of a task, grouped by where they are stored."""
        key = task, tuple(fields)
        wanted = self._wanted_fields.get(key)
        if wanted is None:
            specs = [self.tasks[task].field(name) for name in fields]
            small = [f.name for f in specs if is_small(f)]
            large = [f for f in specs if is_large(f)]
            wanted = self._wanted_fields[key] = WantedFields(
                small, large, [f for f in specs if not is_small(f) and not is_large(f)]
            )
        return wanted

    def has_chunks(self, field: str) -> bool:
        """Whether the index has chunks of a large field for any episode."""
        return f"chunks.{field}.first" in self._arrays

    def chunk_table(self, field: str) -> ChunkTable:
        """The chunks of a large field in all episodes, as arrays.

        Raises
        ------
        DataError
            If the index has no such column; see `has_chunks`.
        """
        table = self._chunk_tables.get(field)
        if table is None:
            table = chunk_table(self._arrays, field)
            if table is None:
                raise DataError(
                    f"the index of {self.url} has no column 'chunks.{field}', though a task declares the field; "
                    "run `tiphys verify`"
                )
            self._chunk_tables[field] = table
        return table

    def packets(self, field: str) -> PacketTable | None:
        """The field's video samples that lie in files of their own, as arrays; None if no episode has any."""
        if field not in self._packet_tables:
            self._packet_tables[field] = packet_table(self._arrays, field)
        return self._packet_tables[field]

    @property
    def packet_fields(self) -> list[str]:
        """The fields of which some episode has packets."""
        return packet_fields(self._arrays)

    def sample_range(self, episode: int) -> tuple[int, int]:
        """(offset, size) in bytes of the episode's sample in its shard: all its members, with their tar headers."""
        return self._arrays["sample"].item(episode), self._arrays["sample_bytes"].item(episode)

    def json_range(self, episode: int) -> tuple[int, int]:
        """(offset, size) in bytes of the content of the sample's `.json` member; size 0 if it has none."""
        return self._arrays["json"].item(episode), self._arrays["json_bytes"].item(episode)

    def chunks(self, episode: int, spec: FieldSpec, start: int, rows: int) -> list[Chunk]:
        """The chunks that hold the rows [start, start + rows) of a large field, as far as the field has these rows."""
        packets = self.packets(spec.name)
        if packets is not None and packets.has(episode):
            return self._packet_chunks(packets, episode, start, rows)
        table = self.chunk_table(spec.name)
        kind, frames = table.kind.item(episode), table.rows.item(episode)
        if kind < 0 or frames < 1:
            raise DataError(f"episode {self.id(episode)!r}, field {spec.name!r}: the index names no known encoding")
        a, b = (int(x) for x in table.first[episode : episode + 2])
        last = self._field_rows(episode, spec)
        if spec.per == "episode":
            start, rows = 0, 1
        low, high = a + start // frames, min(b, a + -(-min(start + rows, last) // frames))
        return [
            Chunk(
                kind=encodings.KINDS[kind],
                offset=int(table.offset[i]),
                size=int(table.size[i]),
                crc=int(table.crc[i]),
                row=(i - a) * frames,
                rows=min(frames, last - (i - a) * frames),
            )
            for i in range(low, high)
        ]

    def _packet_chunks(self, table: PacketTable, episode: int, start: int, rows: int) -> list[Chunk]:
        first, end = table.first[episode : episode + 2].tolist()
        low, high = table.chunk_at(episode, start), table.chunk_at(episode, start + rows - 1) + 1
        stored = table.part("crc", episode, low - first, high - low)
        begins = table.row[low : min(high + 1, end)].tolist()
        ends = [*begins[1:], self.rows.item(episode)]
        columns = table.offset[low:high].tolist(), table.size[low:high].tolist()
        crcs = [-1] * (high - low) if stored is None else stored.tolist()
        return [
            Chunk(kind=PACKETS, offset=offset, size=size, crc=crc, row=row, rows=after - row)
            for offset, size, crc, row, after in zip(*columns, crcs, begins, ends)
        ]

    def _field_rows(self, episode: int, spec: FieldSpec) -> int:
        """Rows of a field in an episode: T for actions, rewards and flags, and for observed fields listed in `short`."""
        if spec.per == "episode":
            return 1
        rows, steps = int(self.rows[episode]), int(self.steps[episode])
        if rows == steps:
            return rows
        return steps if spec.role in ONLY_WITH_ACTION or spec.name in self.short(episode) else rows

    def short(self, episode: int) -> tuple[str, ...]:
        """Names of the observed fields that have T rows although the episode has T + 1."""
        return self._short_lists[int(self._arrays["short"][episode])]

    @cached_property
    def _short_lists(self) -> list[tuple[str, ...]]:
        _, words = self._strings("short")
        return [tuple(w.split(",")) if w else () for w in words]

    # Decoding

    def decode(
        self,
        episode: int,
        start: int,
        rows: int,
        fields: Sequence[str],
        buffers: Sequence[Buffer],
        before: Callable[[Range], None] | None = None,
        strides: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Decode rows of an episode from their bytes, after verifying the CRC-32C of every row and chunk.

        Parameters
        ----------
        episode, start, rows, fields
            As given to `ranges`.
        buffers : Sequence[Buffer]
            The bytes of each range that `ranges` returned, in its order.
        before : callable, optional
            Called with the range of a large field before it is decoded, because a decoder of pictures may crash.
        strides : Mapping[str, int], optional
            Field -> n: only rows whose number is a multiple of n are needed. If the field is a video, the others are black, and
            the bytes of groups of pictures that hold none of them may be anything.

        Returns
        -------
        dict[str, Any]
            `fields`, `step`, `returns_to_go` and `valid` of a `Window`. All arrays are copies of the buffers' content.

        Raises
        ------
        DataError
            If a buffer has a wrong length or its content is damaged. The message names the shard, the member and the bytes.
        """
        return decode(self, episode, start, rows, fields, buffers, before, strides)

    def check_chunk(self, episode: int, place: Range, chunk: Chunk, data: Buffer) -> None:
        """Raises DataError, which names the place, if the bytes of a chunk do not have its CRC-32C."""
        if chunk.crc >= 0 and crc32c(data) != chunk.crc:
            raise DataError(f"{self.place(episode, place)}: the chunk's CRC-32C does not match; run `tiphys verify`")

    def episode_value(self, episode: int, spec: FieldSpec) -> Any:
        """The value of a field that has one value for the whole episode: a str, or an array of the field's shape.

        None if the episode does not have this text. Raises DataError if the index has no value of the declared size.
        """
        if spec.dtype == "str":
            codes, texts = self.text(spec.name)
            return None if codes[episode] < 0 else texts[int(codes[episode])]
        name = f"value.{spec.name}"
        if f"{name}.first" not in self._arrays:
            raise DataError(f"the index of {self.url} has no column {name!r}; run `tiphys verify`")
        a, b = (int(x) for x in self._arrays[f"{name}.first"][episode : episode + 2])
        if b - a != spec.bytes_per_step:
            raise DataError(
                f"episode {self.id(episode)!r}, field {spec.name!r}: the index has {b - a} bytes, "
                f"not {spec.bytes_per_step}"
            )
        data = self._arrays[f"{name}.bytes"][a:b].tobytes()
        return np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape).copy()

    def place(self, episode: int, r: Range) -> str:
        """The name of a range of an episode, for messages."""
        member = STEPS if r.field == STEPS else f"member {r.field}"
        name = self.shard_name(r.shard)
        where = name if "://" in name else f"{self.url}/{name}"
        return f"{where}, bytes {r.offset}–{r.offset + r.size - 1} ({member} of episode {self.id(episode)!r})"


def _reopen(url: str, document: Mapping[str, Any], folder: str, fingerprint: str) -> EpisodeIndex:
    index = EpisodeIndex(url, document, load(Path(folder)), fingerprint)
    index._folder = Path(folder)
    return index
