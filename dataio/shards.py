"""`ShardWriter`: episodes as WebDataset tars whose steps are addressable, in any store."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from dataio import encodings as codecs
from dataio import table
from dataio.encodings import Encoding
from dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from dataio.index import DATASET, INDEX, STATISTICS, VERSION, EpisodeIndex
from dataio.rows import column, is_large, pack_rows, row_dtype
from dataio.statistics import Statistics

if TYPE_CHECKING:
    from dataio.storage import Store

MAX_SAMPLE = 4 << 30  # bytes of one episode
MAX_VALUE = 1 << 16  # bytes of a value or text that is one for the whole episode, and of `info`
_BLOCK = 512  # of a tar
_PIECE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ShardWriter:
    """Writes episodes to `shards/`, then `index.parquet`, `statistics.parquet` and, last, `dataset.json`.

    url          the dataset's folder, in any store
    tasks        what episodes may belong to; `add_task` adds more at any time
    shard_bytes  a shard is closed before it would grow beyond this
    encodings    field name or glob -> Encoding, the first match counts; without one a field is stored losslessly
    piece        name of a piece of a dataset that many writers write at once: shards are `shards/PIECE-000000.tar`, the index is
                 `pieces/PIECE.parquet`, and `merge_pieces` makes the dataset. Writing a piece again gives the same bytes.
    scratch      folder for the shard that is being written (default: the system's)

    A context manager. Nothing that looks whole exists before `close`; leaving the block by an exception closes nothing.
    Raises DataError for an episode that does not fit its task (nothing of it is written, the next one may follow), FileExistsError
    where there is a dataset already, OSError where a disk is full.
    """

    def __init__(
        self,
        url: str,
        tasks: Sequence[TaskSpec] = (),
        *,
        shard_bytes: int = 64 << 20,
        encodings: Mapping[str, Encoding] | None = None,
        piece: str = "",
        scratch: str = "",
    ) -> None:
        from dataio.storage import Store

        if piece and not _PIECE.fullmatch(piece):
            raise DataError(f"piece {piece!r}: a name of letters, digits, - and _, at most 64, is needed")
        self.url, self.piece, self.shard_bytes = url, piece, shard_bytes
        self.encodings = dict(encodings or {})
        self.tasks: dict[str, TaskSpec] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._chosen: dict[str, dict[str, Encoding]] = {}
        for task in tasks:
            self.add_task(task)
        self._store = Store(url)
        if not piece and _exists(self._store, DATASET):
            raise FileExistsError(f"{url} is a dataset already; append to it or choose another folder")
        self._scratch = Path(tempfile.mkdtemp(prefix="tiphys-shards-", dir=scratch or None))
        self._table = table.TableWriter(self._scratch)
        self._statistics = Statistics()
        self._shards: list[table.Shard] = []
        self._tar: _Tar | None = None
        self._closed = False

    def add_task(self, task: TaskSpec) -> None:
        """Allow episodes of a further task. Raises DataError where its fields cannot be stored, or it is known otherwise."""
        known = self.tasks.get(task.name)
        if known is not None and known != task:
            raise DataError(f"task {task.name!r} is declared twice, with different fields or scores")
        seen: set[str] = set()
        for field in task.fields:
            if not table.FIELD.fullmatch(field.name) or len(field.name) > 64 or field.name in ("steps", "json"):
                raise DataError(
                    f"task {task.name!r}: field {field.name!r}: a name is letters, digits, - and _ in parts joined by "
                    "dots, at most 64 in all, and neither `steps` nor `json`"
                )
            if field.name.lower() in seen:  # WebDataset's readers lower the case of extensions
                raise DataError(f"task {task.name!r}: two fields are called {field.name!r} (whatever the case)")
            seen.add(field.name.lower())
        self._chosen[task.name] = {f.name: codecs.choose(f, self.encodings) for f in task.fields if is_large(f)}
        self._dtypes[task.name] = row_dtype(task)
        self.tasks[task.name] = task

    def write(self, episode: Episode) -> None:
        """Add one episode."""
        task = self.tasks.get(episode.task)
        if task is None:
            raise DataError(f"episode {episode.id!r}: task {episode.task!r} was not declared; call add_task first")
        sample = _Sample(task, episode, self._dtypes[task.name], self._chosen[task.name])
        with self._full_disk():
            if self._tar is not None and self._tar.size + sample.bytes > self.shard_bytes and self._tar.samples:
                self._finish_shard()
            if self._tar is None:
                stem = f"{self.piece}-{len(self._shards):06d}" if self.piece else f"{len(self._shards):06d}"
                self._tar = _Tar(self._scratch / f"{stem}.tar", stem)
            record = self._tar.add(sample)
            self._table.add(record)
        self._statistics.add(task, sample.rows)

    def _finish_shard(self) -> None:
        tar, self._tar = self._tar, None
        assert tar is not None
        shard = tar.close()
        self._store.upload(shard.name, str(tar.file))
        tar.file.unlink()
        self._shards.append(shard)

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.abort()
            raise OSError(
                error.errno,
                f"no space left while writing {self.url} (scratch folder {self._scratch.parent}); nothing of the dataset is visible. "
                "Free space, or choose another scratch folder or smaller shards, and run it again",
            ) from error

    def close(self) -> EpisodeIndex:
        """Upload what is left, then the index; `dataset.json` comes last. Returns the index (of a piece: of that piece alone)."""
        if self._closed:
            raise ValueError(f"the writer of {self.url} is closed")
        with self._full_disk():
            if self._tar is not None:
                self._finish_shard()
            index, statistics = self._scratch / INDEX, self._scratch / STATISTICS
            self._table.finish(index, list(self.tasks.values()), self._shards)
            self._statistics.write(statistics)
            if self.piece:
                self._store.upload(f"pieces/{self.piece}.statistics.parquet", str(statistics))
                self._store.upload(f"pieces/{self.piece}.parquet", str(index))
                result = local_index(self.url, index, self._statistics)
            else:
                publish(self._store, index, self._statistics)
                result = EpisodeIndex.open(self.url)
        self.abort()
        return result

    def abort(self) -> None:
        """Leave off: what was uploaded is no dataset, and the scratch folder is removed. Does nothing after `close`."""
        self._closed = True
        if self._tar is not None:
            self._tar.stream.close()
            self._tar = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.abort()
        elif not self._closed:
            self.close()


def merge_pieces(url: str, pieces: Sequence[str] = ()) -> EpisodeIndex:
    """Make the dataset of its pieces: all that are there, or those named, in the order of their names.

    The pieces stay, so that more can be written and merged again. Raises FileNotFoundError where a named piece is missing.
    """
    from dataio.index import fetch
    from dataio.storage import Store

    store = Store(url)
    names = sorted(pieces) or sorted(
        Path(p).stem for p in store.list("pieces") if p.endswith(".parquet") and not p.endswith(".statistics.parquet")
    )
    if not names:
        raise FileNotFoundError(f"{url} has no pieces to merge")
    scratch = Path(tempfile.mkdtemp(prefix="tiphys-merge-"))
    try:
        tasks: dict[str, TaskSpec] = {}
        shards: list[table.Shard] = []
        statistics = Statistics()
        files = []
        for i, name in enumerate(names):
            file, sketches = scratch / f"{i:06d}.parquet", scratch / "statistics.parquet"
            fetch(store, f"pieces/{name}.parquet", file)
            fetch(store, f"pieces/{name}.statistics.parquet", sketches)
            own_tasks, own_shards = table.describe(file)
            merge_tasks(tasks, own_tasks, f"piece {name}")
            shards += own_shards
            statistics.merge(Statistics.read(sketches))
            files.append(file)
        index = scratch / INDEX
        table.combine(files, index, list(tasks.values()), shards)
        publish(store, index, statistics)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EpisodeIndex.open(url)


def merge_tasks(tasks: dict[str, TaskSpec], more: Sequence[TaskSpec], source: str) -> None:
    """Add tasks to those known. Raises DataError where one name stands for two things."""
    for task in more:
        if tasks.setdefault(task.name, task) != task:
            raise DataError(f"{source}: task {task.name!r} is declared otherwise than before; rename one of them")


def document(index: Path, statistics: Statistics) -> dict[str, Any]:
    """What `dataset.json` says of an index file."""
    tasks, shards = table.describe(index)
    result = statistics.result(t.name for t in tasks)
    return {
        "version": VERSION,
        "tasks": [t.to_dict() for t in tasks],
        "shards": [[s.name, s.size, s.crc] for s in shards],
        "statistics": {t: {f: s.to_dict() for f, s in fields.items()} for t, fields in result.items()},
        "digests": {INDEX: _sha256(index)},
    }


def publish(store: Store, index: Path, statistics: Statistics, **more: Any) -> None:
    """Upload statistics, index and, last, `dataset.json`: from then on there is a dataset."""
    sketches = index.with_name(STATISTICS)
    statistics.write(sketches)
    described = document(index, statistics) | more
    store.upload(STATISTICS, str(sketches))
    store.upload(INDEX, str(index))
    store.write(DATASET, json.dumps(described, indent=1, ensure_ascii=False).encode())


def local_index(url: str, file: Path, statistics: Statistics) -> EpisodeIndex:
    """An index file that is here, decoded in memory."""
    described = document(file, statistics)
    tasks, shards = table.describe(file)
    arrays = table.decode(file, None, [t.name for t in tasks], [s.name for s in shards])
    return EpisodeIndex(url, described, arrays, described["digests"][INDEX][:32])


def _exists(store: Store, path: str) -> bool:
    try:
        store.head(path)
    except FileNotFoundError:
        return False
    return True


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Sample:
    """An episode as the members of one WebDataset sample, in the order in which TarWriter writes them."""

    def __init__(self, task: TaskSpec, episode: Episode, dtype: np.dtype, chosen: Mapping[str, Encoding]) -> None:
        if not 0 < len(episode.id.encode()) <= 512 or episode.steps < 0:
            raise DataError(f"episode {episode.id[:60]!r}: an id of 1 to 512 bytes and steps ≥ 0 are needed")
        unknown = set(episode.fields) - {f.name for f in task.fields}
        if unknown:
            raise DataError(
                f"episode {episode.id!r}: task {task.name!r} declares no field {', '.join(sorted(unknown))}"
            )
        self.episode = episode
        self.rows = pack_rows(task, episode, dtype)
        self.members: dict[str, bytes] = {"steps.npy": npy(self.rows)}
        self.texts: dict[str, str] = {}
        self.values: dict[str, bytes] = {}
        # field -> (kind, rows of a chunk, [(member, offset in the member, size, CRC)])
        self.chunks: dict[str, tuple[str, int, list[tuple[str, int, int, int]]]] = {}
        count = len(self.rows)
        self.short: list[str] = []
        for field in task.fields:
            if is_large(field):
                self._add_large(field, chosen[field.name], count)
            elif field.per == "episode":
                self._add_episodic(field)
            if field.per == "step" and field.role not in _ACTION_ROLES and len(episode.fields[field.name]) < count:
                self.short.append(field.name)
        self.members["json"] = self._json(chosen)
        # header and padding of each member
        self.bytes = sum(_BLOCK + -(-len(m) // _BLOCK) * _BLOCK for m in self.members.values())
        if self.bytes > MAX_SAMPLE:
            raise DataError(f"episode {episode.id!r} takes {self.bytes} bytes; at most {MAX_SAMPLE} are written")

    def _add_large(self, field: FieldSpec, encoding: Encoding, count: int) -> None:
        if field.per == "episode":
            value = np.asarray(self.episode.fields[field.name])[None]
            stepwise = Episode(self.episode.id, self.episode.task, {field.name: value}, 0)
            array = column(_stepwise(field), stepwise, 1)
        else:
            array = column(field, self.episode, count)
        extension = codecs.EXTENSIONS[encoding.kind]
        entries: list[tuple[str, int, int, int]] = []
        if encoding.kind == "raw":
            member = f"{field.name}.{extension}"
            self.members[member] = data = npy(array)
            one = field.bytes_per_step * encoding.rows
            begin = len(data) - array.nbytes
            for at in range(begin, len(data), max(one, 1)):
                part = data[at : at + one]
                entries.append((member, at, len(part), crc32c(part)))
        elif encoding.kind == "text":
            # one JSON list whose items are the chunks, so that readers of the tar get the strings
            member = f"{field.name}.{extension}"
            parts = codecs.encode(array, encoding)
            at = 1
            for part in parts:
                entries.append((member, at, len(part), crc32c(part)))
                at += len(part) + 1
            self.members[member] = b"[" + b",".join(parts) + b"]"
        else:
            parts = codecs.encode(array, encoding)
            width = max(4, len(str(max(len(parts) - 1, 0))))
            for i, part in enumerate(parts):
                member = f"{field.name}.{i:0{width}d}.{extension}"
                self.members[member] = part
                entries.append((member, 0, len(part), crc32c(part)))
        self.chunks[field.name] = (encoding.kind, encoding.rows, entries)

    def _add_episodic(self, field: FieldSpec) -> None:
        value = self.episode.fields.get(field.name)
        where = f"episode {self.episode.id!r}, field {field.name!r}"
        if field.dtype == "str":
            if value is None:
                return
            if not isinstance(value, str) or len(value.encode()) > MAX_VALUE << 8:
                raise DataError(f"{where}: a text of at most {MAX_VALUE << 8} bytes is needed")
            self.texts[field.name] = value
            return
        stepwise = Episode(
            self.episode.id, self.episode.task, {} if value is None else {field.name: np.asarray(value)[None]}, 0
        )
        self.values[field.name] = column(_stepwise(field), stepwise, 1).tobytes()

    def _json(self, chosen: Mapping[str, Encoding]) -> bytes:
        e = self.episode
        fields: dict[str, Any] = dict(self.texts)
        for name in self.values:
            fields[name] = np.asarray(e.fields[name]).tolist()
        described = {
            "id": e.id,
            "task": e.task,
            "steps": e.steps,
            "success": None if e.success is None else bool(e.success),
            "agent": e.agent,
            "fields": fields,
            "short": self.short,
            "encodings": {name: [chosen[name].kind, chosen[name].rows] for name in sorted(self.chunks)},
            "info": dict(e.info),
        }
        try:
            return json.dumps(described, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"episode {e.id!r}: info holds what JSON cannot: {error}") from None


_ACTION_ROLES = ("action", "reward", "terminated", "truncated")


def _stepwise(field: FieldSpec) -> FieldSpec:
    """A field of the whole episode as one of its first row."""
    return FieldSpec(field.name, "info", field.modality, field.dtype, field.shape, field.low, field.high, field.values)


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy` bytes."""
    import io

    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


class _Tar:
    """One shard in the scratch folder, written by webdataset's TarWriter; offsets follow from the tar's arithmetic."""

    def __init__(self, file: Path, stem: str) -> None:
        from webdataset.writer import TarWriter

        self.file, self.stem = file, stem
        self.name = f"shards/{file.name}"
        self.size = 0  # bytes of whole members
        self.samples = 0
        self.stream = _Checked(file)
        # fixed times and owners: the same episodes give the same bytes
        self._writer = TarWriter(self.stream, user="", group="", mode=0o644, mtime=0, encoder=False)

    def add(self, sample: _Sample) -> table.Record:
        begin = self.size
        self._writer.write({"__key__": f"{self.stem}/{self.samples:06d}", **sample.members})
        data: dict[str, int] = {}
        for member in sorted(sample.members):
            data[member] = self.size + _BLOCK
            self.size += _BLOCK + -(-len(sample.members[member]) // _BLOCK) * _BLOCK
        if self._writer.tarstream.offset != self.size:
            raise RuntimeError(f"{self.file.name}: TarWriter is at {self._writer.tarstream.offset}, not {self.size}")
        self.samples += 1
        e, steps = sample.episode, sample.members["steps.npy"]
        chunks = {
            field: table.Chunks(
                kind, rows, [data[m] + at for m, at, _, _ in c], [s for _, _, s, _ in c], [k for *_, k in c]
            )
            for field, (kind, rows, c) in sample.chunks.items()
        }
        return table.Record(
            id=e.id,
            task=e.task,
            steps=e.steps,
            rows=len(sample.rows),
            total_return=e.total_return,
            shard=self.name,
            sample=begin,
            sample_bytes=self.size - begin,
            offset=data["steps.npy"] + len(steps) - sample.rows.nbytes,
            success=None if e.success is None else bool(e.success),
            agent=e.agent,
            json=data["json"],
            json_bytes=len(sample.members["json"]),
            short=tuple(sample.short),
            texts=sample.texts,
            values=sample.values,
            chunks=chunks,
        )

    def close(self) -> table.Shard:
        self._writer.close()
        self.stream.close()
        return table.Shard(self.name, self.stream.size, self.stream.crc)


class _Checked:
    """A file that keeps the size and the CRC-32C of what was written to it."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "wb")  # noqa: SIM115 (closed by close)
        self.size = self.crc = 0

    def write(self, data: bytes) -> int:
        self.crc = crc32c(data, self.crc)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
