"""`index_lerobot` makes an index of a LeRobot dataset: rows are copied into tars of our own, videos stay where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from urllib.parse import quote

import numpy as np
from crc32c import crc32c

from tiphys.dataio.convert.converter import BadEpisode, Item
from tiphys.dataio.convert.infer import conform
from tiphys.dataio.convert.process import Plan, Reader
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.format.frame_times import TOLERANCE
from tiphys.dataio.format.mp4 import read_track
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.format.table import Shard
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.chunks import Video
from tiphys.dataio.inplace.source import VIDEOS
from tiphys.dataio.messages import redacted
from tiphys.dataio.shards import ShardWriter
from tiphys.dataio.storage import ObjectChanged, Store
from tiphys.dataio.stores.hub import endpoint
from tiphys.paths import absolute

SOURCE = "source"  # key of dataset.json: what was indexed
INFO = "meta/info.json"
_READER = "tiphys.dataio.inplace.source:LeRobotInPlace"
_THREADS = 16  # files whose tables are read at once
_TOGETHER = 32  # episodes whose videos are opened together
_OPEN = 256  # videos whose tables are kept
_MAX_NOTES = 1000  # episodes that are listed in dataset.json
_CRC_BYTES = 8 << 20  # bytes that are read at once for CRCs


@dataclass(frozen=True)
class IndexOptions:
    """How a LeRobot dataset is indexed.

    crc        read every byte of the videos and store a CRC-32C of each chunk
    tolerance  seconds between the time of a row and that of its picture
    skip_bad   leave out and list malformed episodes; otherwise the first one raises DataError
    """

    crc: bool = False
    tolerance: float = TOLERANCE
    skip_bad: bool = False


def index_lerobot(
    source: str,
    destination: str,
    options: IndexOptions = IndexOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeIndex:
    """Index a LeRobot dataset (v2.0, v2.1 or v3.0) as a dataset whose videos stay where they are.

    The dataset is the one that `convert` would make, with the same ids, tasks, rows and statistics, but its pictures are decoded
    from the source's MP4 files. The source is never written to, and must stay. Totals and splits of its metadata are not
    believed: `notes` in dataset.json say where they differ from the rows.

    Parameters
    ----------
    source : str
        Folder or URL. A dataset on a hub is pinned to the commit that it has now.
    destination : str
        Folder of the index, in any store; not that of the source.
    options : IndexOptions
    progress : callable, optional
        Called with (episodes done, episodes in total).

    Raises
    ------
    DataError
        If an episode is malformed (unless `skip_bad`), no episode is left, or the source is none that can be read in place.
    FileExistsError
        If the destination holds a dataset already.
    """
    source = pinned(source)
    if absolute(destination) == absolute(source):
        raise DataError(f"{source}: the index must not be written into its source; choose another folder")
    with Reader(source, _READER) as reader, ThreadPoolExecutor(_THREADS, "tiphys-index") as threads:
        plan = reader.plan()
        builder = _Builder(source, plan, options, threads)
        with ShardWriter(destination, plan.tasks, folder="rows") as writer:
            total, done = builder.episodes(), 0
            items = (item for piece in plan.pieces for item in reader.episodes(piece))
            while batch := list(islice(items, _TOGETHER)):
                builder.open(batch)
                for item in batch:
                    builder.add(item, writer)
                done += len(batch)
                if progress is not None:
                    progress(done, max(total, done))
            builder.close(writer)
            return writer.close()


class _Builder:
    """Adds the episodes of a source to a writer."""

    def __init__(self, source: str, plan: Plan, options: IndexOptions, threads: ThreadPoolExecutor) -> None:
        self.source, self.plan, self.options, self.threads = source, plan, options, threads
        self.store, self.base = Store(source), absolute(source)
        self.info = self.store.read(INFO)
        self.tasks = {task.name: task for task in plan.tasks}
        fps = frames_per_second(self.info, f"{source}/{INFO}")
        if not 0 < options.tolerance <= 0.25 / fps:
            raise DataError(
                f"tolerance {options.tolerance}: it must be above 0 and at most a quarter of the time between two pictures, "
                f"{0.25 / fps:.6g} s"
            )
        self._videos: dict[str, Future[Video]] = {}
        self._shards: dict[str, Shard] = {}
        self._bad: list[BadEpisode] = []
        self._written = 0

    def episodes(self) -> int:
        return sum(int(piece.data.get("count", 0)) for piece in self.plan.pieces)

    def open(self, items: list[Item]) -> None:
        """Begin to read the tables of the videos of some episodes."""
        for item in items:
            if isinstance(item, Episode):
                for path, _ in item.info[VIDEOS].values():
                    if path not in self._videos:
                        self._videos[path] = self.threads.submit(self._open, str(path))
        for path in list(self._videos)[: max(len(self._videos) - _OPEN, 0)]:
            self._videos.pop(path)

    def _open(self, path: str) -> Video:
        where = f"{self.source}/{path}"
        about = self.store.head(path)

        def read(offset: int, size: int) -> bytes:
            (data,) = self.store.read_ranges(path, [offset], [size], about.size)
            return bytes(data)

        track = read_track(read, about.size, where)
        folder, slash, last = path.rpartition("/")
        name = f"{self.base}/{quote(folder) if self.store.local else folder}{slash}{last}"
        # a local file has another ETag on each machine, and the fingerprint must not
        self._shards[name] = Shard(name, about.size, -1, "" if self.store.local else about.etag)
        return Video(track, name, where)

    def add(self, item: Item, writer: ShardWriter) -> None:
        if isinstance(item, BadEpisode):
            self._reject(item)
            return
        where = f"{self.source}, episode {item.id}"
        try:
            packets = self._packets(item, where)
            info = {k: v for k, v in item.info.items() if k != VIDEOS}
            rows = replace(item, fields={k: v for k, v in item.fields.items() if k not in packets}, info=info)
            task = self.tasks[item.task]
            small = replace(task, fields=tuple(f for f in task.fields if f.name not in packets))
            writer.write(conform(rows, small, where), packets)
        except DataError as error:
            self._reject(BadEpisode(where, str(error).removeprefix(where + ": ")))
            return
        for one in packets.values():
            writer.others[one.shard] = self._shards[one.shard]
        self._written += 1

    def _packets(self, episode: Episode, where: str) -> dict[str, PacketChunks]:
        found, out = {}, {}
        for field, (path, start) in episode.info[VIDEOS].items():
            if field not in episode.fields:  # dropped
                continue
            video = self._video(path)
            found[field] = video, video.frames(start, episode.fields[field], self.options.tolerance, where)
            height, width, channels = self._shape(episode.task, field)
            stream = video.track.stream
            if (stream.height, stream.width) != (height, width):
                raise DataError(
                    f"{where}, video {video.where}: has pictures of {stream.height} × {stream.width}, but those of the first "
                    f"video have {height} × {width}"
                )
            assert channels in (1, 3)
        for field, (video, frames) in found.items():
            video.take(frames, episode.id)
            out[field] = self._checked(video.chunks(frames), str(episode.info[VIDEOS][field][0]))
        return out

    def _shape(self, task: str, field: str) -> tuple[int, ...]:
        return self.tasks[task].field(field).shape

    def _video(self, path: str) -> Video:
        if path not in self._videos:
            self._videos[path] = self.threads.submit(self._open, path)
        try:
            return self._videos[path].result()
        except FileNotFoundError:
            raise DataError(f"{self.source}/{path}: is missing, though the metadata list it") from None

    def _checked(self, chunks: PacketChunks, path: str) -> PacketChunks:
        """With CRCs, if they are asked for."""
        if not self.options.crc:
            return chunks
        crcs: list[int] = []
        pairs = list(zip(chunks.offset.tolist(), chunks.size.tolist(), strict=True))
        while pairs:
            count, size = 0, 0
            while count < len(pairs) and (not count or size + pairs[count][1] <= _CRC_BYTES):
                size, count = size + pairs[count][1], count + 1
            some, pairs = pairs[:count], pairs[count:]
            data = self.store.read_ranges(path, [o for o, _ in some], [s for _, s in some])
            crcs += [crc32c(one) for one in data]
        return chunks._replace(crc=np.array(crcs, np.uint32))

    def _reject(self, bad: BadEpisode) -> None:
        if not self.options.skip_bad:
            raise DataError(f"{bad}. Use --skip-bad to leave such episodes out and list them")
        self._bad.append(bad)

    def close(self, writer: ShardWriter) -> None:
        """Tell the writer what dataset.json says about the source. Raises DataError if there is no episode."""
        if not self._written:
            reasons = "; ".join(map(str, self._bad[:3])) or "the source has none"
            raise DataError(f"{self.source}: no episode can be indexed ({reasons})")
        if hashlib.sha256(self.store.read(INFO)).digest() != hashlib.sha256(self.info).digest():
            raise ObjectChanged(f"{self.source}: {INFO} was replaced while it was being indexed; index it again")
        writer.more[SOURCE] = {
            "format": "lerobot",
            "url": self.base,
            "info": hashlib.sha256(self.info).hexdigest(),
            "tolerance": self.options.tolerance,
            "crc": self.options.crc,
        }
        writer.more["skipped"] = len(self._bad)
        writer.more["notes"] = [*self.plan.notes, *map(str, self._bad)][:_MAX_NOTES]


def frames_per_second(info: bytes, where: str) -> float:
    """`fps` of info.json. Raises DataError if it has none."""
    import json

    try:
        fps = float(json.loads(info)["fps"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: has no `fps`") from None
    if not fps > 0:
        raise DataError(f"{where}: fps {fps} is not positive")
    return fps


def pinned(url: str) -> str:
    """A dataset on a hub, with the commit that it has now; any other URL as it is.

    Raises DataError if the hub does not have it.
    """
    if not url.startswith("hf://datasets/"):
        return url.rstrip("/") or "/"
    from huggingface_hub import HfApi

    name, _, revision = url.removeprefix("hf://datasets/").rstrip("/").partition("@")
    if name.count("/") != 1:
        raise DataError(f"{url}: expected hf://datasets/OWNER/NAME, with @REVISION if it is not the newest one")
    try:
        commit = HfApi(endpoint=endpoint()).dataset_info(name, revision=revision or None).sha
    except OSError as error:  # also if it does not exist
        reason = redacted((str(error) or type(error).__name__).splitlines()[0])
        raise DataError(f"{url}: the hub does not give this dataset: {reason}") from None
    return f"hf://datasets/{name}@{commit}"


__all__ = ["IndexOptions", "index_lerobot", "pinned"]
