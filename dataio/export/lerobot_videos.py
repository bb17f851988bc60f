"""Videos of a LeRobot export: the samples of kept videos one after the other. None is decoded, and no byte of one changes.

LeRobot finds the picture of a row by its time: `from_timestamp` of the episode and camera, and `timestamp` of the row. One of its
decoders also takes time · fps as the picture's number, so each picture takes one place of 1/fps seconds. Pictures that an episode
needs only for decoding (those before its first row, back to the beginning of their group) take places too, before
`from_timestamp`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format.mp4 import read_track
from tiphys.dataio.format.mp4_writer import header
from tiphys.dataio.format.packet_table import PacketTable
from tiphys.dataio.format.packets import begins_anew, changes_parameters
from tiphys.dataio.format.places import Range
from tiphys.dataio.format.video_stream import Stream
from tiphys.dataio.index import EpisodeIndex

if TYPE_CHECKING:
    from typing_extensions import Buffer

Ints = NDArray[np.int64]
FILE_BYTES = 200 << 20  # of a video file, about; LeRobot's own
CHUNK_FILES = 1000  # files of a folder
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_TICKS = 512  # of a picture, if its time scale can be so fine
_TIME_SCALES = 1 << 31


class Samples(NamedTuple):
    """The n samples that the rows of an episode need, in the order of decoding.

    offset, size  int64 [n]: bytes of the shard
    rank          int64 [n]: place in the order in which pictures are shown
    sync          bool [n]: whether decoding can start there
    frame         int64 [T]: place of each row's picture, as `rank` counts it
    """

    offset: Ints
    size: Ints
    rank: Ints
    sync: NDArray[np.bool_]
    frame: Ints


def samples_of(table: PacketTable, episode: int, rows: int) -> Samples:
    """The samples of an episode with so many rows, each once."""
    offset, size, rank, sync, frame = list[Ints](), list[Ints](), list[Ints](), list[NDArray[np.bool_]](), list[Ints]()
    first, end = (int(x) for x in table.first[episode : episode + 2])
    before = reach = 0  # samples so far, and where the last of them ends
    for chunk in range(first, end):
        found = table.chunk_samples(episode, chunk)
        begin = found.begin + int(table.offset[chunk])
        again = int(np.searchsorted(begin, reach))  # samples that the chunk before has too
        row, stop = int(table.row[chunk]), int(table.row[chunk + 1]) if chunk + 1 < end else rows
        shown = table.part("frame", episode, row, stop - row)
        if shown is None:
            shown = int(table.lead[chunk]) + np.arange(stop - row)
        offset.append(begin[again:])
        size.append(found.size[again:])
        rank.append(found.rank[again:].astype(np.int64) + before - again)
        sync.append(np.arange(len(begin) - again) == 0)
        frame.append(np.asarray(shown, np.int64) + before - again)
        before, reach = before + len(begin) - again, int(begin[-1] + found.size[-1])
    ranks, frames = np.concatenate(rank), np.concatenate(frame)
    last = int(np.flatnonzero(ranks <= frames[-1])[-1]) + 1
    places = np.sort(ranks[:last])
    return Samples(
        np.concatenate(offset)[:last],
        np.concatenate(size)[:last],
        np.searchsorted(places, ranks[:last]),
        np.concatenate(sync)[:last],
        np.searchsorted(places, frames),
    )


def why_not(index: EpisodeIndex, field: FieldSpec, numbers: Sequence[int]) -> str:
    """Why the videos of a field cannot be copied for these episodes; empty if they can."""
    table = index.packets(field.name)
    assert table is not None
    sizes = set()
    for number in numbers:
        where, rows = f"episode {index.id(number)!r}", int(index.rows[number])
        if not table.has(number):
            return f"{where} has no video of it"
        if rows != index.steps[number] and field.name in index.short(number):
            return f"{where} has no picture after its last action, but a row there"
        steps = np.flatnonzero(np.diff(samples_of(table, number, rows).frame) != 1)
        if len(steps):
            return f"row {steps[0] + 1} of {where} does not show the picture after that of the row before it"
        stream = Stream.from_entry(table.entry(number), index.url)
        sizes.add((stream.height, stream.width))
    return f"its videos have several sizes: {sorted(sizes)}" if len(sizes) > 1 else ""


def frames_per_second(index: EpisodeIndex, field: str, number: int) -> float:
    """Of the video of an episode, as its MP4 states the times of pictures."""
    table = index.packets(field)
    assert table is not None
    elsewhere, first = int(table.shard[number]), int(table.first[number])
    begin, size = 0, 0
    shard = elsewhere if elsewhere >= 0 else int(index.shard[number])
    name, where = index.shard_name(shard), f"the video {field} of episode {index.id(number)!r}"

    def read(offset: int, count: int) -> Buffer:
        return index.store.read_ranges(name, [begin + offset], [count])[0]

    if elsewhere >= 0:
        size = index.shards[shard].size
    else:  # what lies in the shard before the first of its samples ends with the MP4's tables
        sample, length = index.sample_range(number)
        head = bytes(index.store.read_ranges(name, [sample], [int(table.offset[first]) - sample])[0])
        begin = sample + head.rindex(b"ftyp") - 4
        size = sample + length - begin
    track = read_track(read, size, where)  # type: ignore[arg-type]
    gaps = np.diff(track.pts[track.order])
    if not len(gaps):
        return 10.0
    rate = Fraction(track.timescale, int(np.median(gaps))).limit_denominator(1001)
    return float(rate)


def payloads(index: EpisodeIndex, field: FieldSpec, number: int, samples: Samples) -> list[memoryview]:
    """The bytes of samples. Raises DataError if those of a chunk do not have the CRC-32C that the index has."""
    rows = int(index.rows[number])
    (place,) = (r for r in index.ranges(number, 0, rows, [field.name]) if r.field == field.name)
    data = memoryview(index.read([place])[0]).cast("B")
    for chunk in index.chunks(number, field, 0, rows):
        part = Range(place.shard, chunk.offset, chunk.size, field.name)
        index.check_chunk(number, part, chunk, data[chunk.offset - place.offset :][: chunk.size])
    begins = (samples.offset - place.offset).tolist()
    return [data[at : at + size] for at, size in zip(begins, samples.size.tolist(), strict=True)]


class VideoWriter:
    """Writes the files of one camera.

    folder  of the export
    key     the camera's feature
    fps     pictures per second

    `stream` is that of the first video.
    """

    def __init__(self, folder: Path, key: str, fps: float) -> None:
        rate = Fraction(fps).limit_denominator(100_000)
        ticks = _TICKS if rate.numerator * _TICKS < _TIME_SCALES else 1
        if abs(float(rate) / fps - 1) > 1e-9 or rate.numerator * ticks >= _TIME_SCALES:
            raise DataError(f"fps {fps}: an MP4 cannot state it exactly")
        self._folder, self._key, self._fps = folder, key, fps
        self._scale, self._tick = rate.numerator * ticks, rate.denominator * ticks
        self.files: list[str] = []
        self.stream: Stream | None = None
        self._stream: Stream | None = None  # of the open file; None: there is none
        self._body = folder  # file of the samples of the open file, whose header is written when it is complete
        self._bytes = 0  # in it
        self._sizes: list[Ints] = []
        self._ranks: list[Ints] = []
        self._syncs: list[NDArray[np.bool_]] = []
        self._pictures = 0  # of the open file

    def add(self, stream: Stream, samples: Samples, data: Sequence[memoryview]) -> dict[str, Any]:
        """Append an episode; returns its cells of the table of episodes."""
        size = int(samples.size.sum())
        full = self._bytes + size > FILE_BYTES
        if self._stream is None or full or self._stream.digest != stream.digest or not begins_anew(stream, data[0]):
            self.close()
            self._open(stream)
        with self._body.open("ab") as body:
            body.writelines(data)
        self._bytes += size
        first = self._pictures
        self._sizes.append(samples.size)
        self._ranks.append(samples.rank + first)
        self._syncs.append(samples.sync)
        self._pictures += len(samples.size)
        chunk, file = divmod(len(self.files) - 1, CHUNK_FILES)
        base = f"videos/{self._key}"
        if changes_parameters(stream, data):  # the next episode must not be decoded with them
            self.close()
        return {
            f"{base}/chunk_index": chunk,
            f"{base}/file_index": file,
            f"{base}/from_timestamp": (first + int(samples.frame[0])) / self._fps,
            f"{base}/to_timestamp": (first + int(samples.frame[-1]) + 1) / self._fps,
        }

    def _open(self, stream: Stream) -> None:
        chunk, file = divmod(len(self.files), CHUNK_FILES)
        self.files.append(VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file))
        path = self._folder / self.files[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = stream
        self.stream = self.stream or stream
        self._body = path.with_suffix(".samples")
        self._bytes = self._pictures = 0

    def close(self) -> None:
        """Complete the open file."""
        if self._stream is None:
            return
        ranks = np.concatenate(self._ranks)
        decoded = np.arange(len(ranks))
        delay = int((decoded - ranks).max())  # so that no picture is shown before it is decoded
        head = header(
            self._stream,
            self._scale,
            np.concatenate(self._sizes),
            decoded * self._tick,
            (ranks + delay) * self._tick,
            np.concatenate(self._syncs),
            np.ones(len(ranks), bool),
            self._tick,
        )
        with self._body.open("rb") as body, (self._folder / self.files[-1]).open("wb") as out:
            out.write(head)
            shutil.copyfileobj(body, out, 1 << 20)
        self._body.unlink()
        self._stream = None
        self._sizes, self._ranks, self._syncs = [], [], []

    def feature(self, channels: int) -> dict[str, Any]:
        """The camera's entry of info.json."""
        stream = self.stream
        assert stream is not None
        return {
            "dtype": "video",
            "shape": [stream.height, stream.width, channels],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": stream.height,
                "video.width": stream.width,
                "video.codec": stream.codec,
                "video.pix_fmt": stream.pix_fmt,
                "video.is_depth_map": False,
                "video.fps": self._fps,
                "video.channels": channels,
                "has_audio": False,
            },
        }


__all__ = ["VIDEO_PATH", "Samples", "VideoWriter", "frames_per_second", "payloads", "samples_of", "why_not"]
