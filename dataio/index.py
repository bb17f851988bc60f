"""`EpisodeIndex`: where every step of every episode lies, and how its bytes become a window's arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.format import encodings
from tiphys.dataio.format.arrays import load
from tiphys.dataio.format.document import DATASET, cache_folder, decoded, parse
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, Layout, broken_row, is_large, is_small
from tiphys.dataio.format.table import Shard
from tiphys.dataio.statistics import FieldStatistics

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.storage import Store

STEPS = "steps.npy"


class Range(NamedTuple):
    """Bytes [offset, offset + size) of a shard that hold rows of a field; field `steps.npy`: of all small fields."""

    shard: int
    offset: int
    size: int
    field: str


class Strings(Sequence[str]):
    """Strings as one array of UTF-8 and where each begins: no Python object for each."""

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


class EpisodeIndex:
    """The episodes of a dataset, as arrays [E], and the byte ranges of their rows.

    url          the dataset's folder
    tasks        its tasks; `task` counts here
    statistics   task -> field -> FieldStatistics
    fingerprint  changes whenever the dataset does
    task, steps, rows, shard: int32 [E]; total_return: float32 [E]; success: int8 [E] (−1 unknown); hash: uint64 [E]
    """

    def __init__(
        self, url: str, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray], fingerprint: str
    ) -> None:
        self.url = url
        self.document = document
        self.fingerprint = fingerprint
        self.tasks: tuple[TaskSpec, ...] = tuple(document["tasks"])
        self.shards: tuple[Shard, ...] = tuple(document["shards"])
        self.arrays = arrays
        self._folder: Path | None = None
        self.task, self.steps, self.rows, self.shard = (arrays[n] for n in ("task", "steps", "rows", "shard"))
        self.total_return, self.success, self.hash = arrays["return"], arrays["success"], arrays["hash"]
        self.ids = Strings(arrays["id.first"], arrays["id.bytes"])
        self.layouts = tuple(Layout(t) for t in self.tasks)
        self._row_bytes = np.array([one.dtype.itemsize for one in self.layouts] or [0], np.int64)
        self._offset = arrays["offset"]
        self._sorted: dict[tuple[int, tuple[str, ...]], _Wanted] = {}

    @classmethod
    def open(cls, url: str, cache_dir: str = "") -> EpisodeIndex:
        """The index of a dataset: downloaded and decoded once into memory-mapped arrays under `cache_dir`
        (default $TIPHYS_CACHE, else ~/.cache/tiphys), keyed by its digest; opened from there afterwards.

        Raises FileNotFoundError where there is no dataset, DataError where index and dataset.json do not belong together.
        """
        from tiphys.dataio.storage import Store

        store = Store(url)
        try:
            raw = store.read(DATASET)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url}: no dataset is there ({DATASET} is missing); `tiphys collect`, `convert` or `index` makes one"
            ) from error
        document = parse(raw, f"{url}/{DATASET}")
        folder = decoded(store, document, cache_folder(cache_dir))
        index = cls(url, document, load(folder), hashlib.sha256(raw).hexdigest()[:32])
        index._folder = folder
        return index

    def __reduce__(self) -> Any:  # to a spawned process goes the place of the arrays, not their content
        if self._folder is None:
            return EpisodeIndex, (self.url, self.document, self.arrays, self.fingerprint)
        return _reopen, (self.url, self.document, str(self._folder), self.fingerprint)

    # Episodes

    @property
    def episodes(self) -> int:
        return len(self.task)

    @cached_property
    def statistics(self) -> Mapping[str, Mapping[str, FieldStatistics]]:
        stored = self.document["statistics"]
        try:
            return {t: {f: FieldStatistics.from_dict(s) for f, s in fields.items()} for t, fields in stored.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.url}/{DATASET}: its statistics are damaged: {error!r}") from None

    def id(self, episode: int) -> str:
        return self.ids[episode]

    def held_out(self, share: float) -> np.ndarray:
        """bool [E]: the episodes that are set aside for validation, by their ids alone."""
        return np.asarray(self.hash) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))

    def text(self, field: str) -> tuple[np.ndarray, Sequence[str]]:
        """int32 [E] codes (−1: none) of a text that is one for the whole episode, and the texts that they count in."""
        return self._strings(f"text.{field}")

    def agents(self) -> tuple[np.ndarray, Sequence[str]]:
        """int32 [E] codes of who acted, and the names that they count in."""
        return self._strings("agent")

    def _strings(self, name: str) -> tuple[np.ndarray, Sequence[str]]:
        if name not in self.arrays:
            return np.full(self.episodes, -1, np.int32), []
        return self.arrays[name], Strings(self.arrays[f"{name}.first"], self.arrays[f"{name}.bytes"])

    def shard_name(self, shard: int) -> str:
        """The shard's path in the dataset's folder, or its URL where it belongs to another dataset: `Store` takes both."""
        return self.shards[shard].name

    @cached_property
    def store(self) -> Store:
        from tiphys.dataio.storage import Store

        return Store(self.url)

    # Ranges

    def row_bytes(self, task: int) -> int:
        """Bytes of one row of `steps.npy` of a task."""
        return int(self._row_bytes[task])

    def row_ranges(self, episodes: Any, starts: Any, rows: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard int32, offset int64, size int64), each [n]: the ranges of `steps.npy` of n windows.

        `rows` is cut at the episode's end. Size 0: the episode has no `steps.npy` (an image of a foreign tar).
        """
        e, s = np.asarray(episodes), np.asarray(starts, np.int64)
        one = self._row_bytes[self.task[e]]
        first = self._offset[e]
        count = np.clip(np.minimum(np.asarray(rows, np.int64), self.rows[e] - s), 0, None)
        return self.shard[e], first + s * one, np.where(first < 0, 0, count * one)

    def ranges(self, episode: int, start: int, rows: int, fields: Sequence[str]) -> list[Range]:
        """The byte ranges of rows [start, start + rows): one of `steps.npy`, then one for each large field asked for.

        A field's range runs from its first to its last chunk, with the tar headers that lie between them. Rows past
        the episode's end are cut. Raises DataError where nothing is left, or the task has no such field.
        """
        task, shard, first = self.task.item(episode), self.shard.item(episode), self._offset.item(episode)
        have = self.rows.item(episode)
        rows = min(rows, have - start)
        if start < 0 or rows <= 0:
            raise DataError(f"episode {self.id(episode)!r} has no rows from {start} on: it has {have}")
        one = self._row_bytes.item(task)
        out = [Range(shard, first + start * one, rows * one, STEPS)] if first >= 0 else []
        for spec in self._wanted(task, fields).large:
            chunks = self.chunks(episode, spec, start, rows)
            if chunks:
                begin, end = chunks[0].offset, chunks[-1].offset + chunks[-1].size
                out.append(Range(shard, begin, end - begin, spec.name))
        return out

    def _wanted(self, task: int, fields: Sequence[str]) -> _Wanted:
        """The named fields of a task by where they are stored."""
        key = task, tuple(fields)
        wanted = self._sorted.get(key)
        if wanted is None:
            specs = [self.tasks[task].field(name) for name in fields]
            small = [f.name for f in specs if is_small(f)]
            large = [f for f in specs if is_large(f)]
            wanted = self._sorted[key] = _Wanted(
                small, large, [f for f in specs if not is_small(f) and not is_large(f)]
            )
        return wanted

    def chunks(self, episode: int, spec: FieldSpec, start: int, rows: int) -> list[Chunk]:
        """The chunks that hold rows [start, start + rows) of a large field, as far as it reaches."""
        name = f"chunks.{spec.name}"
        if f"{name}.first" not in self.arrays:
            raise DataError(f"the index of {self.url} has no column {name!r}, though a task declares the field")
        kind, frames = int(self.arrays[f"{name}.kind"][episode]), int(self.arrays[f"{name}.rows"][episode])
        if kind < 0 or frames < 1:
            raise DataError(f"episode {self.id(episode)!r}, field {spec.name!r}: the index names no known encoding")
        a, b = (int(x) for x in self.arrays[f"{name}.first"][episode : episode + 2])
        last = self._field_rows(episode, spec)
        if spec.per == "episode":
            start, rows = 0, 1
        low, high = a + start // frames, min(b, a + -(-min(start + rows, last) // frames))
        offset, size, crc = (self.arrays[f"{name}.{n}"] for n in ("offset", "size", "crc"))
        return [
            Chunk(
                encodings.KINDS[kind],
                int(offset[i]),
                int(size[i]),
                int(crc[i]),
                (i - a) * frames,
                min(frames, last - (i - a) * frames),
            )
            for i in range(low, high)
        ]

    def _field_rows(self, episode: int, spec: FieldSpec) -> int:
        """Rows that a field has in an episode: T for what only actions have, and where the writer said so."""
        if spec.per == "episode":
            return 1
        rows, steps = int(self.rows[episode]), int(self.steps[episode])
        if rows == steps:
            return rows
        return steps if spec.role in ONLY_WITH_ACTION or spec.name in self.short(episode) else rows

    def short(self, episode: int) -> tuple[str, ...]:
        """Names of the observed fields that have T rows though the episode has T + 1."""
        return self._short_lists[int(self.arrays["short"][episode])]

    @cached_property
    def _short_lists(self) -> list[tuple[str, ...]]:
        _, words = self._strings("short")
        return [tuple(w.split(",")) if w else () for w in words]

    # Decoding

    def decode(
        self, episode: int, start: int, rows: int, fields: Sequence[str], buffers: Sequence[Buffer]
    ) -> dict[str, Any]:
        """The arrays of a Window (`fields`, `step`, `returns_to_go`, `valid`) from the bytes of `ranges(…)`, in its order.

        Every row and chunk is verified. All arrays are copies: the buffers may go. Raises DataError that names shard,
        member and byte range.
        """
        task = self.task.item(episode)
        rows = min(rows, self.rows.item(episode) - start)
        wanted = self._wanted(task, fields)
        out: dict[str, Any] = {}
        if self._offset.item(episode) >= 0:
            packed = self._decode_rows(episode, start, rows, buffers)
            for name in wanted.small:
                out[name] = packed[name].copy()
            step, returns, valid = (
                packed["_step"].astype(np.int64),
                packed["_return_to_go"].copy(),
                packed["_valid"] != 0,
            )
        else:
            if wanted.small:
                raise DataError(f"episode {self.id(episode)!r} has no steps.npy, and so no field {wanted.small[0]!r}")
            step, returns, valid = np.arange(start, start + rows), np.zeros(rows, np.float32), np.zeros(rows, bool)
        if wanted.large:
            parts = self._parts(episode, start, rows, fields, buffers)
            for spec in wanted.large:
                out[spec.name] = self._decode_large(episode, spec, start, rows, parts.get(spec.name))
        for spec in wanted.episodic:
            value = self._episode_value(episode, spec)
            if value is not None:
                out[spec.name] = value
        return {"fields": out, "step": step, "returns_to_go": returns, "valid": valid}

    def _decode_rows(self, episode: int, start: int, rows: int, buffers: Sequence[Buffer]) -> np.ndarray:
        dtype = self.layouts[self.task.item(episode)].dtype
        if not buffers:
            raise DataError(f"episode {self.id(episode)!r}: no buffer was given for its rows")
        packed = memoryview(buffers[0]).cast("B")
        broken = broken_row(packed, dtype.itemsize) if len(packed) == rows * dtype.itemsize else 0
        if broken >= 0:
            place = self.ranges(episode, start, rows, ())[0]
            if len(packed) != place.size:
                raise DataError(f"{self._place(episode, place)}: {len(packed)} bytes arrived; read the range again")
            place = place._replace(offset=place.offset + broken * dtype.itemsize, size=dtype.itemsize)
            raise DataError(
                f"{self._place(episode, place)}: the CRC-32C of row {start + broken} does not match; read the range "
                "again, and if it stays so, run `tiphys verify`"
            )
        table = np.frombuffer(packed, dtype)
        if table["_step"][0] != start:
            place = self.ranges(episode, start, rows, ())[0]
            raise DataError(f"{self._place(episode, place)}: row {table['_step'][0]} stands there, not row {start}")
        return table

    def _parts(
        self, episode: int, start: int, rows: int, fields: Sequence[str], buffers: Sequence[Buffer]
    ) -> dict[str, tuple[Range, memoryview]]:
        """Range and bytes of each large field that reaches into the window."""
        ranges = self.ranges(episode, start, rows, fields)
        if len(ranges) != len(buffers):
            raise DataError(f"episode {self.id(episode)!r}: {len(buffers)} buffers for {len(ranges)} ranges")
        views = [memoryview(b).cast("B") for b in buffers]
        for r, view in zip(ranges, views):
            if len(view) != r.size:
                raise DataError(f"{self._place(episode, r)}: {len(view)} bytes arrived; read the range again")
        return {r.field: (r, v) for r, v in zip(ranges, views)}

    def _decode_large(
        self, episode: int, spec: FieldSpec, start: int, rows: int, part: tuple[Range, memoryview] | None
    ) -> np.ndarray:
        pieces = []
        chunks = self.chunks(episode, spec, start, rows) if part else []
        for chunk in chunks:
            assert part is not None
            begin = chunk.offset - part[0].offset
            data = part[1][begin : begin + chunk.size]
            place = Range(part[0].shard, chunk.offset, chunk.size, spec.name)
            if crc32c(data) != chunk.crc:
                raise DataError(
                    f"{self._place(episode, place)}: the chunk's CRC-32C does not match; run `tiphys verify`"
                )
            try:
                pieces.append(_decode_chunk(data, chunk, spec))
            except DataError as error:
                raise DataError(f"{self._place(episode, place)}: {error}") from error
        if spec.per == "episode":
            return pieces[0][0]
        low = start - (chunks[0].row if chunks else 0)
        array = np.concatenate(pieces)[low : low + rows] if pieces else _nothing(spec, 0)
        if len(array) < rows:  # the last, observation-only row of a field that has none there
            array = np.concatenate([array, _nothing(spec, rows - len(array), array.shape[1:])])
        return array

    def _episode_value(self, episode: int, spec: FieldSpec) -> Any:
        """A value that is one for the whole episode; None for a text that it does not have."""
        if spec.dtype == "str":
            codes, texts = self.text(spec.name)
            return None if codes[episode] < 0 else texts[int(codes[episode])]
        name = f"value.{spec.name}"
        if f"{name}.first" not in self.arrays:
            raise DataError(f"the index of {self.url} has no column {name!r}")
        a, b = (int(x) for x in self.arrays[f"{name}.first"][episode : episode + 2])
        if b - a != spec.bytes_per_step:
            raise DataError(
                f"episode {self.id(episode)!r}, field {spec.name!r}: {b - a} bytes, not {spec.bytes_per_step}"
            )
        data = self.arrays[f"{name}.bytes"][a:b].tobytes()
        return np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape).copy()

    def _place(self, episode: int, r: Range) -> str:
        member = STEPS if r.field == STEPS else f"member {r.field}"
        name = self.shard_name(r.shard)
        where = name if "://" in name else f"{self.url}/{name}"
        return f"{where}, bytes {r.offset}–{r.offset + r.size - 1} ({member} of episode {self.id(episode)!r})"


class _Wanted(NamedTuple):
    """Fields by where they are stored."""

    small: list[str]  # columns of steps.npy
    large: list[FieldSpec]  # members of their own
    episodic: list[FieldSpec]  # the index


class Chunk(NamedTuple):
    kind: str
    offset: int
    size: int
    crc: int
    row: int  # first row in it
    rows: int


def _decode_chunk(data: memoryview, chunk: Chunk, spec: FieldSpec) -> np.ndarray:
    if chunk.kind != "raw":
        return encodings.decode(data, chunk.kind, chunk.rows, spec.shape)
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if spec.dtype == "str" or 0 in spec.shape or chunk.size != chunk.rows * spec.bytes_per_step:
        raise DataError(f"{chunk.size} bytes are not {chunk.rows} rows of {spec.dtype} {spec.shape}")
    return np.frombuffer(data, dtype).reshape(chunk.rows, *spec.shape).copy()


def _nothing(spec: FieldSpec, rows: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    if spec.dtype == "str":
        return np.full(rows, "", np.dtypes.StringDType())
    return np.zeros((rows, *(spec.shape if shape is None else shape)), spec.dtype)


def _reopen(url: str, document: Mapping[str, Any], folder: str, fingerprint: str) -> EpisodeIndex:
    index = EpisodeIndex(url, document, load(Path(folder)), fingerprint)
    index._folder = Path(folder)
    return index
