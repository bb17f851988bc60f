"""LeRobot v3.0 export: rows in Parquet, images inside the Parquet files as PNG (`dtype: image`), so without loss.

Videos that lie in the dataset as samples (`encoding: keep`, or a LeRobot dataset that is indexed where it is) are copied into
MP4 files, if each row shows the picture after that of the row before it. Otherwise their pictures become PNG, and a warning says
so.

Fields keep their names, except `observation`, `reward`, `terminated` and `truncated`, which get LeRobot's names. A last
row that holds only an observation becomes a row whose action is zero and whose feature `valid` is False. The first text
field with one value per episode becomes LeRobot's task.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.atomic import to_json
from tiphys.dataio.convert.exported import episode_metadata
from tiphys.dataio.convert.lerobot import EXPORTED, VALID
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.export import Selection
from tiphys.dataio.export.lerobot_videos import (
    FILE_BYTES as VIDEO_BYTES,
)
from tiphys.dataio.export.lerobot_videos import (
    VIDEO_PATH,
    VideoWriter,
    frames_per_second,
    payloads,
    samples_of,
    why_not,
)
from tiphys.dataio.format.video_stream import Stream
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.messages import logger

log = logger(__name__)
ONE_TASK_A_FOLDER = True
_NAMES = {
    "observation": "observation.state",
    "reward": "next.reward",
    "terminated": "next.done",
    "truncated": "next.truncated",
}
_FPS = 10.0  # of a dataset without videos
_SAMPLED_EPISODES, _SAMPLED_ROWS = 250, 4  # whose pictures give the statistics of a video
_FILE_BYTES = 100 << 20  # approximate size of a data file
_DATA, _EPISODES = "data/chunk-{:03d}/file-{:03d}.parquet", "meta/episodes/chunk-{:03d}/file-{:03d}.parquet"
_CHUNK = 1000  # files per folder
_PNG_CHANNELS = (1, 3, 4)


def write(folder: Path, selection: Selection, *, fps: float | None = None) -> list[str]:
    """Write the files and return their names, info.json last.

    fps   the rate that the metadata states; None: that of the videos, or 10
    """
    if fps is not None and not fps > 0:
        raise DataError(f"fps {fps} must be positive")
    (task,) = selection.tasks
    step_fields = [f for f in task.fields if f.per == "step"]
    taken = {f.name for f in step_fields}
    names = {
        f.name: _NAMES[f.name] if f.name in _NAMES and _NAMES[f.name] not in taken else f.name for f in step_fields
    }
    numbers, index = selection.numbers(), selection.index
    copied = _copied(index, step_fields, numbers)
    if fps is None:
        fps = frames_per_second(index, copied[0].name, numbers[0]) if copied else _FPS
    videos = {f.name: VideoWriter(folder, names[f.name], fps) for f in copied}
    writer = _Writer(folder, [f for f in step_fields if f.name not in videos], names, fps)
    instruction_field = next((f.name for f in task.with_role("text") if f.per == "episode"), None)
    for number, episode in zip(numbers, selection.episodes(videos), strict=True):
        places: dict[str, Any] = {}
        for field in copied:
            places |= _copy(index, field, number, videos[field.name])
        said = str(episode.fields.get(instruction_field) or "") if instruction_field else ""
        writer.add(episode, task, said, places, {f.name: int(index.rows[number]) for f in copied})
    files = writer.close()
    for video in videos.values():
        video.close()
        files += video.files
    features = {
        names[f.name]: videos[f.name].feature(f.shape[-1] if len(f.shape) == 3 and f.shape[-1] == 1 else 3)
        if f.name in videos
        else _feature(f, writer.image_shapes.get(f.name))
        for f in step_fields
    }
    features[VALID] = {"dtype": "bool", "shape": [1], "names": None}
    for name, dtype in _INDEX_FEATURES.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": writer.episodes,
        "total_frames": writer.total,
        "total_tasks": len(writer.task_indices),
        "chunks_size": _CHUNK,
        "data_files_size_in_mb": _FILE_BYTES >> 20,
        "video_files_size_in_mb": VIDEO_BYTES >> 20,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{writer.episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": VIDEO_PATH if videos else None,
        "features": features,
        EXPORTED: {"task": task.to_dict(), "names": names},
    }
    for field in copied:
        writer.sample(index, field, numbers)
    (folder / "meta/stats.json").write_text(to_json(writer.statistics(), indent=1))
    (folder / "meta/info.json").write_text(to_json(info, indent=1))
    return [*files, "meta/stats.json", "meta/info.json"]


def _copied(index: EpisodeIndex, fields: list[FieldSpec], numbers: list[int]) -> list[FieldSpec]:
    """The fields whose videos are copied."""
    out = []
    for field in fields:
        if not numbers or index.packets(field.name) is None:
            continue
        if reason := why_not(index, field, numbers):
            log.warning("%s, field %s: its pictures are stored as PNG, because %s", index.url, field.name, reason)
        else:
            out.append(field)
    return out


def _copy(index: EpisodeIndex, field: FieldSpec, number: int, video: VideoWriter) -> dict[str, Any]:
    """Append an episode's video; returns its cells of the table of episodes."""
    table = index.packets(field.name)
    assert table is not None
    samples = samples_of(table, number, int(index.rows[number]))
    stream = Stream.from_entry(table.entry(number), f"episode {index.id(number)!r}")
    return video.add(stream, samples, payloads(index, field, number, samples))


_INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def _is_image(field: FieldSpec) -> bool:
    """Whether a field is stored as PNG."""
    shape = field.shape
    return (
        field.modality == "image"
        and field.dtype == "uint8"
        and (len(shape) == 2 or (len(shape) == 3 and shape[2] in _PNG_CHANNELS))
    )


def _feature(field: FieldSpec, shape: tuple[int, ...] | None) -> dict[str, Any]:
    size = list(shape if shape is not None else field.shape)
    if _is_image(field):
        return {
            "dtype": "image",
            "shape": size if len(size) == 3 else [*size, 1],
            "names": ["height", "width", "channels"],
        }
    return {"dtype": "string" if field.dtype == "str" else field.dtype, "shape": size or [1], "names": None}


class _Writer:
    """Writes data files of about 100 MB, one episode after another, then the tables of episodes and tasks."""

    def __init__(self, folder: Path, fields: list[FieldSpec], names: dict[str, str], fps: float):
        self._folder, self._fields, self._names, self._fps = folder, fields, names, fps
        self.episodes = self.total = 0
        self.task_indices: dict[str, int] = {}  # LeRobot's table of tasks: instruction -> task_index
        self.image_shapes: dict[str, tuple[int, ...]] = {}  # of the first image of each field; the size may vary
        self._episode_rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._files: list[str] = []
        self._statistics = {f.name: _Statistics() for f in fields if f.dtype != "str"}
        (folder / "meta").mkdir(parents=True)

    def add(
        self, episode: Episode, task: TaskSpec, instruction: str, places: dict[str, Any], copied: dict[str, int]
    ) -> None:
        """Write an episode.

        places   cells of its row of the table of episodes that say where its videos are
        copied   field -> its rows, of the fields that are copied videos
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = max([1, episode.steps, *copied.values(), *(len(episode.fields[f.name]) for f in self._fields)])
        task_index = self.task_indices.setdefault(instruction, len(self.task_indices))
        columns: dict[str, Any] = {}
        for field in self._fields:
            columns[self._names[field.name]] = self._column(field, episode.fields[field.name], rows)
        index = np.arange(rows)
        columns[VALID] = pa.array(index < episode.steps)
        columns["timestamp"] = pa.array((index / self._fps).astype(np.float32))
        columns["frame_index"] = pa.array(index)
        columns["episode_index"] = pa.array(np.full(rows, self.episodes))
        columns["index"] = pa.array(index + self.total)
        columns["task_index"] = pa.array(np.full(rows, task_index))
        table = pa.table(columns)
        if self._writer is not None and self._path().stat().st_size > _FILE_BYTES:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._files.append(_DATA.format(*divmod(len(self._files), _CHUNK)))
            self._path().parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path(), table.schema)
        self._writer.write_table(table)
        place = dict(zip(("data/chunk_index", "data/file_index"), divmod(len(self._files) - 1, _CHUNK), strict=True))
        self._episode_rows.append(
            {
                "episode_index": self.episodes,
                "tasks": [instruction],
                "length": rows,
                **place,
                "dataset_from_index": self.total,
                "dataset_to_index": self.total + rows,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **places,
                EXPORTED: to_json(_metadata(episode, task, copied), exact=True),
            }
        )
        self.episodes, self.total = self.episodes + 1, self.total + rows

    def close(self) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is not None:
            self._writer.close()
        episodes = _EPISODES.format(0, 0)
        (self._folder / episodes).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episode_rows), self._folder / episodes)
        tasks = pa.table({"task_index": list(self.task_indices.values()), "__index_level_0__": list(self.task_indices)})
        pandas = {  # makes pandas use the column as index, as LeRobot expects
            "index_columns": ["__index_level_0__"],
            "column_indexes": [],
            "columns": [
                _pandas_column("task_index", "task_index", "int64", "int64"),
                _pandas_column(None, "__index_level_0__", "unicode", "object"),
            ],
        }
        pq.write_table(tasks.replace_schema_metadata({"pandas": to_json(pandas)}), self._folder / "meta/tasks.parquet")
        return [*self._files, episodes, "meta/tasks.parquet"]

    def sample(self, index: EpisodeIndex, field: FieldSpec, numbers: list[int]) -> None:
        """Statistics of a copied video, from some of its pictures."""
        found = self._statistics.setdefault(field.name, _Statistics())
        for number in numbers[:: max(len(numbers) // _SAMPLED_EPISODES, 1)]:
            rows = int(index.rows[number])
            for row in range(0, rows, -(-rows // _SAMPLED_ROWS)):
                read = index.read(index.ranges(number, row, 1, [field.name]))
                found.add(index.decode(number, row, 1, [field.name], read)["fields"][field.name], True)

    def statistics(self) -> dict[str, Any]:
        return {self._names[name]: s.to_dict() for name, s in self._statistics.items() if s.count}

    def _path(self) -> Path:
        return self._folder / self._files[-1]

    def _column(self, field: FieldSpec, value: Any, rows: int) -> Any:
        """The rows of a field as an Arrow array. Rows that the field does not have are zero, black or empty."""
        import pyarrow as pa

        if field.dtype == "str":
            return pa.array([str(t) for t in value] + [""] * (rows - len(value)), pa.string())
        array = np.asarray(value)
        if len(array) < rows:
            array = np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
        self._statistics[field.name].add(array[: len(value)], _is_image(field))
        if _is_image(field):
            self.image_shapes.setdefault(field.name, array.shape[1:])
            images = [{"bytes": _png(image), "path": None} for image in array]
            return pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        out = pa.array(np.ascontiguousarray(array).reshape(-1))
        for size in reversed(array.shape[1:]):
            out = pa.FixedSizeListArray.from_arrays(out, size)
        return out


def _pandas_column(name: str | None, field_name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
    return {
        "name": name,
        "field_name": field_name,
        "pandas_type": pandas_type,
        "numpy_type": numpy_type,
        "metadata": None,
    }


def _metadata(episode: Episode, task: TaskSpec, copied: dict[str, int]) -> dict[str, Any]:
    found = episode_metadata(episode, task)
    return {**found, "rows": {**found["rows"], **copied}}


class _Statistics:
    """Minimum, maximum, mean, standard deviation and count of a feature over all rows, for LeRobot's stats.json.

    A row with a value that is not finite is not counted: one of them would make every statistic NaN.
    """

    def __init__(self) -> None:
        self.count = self._rows = 0
        self._low: Any = np.inf
        self._high: Any = -np.inf
        self._total: Any = 0.0
        self._squares: Any = 0.0

    def add(self, array: np.ndarray, is_image: bool) -> None:
        if not len(array):
            return
        rows = array.astype(np.float64)
        if array.dtype.kind == "f" and not is_image:
            rows = rows[np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))]
        self._is_image, self._rows = is_image, self._rows + len(rows)
        if is_image:  # per channel, scaled to 0…1
            rows = rows.reshape(-1, array.shape[3] if array.ndim == 4 else 1) / 255
        self._low = np.minimum(self._low, rows.min(0, initial=np.inf))
        self._high = np.maximum(self._high, rows.max(0, initial=-np.inf))
        with np.errstate(over="ignore"):
            self._total, self._squares = self._total + rows.sum(0), self._squares + (rows**2).sum(0)
        self.count += len(rows)

    def to_dict(self) -> dict[str, Any]:
        mean = self._total / max(self.count, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            deviation = np.sqrt(np.maximum(self._squares / max(self.count, 1) - mean**2, 0))
        shape = (-1, 1, 1) if self._is_image else (mean.shape or (1,))
        values = {"min": self._low, "max": self._high, "mean": mean, "std": deviation}
        return {**{k: np.reshape(v, shape).tolist() for k, v in values.items()}, "count": [self._rows]}


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).save(
        out, "PNG", compress_level=1
    )
    return out.getvalue()
