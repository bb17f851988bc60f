"""`ShardWriter` writes episodes to WebDataset tars in any store. An index makes every step of them addressable."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from crc32c import crc32c

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format import arrays, limited, table
from tiphys.dataio.format import encodings as codecs
from tiphys.dataio.format.document import DATASET, INDEX, STATISTICS, dataset_document, fetch, parse, publish
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.format.rows import RowLayout, check_task, plain
from tiphys.dataio.format.sample import BLOCK, Sample
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.statistics import Statistics

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

_PIECE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ShardWriter:
    """Writes a dataset: episodes to `shards/`, then `statistics.parquet`, `index.parquet` and last `dataset.json`.

    Use it as a context manager: leaving the block calls `close`, or `abort` if the block raised an exception. There is no dataset
    before `close` has finished. The same episodes give the same bytes.

    Parameters
    ----------
    url : str
        The dataset's folder, in any store.
    tasks : Sequence[TaskSpec]
        Tasks that episodes may belong to; `add_task` adds more at any time.
    shard_bytes : int
        A shard is closed before an episode would make it larger than this many bytes.
    encodings : Mapping[str, Encoding], optional
        Field name or glob -> how a large field is stored. The first match counts; a field without a match is stored losslessly.
    piece : str
        Name of the piece of a dataset that this writer writes, if many writers write one dataset at once. Its shards are
        `shards/PIECE-000000.tar` …, its index is `pieces/PIECE.parquet`. `merge_pieces` makes the dataset of the pieces.
    scratch : str
        Folder for the shard that is being written; by default the system's temporary folder.
    folder : str
        Folder of the shards within the dataset's.

    Raises
    ------
    DataError
        If a task cannot be stored, or the name of the piece is not valid.
    FileExistsError
        If the folder already holds a dataset and no piece is named.
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
        folder: str = "shards",
    ) -> None:
        from tiphys.dataio.storage import Store

        if piece and not _PIECE.fullmatch(piece):
            raise DataError(f"piece {piece!r}: its name must have 1 to 64 letters, digits, - and _")
        self.url, self.piece, self.shard_bytes = url, piece, shard_bytes
        self.encodings = dict(encodings or {})
        self.tasks: dict[str, TaskSpec] = {}
        self._layouts: dict[str, RowLayout] = {}
        self._chosen: dict[str, dict[str, Encoding]] = {}
        for task in tasks:
            self.add_task(task)
        self._store = Store(url)
        if not piece and self._store.exists(DATASET):
            raise FileExistsError(f"{url} is already a dataset; append to it or choose another folder")
        self._scratch = Path(tempfile.mkdtemp(prefix="tiphys-shards-", dir=scratch or None))
        self._table = table.TableWriter(self._scratch)
        self._statistics = Statistics()
        self._shards: list[table.Shard] = []
        self._tar: _Tar | None = None
        self._uploader = ThreadPoolExecutor(1, "tiphys-upload")
        self._uploads: list[Future[None]] = []
        self._closed = False
        self._folder = folder
        self.others: dict[str, table.Shard] = {}  # files that `write` was told to hold packets
        self.more: dict[str, Any] = {}  # further keys of dataset.json

    def add_task(self, task: TaskSpec) -> None:
        """Allow episodes of one more task.

        Raises DataError if its fields cannot be stored, or a different task of this name was added before.
        """
        task = TaskSpec(**json.loads(to_json(task.to_dict(), default=plain)))  # bounds may be NumPy scalars
        known = self.tasks.get(task.name)
        if known is not None and known != task:
            raise DataError(f"task {task.name!r} is declared twice, with different fields or scores")
        check_task(task)
        layout = self._layouts[task.name] = RowLayout(task)
        self._chosen[task.name] = {f.name: codecs.choose(f, self.encodings) for f in layout.large}
        self.tasks[task.name] = task

    def write(self, episode: Episode, packets: Mapping[str, PacketChunks] | None = None) -> None:
        """Add one episode.

        Parameters
        ----------
        episode : Episode
            With all fields of its task, except those of `packets`.
        packets : Mapping[str, PacketChunks], optional
            Field -> its video samples, which stay where they are. `others` must name their shards before `close`.

        Raises
        ------
        DataError
            If the episode does not fit its task, or the task was not added. Nothing of it is written; writing can go on.
        OSError
            If a disk is full (then the writer has aborted), or an upload failed.
        """
        if self._closed:
            raise ValueError(f"the writer of {self.url} is closed")
        layout = self._layouts.get(episode.task)
        if layout is None:
            raise DataError(f"episode {episode.id!r}: task {episode.task!r} was not declared; call add_task first")
        try:
            sample = Sample(layout, episode, self._chosen[episode.task], packets)
        except UnicodeEncodeError as error:
            raise DataError(f"episode {ascii(episode.id)[:80]}: a text is not valid Unicode: {error}") from None
        with self._full_disk():
            if self._tar is not None and self._tar.size + sample.bytes > self.shard_bytes and self._tar.samples:
                self._finish_shard()
            if self._tar is None:
                stem = f"{self.piece}-{len(self._shards):06d}" if self.piece else f"{len(self._shards):06d}"
                self._tar = _Tar(self._scratch / f"{stem}.tar", stem, self._folder)
            record = self._tar.add(sample)
            self._table.add(record)
        self._statistics.add(layout, episode.id, sample.rows)

    def _finish_shard(self) -> None:
        """Close the shard and upload it while the next one is being written."""
        tar, self._tar = self._tar, None
        assert tar is not None
        self._shards.append(tar.close())
        self._wait_for_uploads(1)
        self._uploads.append(self._uploader.submit(self._upload, self._shards[-1].name, tar.file))

    def _upload(self, name: str, file: Path) -> None:
        self._store.upload(name, str(file))
        file.unlink()

    def _wait_for_uploads(self, most: int) -> None:
        """Wait until at most `most` shards are being uploaded. Raises the exception of an upload that failed."""
        while len(self._uploads) > most:
            self._uploads.pop(0).result()

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
                f"no space left while writing {self.url} (scratch folder {self._scratch.parent}); no dataset was made. "
                "Free some space, or choose another scratch folder or smaller shards, then run it again",
            ) from error

    def close(self) -> EpisodeIndex:
        """Upload the last shard, then the index; `dataset.json` comes last.

        Returns
        -------
        EpisodeIndex
            The dataset's index, or the index of this piece alone if a piece is written.
        """
        if self._closed:
            raise ValueError(f"the writer of {self.url} is closed")
        try:
            with self._full_disk():
                return self._close()
        finally:
            self.abort()

    def _close(self) -> EpisodeIndex:
        if self._tar is not None:
            self._finish_shard()
        index = self._scratch / INDEX
        self._table.finish(index, list(self.tasks.values()), [*self._shards, *self.others.values()])
        self._wait_for_uploads(0)
        if not self.piece:
            publish(self._store, index, self._statistics, **self.more)
            return EpisodeIndex.open(self.url)
        statistics = self._scratch / STATISTICS
        self._statistics.write(statistics)
        self._store.upload(f"pieces/{self.piece}.statistics.parquet", str(statistics))
        self._store.upload(f"pieces/{self.piece}.parquet", str(index))
        return local_index(self.url, index, self._statistics)

    def abort(self) -> None:
        """Stop and remove the scratch folder. Shards that were uploaded stay, but are not a dataset. No effect after `close`."""
        self._closed = True
        self._uploader.shutdown(cancel_futures=True)
        if self._tar is not None:
            self._tar.discard()
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
    """Make a dataset of its pieces: of all in the folder, or of the named ones, in the order of their names.

    The pieces stay, so that more can be written and merged again. Raises FileNotFoundError if there is no piece, or a named one
    is missing, and DataError if two pieces declare a task of the same name differently.
    """
    from tiphys.dataio.storage import Store

    store = Store(url)
    names = sorted(pieces) or sorted(
        Path(p).stem for p in store.list("pieces") if p.endswith(".parquet") and not p.endswith(".statistics.parquet")
    )
    if not names:
        raise FileNotFoundError(f"{url} has no pieces to merge")
    scratch = Path(tempfile.mkdtemp(prefix="tiphys-merge-"))
    try:
        with ThreadPoolExecutor(16) as pool:  # the files are small, so latency dominates
            files = list(pool.map(lambda name: _fetch_piece(store, name, scratch), names))
        tasks: dict[str, TaskSpec] = {}
        shards: list[table.Shard] = []
        statistics = Statistics()
        for name, (file, sketches) in zip(names, files):
            limited.check_table(file, f"{url}/pieces/{name}.parquet")
            own_tasks, own_shards = table.read_tasks_and_shards(file)
            merge_tasks(tasks, own_tasks, f"piece {name}")
            shards += own_shards
            statistics.merge(limited.read_statistics(sketches, f"{url}/pieces/{name}.statistics.parquet"))
        parts = [table.Part(file) for file, _ in files]
        index = scratch / INDEX
        table.combine(parts, index, list(tasks.values()), shards)
        publish(store, index, statistics)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EpisodeIndex.open(url)


def _fetch_piece(store: Store, name: str, scratch: Path) -> tuple[Path, Path]:
    """Download the index and the statistics of a piece; returns both files."""
    folder = scratch / "pieces"
    folder.mkdir(exist_ok=True)
    file, sketches = folder / f"{name}.parquet", folder / f"{name}.statistics.parquet"
    fetch(store, f"pieces/{name}.parquet", file)
    fetch(store, f"pieces/{name}.statistics.parquet", sketches)
    return file, sketches


def merge_tasks(tasks: dict[str, TaskSpec], more: Sequence[TaskSpec], source: str) -> None:
    """Add `more` to `tasks`. Raises DataError if a task of the same name is already there and differs."""
    for task in more:
        if tasks.setdefault(task.name, task) != task:
            raise DataError(
                f"{source}: task {task.name!r} has other fields or scores here than in a dataset or piece before it; "
                "rename one of the two tasks"
            )


def local_index(url: str, file: Path, statistics: Statistics) -> EpisodeIndex:
    """The index in a local file, decoded in memory."""
    document = parse(to_json(dataset_document(file, statistics)).encode(), url)
    names = [t.name for t in document["tasks"]], [s.name for s in document["shards"]]
    return EpisodeIndex(url, document, arrays.decode(file, None, *names), document["digests"][INDEX][:32])


class _Tar:
    """One shard in the scratch folder. Offsets are computed from the sizes of the members.

    The tar is that of webdataset's TarWriter, whose import brings torch: seconds and hundreds of MiB in each process.
    """

    def __init__(self, file: Path, stem: str, folder: str) -> None:
        self.file, self.stem = file, stem
        self.name = f"{folder}/{file.name}"
        self.size = 0  # bytes of the members so far, with headers and padding
        self.samples = 0
        self.stream = _ChecksummedFile(file)
        self._writer: Any = tarfile.open(fileobj=cast(Any, self.stream), mode="w|")  # noqa: SIM115 (closed by close)

    def add(self, sample: Sample) -> table.Record:
        begin = self.size
        key = f"{self.stem}/{self.samples:06d}"
        data: dict[str, int] = {}
        for member, content in sorted(sample.members.items()):
            info = tarfile.TarInfo(
                f"{key}.{member}"
            )  # times and owners are fixed: the same episodes give the same bytes
            info.size = len(content)
            self._writer.addfile(info, io.BytesIO(content))
            data[member] = self.size + _header_bytes(info.name)
            self.size = data[member] + -(-len(content) // BLOCK) * BLOCK
        self._writer.members = []  # tarfile would keep all members in memory
        if self._writer.offset != self.size:
            raise RuntimeError(f"{self.file.name}: the tar is at byte {self._writer.offset}, not {self.size}")
        self.samples += 1
        e, steps = sample.episode, sample.members["steps.npy"]
        chunks = {
            field: table.Chunks(
                kind, rows, [data[m] + at for m, at, _, _ in c], [s for _, _, s, _ in c], [k for *_, k in c]
            )
            for field, (kind, rows, c) in sample.chunks.items()
        }
        packets = {
            name: p._replace(offset=p.offset + data[f"{name}.mp4"]) if name in sample.videos else p
            for name, p in sample.packets.items()
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
            packets=packets,
        )

    def discard(self) -> None:
        self.stream.discard()
        self._writer.close()

    def close(self) -> table.Shard:
        self._writer.close()
        self.stream.close()
        return table.Shard(self.name, self.stream.size, self.stream.crc)


def _header_bytes(name: str) -> int:
    """Bytes of a member's header. A name longer than 100 characters needs more blocks."""
    return BLOCK if len(name) <= 100 else len(tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT))


class _ChecksummedFile:
    """A file that tracks the size and the CRC-32C of what was written to it."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "wb")  # noqa: SIM115 (closed by close)
        self.size = self.crc = 0

    def write(self, data: bytes) -> int:
        if self._file.closed:  # discarded, but tarfile still writes the end of the archive
            return len(data)
        self.crc = crc32c(data, self.crc)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        """Close the file, ignoring errors of a full disk. Later writes are ignored."""
        with suppress(OSError):
            self._file.close()
