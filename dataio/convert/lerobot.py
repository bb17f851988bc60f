"""LeRobot v2.0, v2.1 and v3.0: Parquet rows, MP4 videos or encoded images, tasks as text.

https://github.com/huggingface/lerobot, `lerobot/datasets`. v2 has one Parquet file per episode and one video per episode
and camera. v3 packs many episodes into each file and lists their places in `meta/episodes`. Frames are found by time,
as in LeRobot, and must be within a quarter of the time between two frames. The option `resize: [height, width]` resizes
pictures while they are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt
from tiphys.dataio.convert.exported import restore, tasks_of
from tiphys.dataio.convert.infer import canonical, field_spec, texts
from tiphys.dataio.convert.lerobot_cameras import Camera, Found, camera, is_depth, resized, stated_shape
from tiphys.dataio.convert.lerobot_rows import EpisodeRows
from tiphys.dataio.convert.limits import EPISODE_STEPS, RECORD_BYTES, check_shape, decode_image, parse_json
from tiphys.dataio.convert.parquet import batches, open_parquet, read_columns, to_rows, values
from tiphys.dataio.convert.source import Source, expand
from tiphys.dataio.convert.video import VideoFrames, frame_size
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.mp4 import read_track
from tiphys.dataio.inplace.chunks import Video
from tiphys.dataio.inplace.kept import KeptVideo, keep

_BOOKKEEPING = (
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)  # follow from the row's position
_SCALARS = ("reward", "terminated", "truncated")
_INFO = "meta/info.json"
_PIECE_ROWS = 20_000  # of one piece of a v2 source, about
_INSTRUCTION = "instruction"
EXPORTED = "tiphys"  # what our export adds to info.json and to the table of episodes
_TOLERANCE = 0.25  # of the time between two frames: how far a frame may be from the time of its row
_TRIES = 3  # files that are opened to see what a camera's pictures are
VALID = "valid"  # the feature that our export adds to the rows


@dataclass(frozen=True)
class Record:
    """An episode as the metadata lists it.

    data      the Parquet file of its rows
    videos    camera -> (video file, seconds into it at which the episode begins); without cameras of which no file is named
    exported  JSON that our export stored (see `tiphys.dataio.convert.exported`)
    """

    number: int
    length: int
    tasks: tuple[str, ...]
    data: str
    videos: Mapping[str, tuple[str, float]]
    exported: str = ""


class LeRobot(Converter):
    name = "lerobot"
    options_known = frozenset({"resize"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        if not source.exists(_INFO):
            return 0.0
        return 1.0 if "codebase_version" in source.json(_INFO) else 0.0

    @cached_property
    def info(self) -> dict[str, Any]:
        info = self.source.json(_INFO)
        version = str(info.get("codebase_version", "")) if isinstance(info, dict) else ""
        if version not in ("v2.0", "v2.1", "v3.0"):
            raise DataError(
                f"{self.source.where(_INFO)}: LeRobot format {version!r} is not supported; use v2.0, v2.1 or v3.0"
            )
        if not isinstance(info.get("features"), dict) or not _is_positive(info.get("fps")):
            raise DataError(f"{self.source.where(_INFO)}: needs `features` and a positive `fps`")
        for key, feature in info["features"].items():
            if not isinstance(feature, dict) or not isinstance(feature.get("shape"), list):
                raise DataError(f"{self.source.where(_INFO)}: feature {key!r} has no shape")
            check_shape(feature["shape"], 1, f"{self.source.where(_INFO)}, feature {key!r}")
        return info

    @property
    def _v3(self) -> bool:
        return str(self.info["codebase_version"]) == "v3.0"

    @cached_property
    def _exported(self) -> tuple[TaskSpec, dict[str, str]] | None:
        """The task and {field: feature} if the source was written by our export."""
        metadata = self.info.get(EXPORTED)
        if metadata is None:
            return None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("names"), dict):
            raise DataError(f"{self.source.where(_INFO)}: {EXPORTED!r} is not what an export writes")
        (task,) = tasks_of([metadata.get("task")], self.source.where(_INFO))
        return task, {str(k): str(v) for k, v in metadata["names"].items()}

    @cached_property
    def _features(self) -> dict[str, dict[str, Any]]:
        features = {k: f for k, f in self.info["features"].items() if k not in _BOOKKEEPING}
        return features if self._exported is not None else {k: features[k] for k in self._names}

    @cached_property
    def _names(self) -> dict[str, str]:
        """Feature -> field."""
        if self._exported is not None:
            return {key: field for field, key in self._exported[1].items()}
        usual = {k: canonical(k) for k in self.info["features"] if k not in _BOOKKEEPING}
        return self.names.fields(usual, self.source.where(_INFO))

    @cached_property
    def _videos(self) -> list[str]:
        return [k for k, f in self._features.items() if f.get("dtype") == "video"]

    @cached_property
    def _instructions(self) -> dict[int, str]:
        """task_index -> instruction."""
        if self._v3:
            table = read_columns(self.source, "meta/tasks.parquet")
            column = next((c for c in ("task", "__index_level_0__") if c in table), None)
            if column is None or "task_index" not in table:
                raise DataError(f"{self.source.where('meta/tasks.parquet')}: needs the columns task and task_index")
            rows: Any = zip(table["task_index"], table[column], strict=True)
        else:
            rows = ((r.get("task_index"), r.get("task")) for r in self.source.json_lines("meta/tasks.jsonl"))
        pairs = list(rows)
        if not all(isinstance(k, int) and isinstance(v, str) for k, v in pairs):
            raise DataError(f"{self.source.url}: the table of tasks does not map task_index to a text")
        return dict(pairs)

    @cached_property
    def _records(self) -> list[Record]:
        records = list(self._records_v3() if self._v3 else self._records_v2())
        if len({r.number for r in records}) != len(records):
            raise DataError(f"{self.source.url}: the metadata lists an episode twice")
        return sorted(records, key=lambda r: r.number)

    def _records_v2(self) -> Iterator[Record]:
        where = self.source.where(_INFO)
        data_path: Any = self.info.get("data_path")
        video_path: Any = self.info.get("video_path")
        chunk = self.info.get("chunks_size", 1000)
        if not _is_positive(chunk):
            raise DataError(f"{where}: chunks_size is {chunk!r}; a positive number is needed")
        for row in self.source.json_lines("meta/episodes.jsonl"):
            number, length, tasks = row.get("episode_index"), row.get("length"), row.get("tasks") or []
            if not (
                isinstance(number, int)
                and isinstance(length, int)
                and min(number, length) >= 0
                and isinstance(tasks, list)
            ):
                raise DataError(
                    f"{self.source.where('meta/episodes.jsonl')}: an episode lacks a valid index, length "
                    f"or list of tasks: {str(row)[:80]}"
                )
            numbers: dict[str, Any] = {"episode_index": number, "episode_chunk": number // chunk}
            videos = {k: (expand(video_path, where, video_key=k, **numbers), 0.0) for k in self._videos}
            data = expand(data_path, where, **numbers)
            yield Record(number, length, tuple(str(t) for t in tasks), data, videos)

    def _records_v3(self) -> Iterator[Record]:
        where = self.source.where(_INFO)
        data_path: Any = self.info.get("data_path")
        video_path: Any = self.info.get("video_path")
        columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        columns += [f"videos/{k}/{c}" for k in self._videos for c in ("chunk_index", "file_index", "from_timestamp")]
        columns += [EXPORTED] if self._exported else []
        for path in [p for p in self.source.files if re.fullmatch(r"meta/episodes/.*\.parquet", p)]:
            table = read_columns(self.source, path, columns)
            missing = sorted(set(columns) - set(table))
            if missing:
                raise DataError(f"{self.source.where(path)}: lacks the columns {', '.join(missing)}")
            for cells in zip(*(table[c] for c in columns), strict=True):
                row = dict(zip(columns, cells, strict=True))
                if not all(
                    _is_index(row[c]) for c in ("episode_index", "length", "data/chunk_index", "data/file_index")
                ):
                    raise DataError(f"{self.source.where(path)}: an episode lacks a valid index, length or place")

                def place(prefix: str, row: dict[str, Any] = row) -> dict[str, Any]:
                    return {"chunk_index": row[f"{prefix}/chunk_index"], "file_index": row[f"{prefix}/file_index"]}

                videos = {}
                for key in self._videos:
                    at, start = place(f"videos/{key}"), row[f"videos/{key}/from_timestamp"]
                    if all(map(_is_index, at.values())) and isinstance(start, int | float) and start >= 0:
                        videos[key] = (expand(video_path, where, video_key=key, **at), float(start))
                data = expand(data_path, where, **place("data"))
                tasks = tuple(str(t) for t in row["tasks"] or ())
                exported = str(row.get(EXPORTED) or "")
                yield Record(row["episode_index"], row["length"], tasks, data, videos, exported)

    def _field(self, key: str, feature: Mapping[str, Any]) -> FieldSpec:
        name, dtype, shape = self._names[key], str(feature.get("dtype")), list(feature["shape"])
        if key in self._cameras:
            return self._cameras[key].field
        if dtype == "string":
            return field_spec(name, "str", ())
        try:
            kind = np.dtype(dtype)
        except TypeError:
            kind = np.dtype("V")
        if kind.kind not in "biuf":
            raise DataError(f"{self.source.where(_INFO)}: feature {key!r} has dtype {dtype!r}, which is not supported")
        return field_spec(name, kind, [] if _is_scalar(name, kind, shape) else shape)

    @cached_property
    def _cameras(self) -> dict[str, Camera]:
        """The cameras, by feature. The first picture that can be read decides over the metadata."""
        out = {}
        for key, feature in self._features.items():
            if key in self._names and feature.get("dtype") in ("video", "image"):
                where, size = f"{self.source.where(_INFO)}, feature {key!r}", frame_size(self.options)
                out[key] = camera(self._names[key], feature, self._first_picture(key, feature, where), size, where)
        return out

    def _first_picture(self, key: str, feature: Mapping[str, Any], where: str) -> Found | None:
        """None if the first files of the camera cannot be read; the episodes in them are then reported as malformed."""
        video = feature.get("dtype") == "video"
        if self._names.get(key) in (None, *self.dropped):
            return None
        paths = dict.fromkeys(
            r.videos[key][0] if video else r.data for r in self._records if key in r.videos or not video
        )
        for path in islice(filter(self.source.exists, paths), _TRIES):
            found = attempt(partial(self._look, key, feature, path, where), where)
            if isinstance(found, Found):
                return found
        return None

    def _look(self, key: str, feature: Mapping[str, Any], path: str, where: str) -> Found:
        if feature.get("dtype") == "video":
            with self.source.open(path) as stream, VideoFrames(stream, self.source.where(path)) as frames:
                return Found.in_video(frames, stated_shape(feature, where)[2], is_depth(feature))
        with open_parquet(self.source, path) as file:
            batch = next(batches(file, [key], self.source.where(path), 1))
        return Found.in_image(self._image(values(batch.column(0), where)[0], where))

    def tasks(self) -> list[TaskSpec]:
        if self._exported is not None:
            return [self._exported[0]]
        fields = [self._field(k, f) for k, f in self._features.items()]
        several = any(len(r.tasks) > 1 for r in self._records)
        if _INSTRUCTION not in {f.name for f in fields}:
            fields.append(field_spec(_INSTRUCTION, "str", (), per="step" if several else "episode"))
        return [TaskSpec(self.source.name, tuple(fields))]

    def pieces(self) -> list[Piece]:
        """v3: one piece per data file. v2: consecutive episodes, about 20,000 rows in each piece."""
        groups: list[list[int]] = []
        rows, last = 0, ""
        for number, record in enumerate(self._records):
            full = record.data != last if self._v3 else rows + record.length > _PIECE_ROWS
            if not groups or full:
                groups.append([])
                rows = 0
            groups[-1].append(number)
            rows, last = rows + record.length, record.data
        return [Piece(f"{i:06d}", {"first": g[0], "count": len(g)}) for i, g in enumerate(groups)]

    def versions(self, piece: Piece) -> list[str]:
        records = self._records[piece.data["first"] :][: piece.data["count"]]
        names = dict.fromkeys(r.data for r in records)
        names.update(dict.fromkeys(v for r in records for v, _ in r.videos.values()))
        return [self.source.version(n) for n in names if self.source.exists(n)]

    def notes(self) -> list[str]:
        notes = [] if self._exported is not None else self._field_notes()
        total = self.info.get("total_episodes")
        if isinstance(total, int) and total != len(self._records):
            notes.append(f"info.json states {total} episodes, but the table of episodes lists {len(self._records)}")
        return notes

    def _field_notes(self) -> list[str]:
        notes = [c.note for c in self._cameras.values() if c.note]
        usual = {*_SCALARS, *(self._names[k] for k in self._cameras)}
        for key, feature in self._features.items():
            field = self._field(key, feature)
            if field.dtype != "str" and field.shape == () and field.name not in usual:
                notes.append(f"{key}: has shape [1] and whole numbers; it is stored as one number per step")
        return notes

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        records = self._records[piece.data["first"] :][: piece.data["count"]]
        dropped = {k for k in self._features if self._names.get(k) in (None, *self.dropped)}
        for key in self._features:
            if self._names.get(key) in self.kept and key not in self._videos:
                raise DataError(
                    f"mapping: {key!r} is no video in {self.source.url}, so `encoding: keep` cannot copy it"
                )
        with _OpenFiles(self.source, [*_BOOKKEEPING, *(self._features.keys() - dropped)]) as files:
            for number, record in enumerate(records):
                if number >= start:
                    item = attempt(partial(self._read, record, files), f"{self.source.url}, episode {record.number}")
                    if isinstance(item, BadEpisode):
                        files.close()
                    yield item

    def _read(self, record: Record, files: _OpenFiles) -> Episode:
        if not 0 < record.length <= EPISODE_STEPS:
            raise DataError(
                f"{self.source.url}, episode {record.number}: has {record.length:,} rows; "
                f"1 to {EPISODE_STEPS:,} are read"
            )
        wanted = {k: f for k, f in self._features.items() if self._names.get(k) not in (None, *self.dropped)}
        for key in wanted:
            if key in self._videos and key not in record.videos:
                raise DataError(
                    f"{self.source.url}, episode {record.number}: the metadata name no valid video of {key!r}"
                )
        for path in self._needed(record, wanted):
            if not self.source.exists(path):
                raise DataError(
                    f"{self.source.where(path)}: is missing, though the metadata lists episode {record.number}"
                )
        where = f"{self.source.where(record.data)}, episode {record.number}"
        table = files.rows(record, where)
        if self._exported is not None:
            return self._restore(record, table, *self._exported, files, where)
        fields = {self._names[k]: self._values(k, f, record, table, files, where) for k, f in wanted.items()}
        fields.setdefault(_INSTRUCTION, self._instruction(table, record, where))
        success = fields.get("success")
        return Episode(
            id=f"{self.source.name}/{record.number:06d}",
            task=self.source.name,
            fields=fields,
            steps=record.length,
            success=None if success is None or isinstance(success, str) else bool(np.any(success)),
        )

    def _needed(self, record: Record, wanted: Collection[str]) -> list[str]:
        """The files that hold an episode's features."""
        return [record.data, *(v for k, (v, _) in record.videos.items() if k in wanted)]

    def _values(
        self, key: str, feature: Mapping[str, Any], record: Record, table: Any, files: _OpenFiles, where: str
    ) -> Any:
        """[T, *shape]: the values of one feature, or a KeptVideo."""
        if key in record.videos:
            path, offset = record.videos[key]
            if self._names[key] in self.kept:
                stamps = np.asarray(column(table, "timestamp", where, ()), np.float32)
                return files.kept(path, key).part(offset, stamps, _TOLERANCE / float(self.info["fps"]), where)
            times = checked_cast(column(table, "timestamp", where, ()), np.float64, f"{where}, timestamp") + offset
            frames = files.video(path, self._cameras[key])
            return frames.at(times.tolist(), _TOLERANCE / float(self.info["fps"]))
        if key in self._cameras:
            return self._images(table, key, where, self._cameras[key])
        name, dtype = self._names[key], str(feature.get("dtype"))
        shape = () if dtype == "string" else tuple(feature["shape"])
        array = column(table, key, where, shape)
        if dtype == "string":
            return array
        return array.reshape(len(array)) if _is_scalar(name, np.dtype(dtype), list(shape)) else array

    def _restore(
        self, record: Record, table: Any, task: TaskSpec, names: dict[str, str], files: _OpenFiles, where: str
    ) -> Episode:
        """An episode that `tiphys.dataio.export.lerobot` wrote."""
        fields: dict[str, Any] = {}
        for field, key in names.items():
            feature = self._features.get(key)
            if feature is None:
                raise DataError(f"{where}: info.json has no feature {key!r}")
            if feature.get("dtype") == "image":
                images = self._images(table, key, where)
                shape = task.field(field).shape
                fields[field] = images[..., 0] if len(shape) == 2 else images
            elif feature.get("dtype") == "video":
                fields[field] = self._values(key, feature, record, table, files, where)
            else:
                fields[field] = column(table, key, where, task.field(field).shape)
        return restore(parse_json(record.exported, f"{where}, {EXPORTED}"), fields, task, where)

    def _instruction(self, table: Any, record: Record, where: str) -> Any:
        """The text of the rows' task_index: one text, or one per row if it changes."""
        if "task_index" not in table.schema.names:
            return record.tasks[0] if record.tasks else ""
        indices = column(table, "task_index", where, ())
        unknown = set(np.unique(indices).tolist()) - set(self._instructions)
        if unknown:
            raise DataError(f"{where}: task_index {sorted(unknown)[0]} is not in the table of tasks")
        rows = texts((self._instructions[int(i)] for i in indices), where)
        return str(rows[0]) if bool(np.all(rows == rows[0])) else rows

    def _image(self, value: Any, where: str) -> np.ndarray:
        """[H, W, C]: the image in a cell, which holds it or names its file."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            data = self.source.read(str(value["path"]), RECORD_BYTES)
        if not isinstance(data, bytes):
            raise DataError(f"{where}: has no image")
        return decode_image(data, where, tiff=True)

    def _images(self, table: Any, key: str, where: str, shown: Camera | None = None) -> np.ndarray:
        if key not in table.schema.names:
            raise DataError(f"{where}: lacks the column {key!r}")
        frames: list[np.ndarray] = []
        for row, value in enumerate(values(table.column(key), f"{where}, {key}")):
            place = f"{where}, {key}, row {row}"
            frames.append(resized(self._image(value, place), None if shown is None else shown.size))
            check_shape((len(table), *frames[0].shape), frames[0].itemsize, place)
            if frames[-1].shape != frames[0].shape:
                raise DataError(f"{place}: the image has shape {frames[-1].shape}, but row 0 has {frames[0].shape}")
        return np.stack(frames)


class _OpenFiles:
    """The Parquet and video files of a piece. They stay open while consecutive episodes use them."""

    def __init__(self, source: Source, columns: Collection[str]):
        self._source, self._columns = source, columns
        self._open: dict[str, tuple[str, ExitStack, Any]] = {}

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Needed after an error too, because their positions are then unknown."""
        for _, stack, _ in self._open.values():
            stack.close()
        self._open.clear()

    def video(self, path: str, shown: Camera) -> VideoFrames:
        def make(stack: ExitStack) -> VideoFrames:
            stream = stack.enter_context(self._source.open(path))
            frames = VideoFrames(
                stream, self._source.where(path), grey=shown.grey, size=shown.size, lookup=shown.lookup
            )
            return stack.enter_context(frames)

        return self._opened(f"video {shown.field.name}", path, make)

    def kept(self, path: str, key: str) -> _Copied:
        def make(stack: ExitStack) -> _Copied:
            return _Copied(stack.enter_context(self._source.open(path)), self._source.where(path))

        return self._opened(f"samples of {key}", path, make)

    def _opened(self, slot: str, path: str, make: Any) -> Any:
        """What `make` opens for the path. Each slot holds one open file; another path replaces it."""
        if slot in self._open and self._open[slot][0] != path:
            self._open.pop(slot)[1].close()
        if slot not in self._open:
            with ExitStack() as stack:
                value = make(stack)
                self._open[slot] = (path, stack.pop_all(), value)
        return self._open[slot][2]

    def rows(self, record: Record, where: str) -> Any:
        """The episode's rows as an Arrow table."""

        def make(stack: ExitStack) -> EpisodeRows:
            file = stack.enter_context(open_parquet(self._source, record.data))
            return EpisodeRows(file, self._columns, self._source.where(record.data))

        return self._opened("rows", record.data, make).of(record.number, record.length, where)


class _Copied:
    """An open video of which parts are copied."""

    def __init__(self, stream: BinaryIO, where: str):
        self._stream = stream
        self._video = Video(read_track(self._read, stream.seek(0, os.SEEK_END), where), "", where)

    def part(self, start: float, timestamps: np.ndarray, tolerance: float, where: str) -> KeptVideo:
        """The pictures of an episode that begins at second `start`."""
        return keep(self._video, self._video.frames(start, timestamps, tolerance, where), self._read)

    def _read(self, offset: int, size: int) -> bytes:
        self._stream.seek(offset)
        return self._stream.read(size)


def column(table: Any, key: str, where: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in table.schema.names:
        raise DataError(f"{where}: lacks the column {key!r}")
    return to_rows(table.column(key), f"{where}, {key}", shape)


def _is_scalar(name: str, dtype: np.dtype, shape: list[int]) -> bool:
    """Whether a feature of shape [1] is a number. LeRobot has no other way to say so.

    A float stays an array of one number, because spaces of floats have shapes; a discrete space of one entry is a number.
    """
    return shape == [1] and (name in _SCALARS or dtype.kind in "biu")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
