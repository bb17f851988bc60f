"""RLDS episodes of TensorFlow Datasets (Open X-Embodiment): TFRecord shards with `features.json`, without TensorFlow.

TFDS flattens nested features into one tf.Example with names such as `steps/observation/image`. A feature of the steps
holds the values of all steps one after another.

By default the last row of an episode is kept with its action. In some datasets that action is valid (most of Open
X-Embodiment), in others it is not (the RLDS specification). The option `last_step: observation` drops it: the last row
then holds only an observation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt
from tiphys.dataio.convert.infer import field_spec, texts
from tiphys.dataio.convert.limits import EPISODE_BYTES, EPISODE_STEPS, check_shape, decode_image, inflate
from tiphys.dataio.convert.source import Source
from tiphys.dataio.convert.tfds import Feature, leaves
from tiphys.dataio.convert.tfrecord import Value, parse_example, records
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec

_FLAGS = ("is_first", "is_last", "is_terminal")
_FLAG_FIELDS = {"steps/is_terminal": "terminated", "steps/is_last": "truncated"}
_INFO_BYTES = 4096  # a per-episode value of at most this size goes into `info`, a larger one into a field
_INSPECTED = 4  # episodes that are read to find out whether a text changes from step to step


class Rlds(Converter):
    name = "rlds"
    options_known = frozenset({"last_step", "split"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        folders = [p for p in source.files if p.rpartition("/")[2] == "features.json"]
        return 1.0 if folders and any(".tfrecord" in p for p in source.files) else 0.0

    @cached_property
    def _folders(self) -> list[str]:
        """Folders of the source that hold a features.json, one for each dataset; '' is the source itself."""
        found = [p.rpartition("/")[0] for p in self.source.files if p.rpartition("/")[2] == "features.json"]
        if not found:
            raise DataError(
                f"{self.source.url}: there is no features.json, and TFRecord files cannot be read without it"
            )
        return found

    def _path(self, folder: str, name: str) -> str:
        return f"{folder}/{name}" if folder else name

    def _info(self, folder: str) -> dict[str, Any]:
        path = self._path(folder, "dataset_info.json")
        info = self.source.json(path) if self.source.exists(path) else {}
        if not isinstance(info, dict):
            raise DataError(f"{self.source.where(path)}: not a JSON object")
        return info

    def _task(self, folder: str) -> str:
        return str(self._info(folder).get("name") or folder.split("/")[0] or self.source.name)

    def _features(self, folder: str) -> list[Feature]:
        path = self._path(folder, "features.json")
        try:
            found = list(leaves(self.source.json(path), "", self._skipped))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise DataError(f"{self.source.where(path)}: {error}") from None
            raise DataError(
                f"{self.source.where(path)}: its content is not understood ({type(error).__name__}: {error})"
            ) from None
        if not any(f.in_steps for f in found):
            raise DataError(
                f"{self.source.where(path)}: has no feature under `steps`; this is not an RLDS dataset of episodes"
            )
        # is_terminal and is_last are flags that become fields too, see `_flag_specs`
        usual = {f.path: _FLAG_FIELDS.get(f.path, f.field) for f in found if _is_field(f) or f.path in _FLAG_FIELDS}
        names = self.names.fields(usual, self.source.where(path))
        kept = [f for f in found if f.path in names or f.path not in usual or f.path in _FLAG_FIELDS]
        return [replace(f, name=names.get(f.path, "")) for f in kept]

    @cached_property
    def _skipped(self) -> list[str]:
        return []

    @cached_property
    def _shards(self) -> list[tuple[str, str, str, int | None]]:
        """(folder, split, file, number of episodes or None if unknown), folder by folder, sorted by name."""
        out: list[tuple[str, str, str, int | None]] = []
        for folder in self._folders:
            lengths = self._lengths(folder)
            for path in self.source.files:
                head, _, name = path.rpartition("/")
                match = re.fullmatch(r"(.*)\.tfrecord-(\d{5,})-of-(\d{5,})", name)
                if head != folder or not match:
                    continue
                split, shard = match.group(1).rpartition("-")[2], int(match.group(2))
                if self.options.get("split") in (None, split):
                    known = lengths.get(split)
                    out.append((folder, split, path, known[shard] if known and shard < len(known) else None))
        if not out:
            raise DataError(f"{self.source.url}: there is no file *.tfrecord-NNNNN-of-NNNNN beside features.json")
        return out

    def _lengths(self, folder: str) -> dict[str, list[int]]:
        splits = self._info(folder).get("splits") or []
        try:
            return {
                str(s["name"]): [int(n) for n in s.get("shardLengths") or s.get("shard_lengths") or []] for s in splits
            }
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.source.where(self._path(folder, 'dataset_info.json'))}: `splits` is not understood ({error})"
            ) from None

    def notes(self) -> list[str]:
        out = []
        for folder in self._folders:
            have: dict[str, set[int]] = {}
            for where, split, path, _ in self._shards:
                if where == folder:
                    have.setdefault(split, set()).add(int(path.rpartition(".tfrecord-")[2][:5]))
            for split in self._lengths(folder):
                if self.options.get("split") not in (None, split):
                    continue
                if split not in have:
                    out.append(
                        f"split {split!r} of {self._task(folder)} is listed in dataset_info.json, but has no files"
                    )
        return out + [f"left out: {name}" for name in dict.fromkeys(self._skipped)]

    def pieces(self) -> list[Piece]:
        out = []
        missing: dict[tuple[str, str], set[int]] = {}
        for i, (folder, split, path, count) in enumerate(self._shards):
            data = {"folder": folder, "split": split, "files": [path], "count": count}
            out.append(Piece(f"{i:06d}", data))
            shard, total = (int(n) for n in path.rpartition(".tfrecord-")[2].split("-of-"))
            missing.setdefault((folder, split), set(range(total))).discard(shard)
        for (folder, split), shards in missing.items():
            for shard in sorted(shards):  # each missing shard is an error, or listed with --skip-bad
                out.append(Piece(f"{len(out):06d}", {"folder": folder, "split": split, "files": [], "missing": shard}))
        return out

    def tasks(self) -> list[TaskSpec]:
        return [self._task_spec(folder) for folder in dict.fromkeys(s[0] for s in self._shards)]

    def _task_spec(self, folder: str) -> TaskSpec:
        """Fields from features.json. The first episodes show whether a text varies, and which length an open dimension has."""
        episodes = self._first_episodes(folder)
        fields = []
        for feature in self._field_features(folder):
            seen = [e.fields[feature.field] for e in episodes if feature.field in e.fields]
            shape = feature.shape
            if -1 in shape and seen:
                shape = tuple(seen[0].shape[1:] if feature.in_steps else seen[0].shape)
            if feature.kind == "text":
                varies = feature.in_steps and any(bool(np.any(s != s[0])) for s in seen if len(s))
                fields.append(field_spec(feature.field, "str", (), per="step" if varies else "episode"))
            elif shape and -1 in shape:
                raise DataError(
                    f"{self.source.url}: feature {feature.path!r} has no fixed shape, and no episode could be read to infer it"
                )
            else:
                fields.append(_field_spec_of(feature, shape))
        fields += _flag_specs(self._features(folder))
        return TaskSpec(self._task(folder), tuple(fields))

    def _field_features(self, folder: str) -> list[Feature]:
        """Features that become fields: those of the steps except the flags, and per-episode ones too large for `info`."""
        return [f for f in self._features(folder) if _is_field(f)]

    def _first_episodes(self, folder: str) -> list[Episode]:
        out: list[Episode] = []
        for piece in self.pieces():
            if piece.data["folder"] == folder and piece.data["files"]:
                for item in self.episodes(piece):
                    if isinstance(item, Episode):
                        out.append(item)
                    if len(out) >= _INSPECTED or isinstance(item, BadEpisode):
                        break
            if len(out) >= _INSPECTED:
                break
        return out

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        folder, split = piece.data["folder"], piece.data["split"]
        if not piece.data["files"]:
            yield BadEpisode(self.source.url, f"shard {piece.data['missing']} of split {split!r} is missing")
            return
        path = piece.data["files"][0]
        where, number = self.source.where(path), 0
        features, task = self._features(folder), self._task(folder)
        shard = path.rpartition(".tfrecord-")[2][:5]
        with self.source.open(path) as stream:
            for record in records(stream, self.source.size(path), where):
                if number >= start:
                    key = f"{task}/{split}-{shard}-{number:06d}"
                    here = f"{where}, record {number}"
                    yield attempt(partial(self._read, record, features, task, key, here), here)
                number += 1
        if piece.data.get("count") is not None and number != piece.data["count"]:
            raise DataError(
                f"{where}: holds {number} episodes, but dataset_info.json lists {piece.data['count']}; the file is cut"
            )

    def _read(self, record: memoryview, features: list[Feature], task: str, key: str, where: str) -> Episode:
        example = parse_example(record, where)
        steps = _steps(example, features, where)
        fields: dict[str, Any] = {}
        info: dict[str, Any] = {}
        flags: dict[str, np.ndarray] = {}
        for feature in features:
            if feature.path not in example and feature.path + "/ragged_flat_values" not in example:
                raise DataError(f"{where}: the feature {feature.path!r} of features.json is missing")
            here = f"{where}, {feature.path}"
            rows = steps if feature.in_steps else 1
            value = _decode(example, feature, rows, here)
            name = feature.path.removeprefix("steps/")
            if feature.in_steps and name in _FLAGS:
                flags[name] = checked_flags(value, here)
            elif _is_field(feature):
                fields[feature.field] = value if feature.in_steps else value[0]
            else:
                info[feature.path.replace("/", ".")] = str(value[0]) if feature.kind == "text" else value[0].tolist()
        names = {f.path: f.name for f in features}  # the name of a flag is empty if a mapping file drops it
        if terminated := names.get("steps/is_terminal"):
            fields[terminated] = flags["is_terminal"]
        if truncated := names.get("steps/is_last"):
            fields[truncated] = flags["is_last"] & ~flags.get("is_terminal", np.zeros(steps, bool))
        if self.options.get("last_step") == "observation" and steps > 1:
            steps -= 1
            fields = {k: _drop_last_step(k, v, steps) for k, v in fields.items()}
        return Episode(id=key, task=task, fields=fields, steps=steps, info=info)


def _drop_last_step(name: str, value: Any, steps: int) -> Any:
    """A field of an episode without its last step.

    Observations keep their last row. A flag in the last row moves to the step before it. Other fields lose the row.
    """
    if isinstance(value, str) or np.ndim(value) == 0 or len(value) != steps + 1:
        return value
    head = name.partition(".")[0]
    if head in ("terminated", "truncated"):
        return np.concatenate([value[: steps - 1], value[steps - 1 : steps] | value[steps:]])
    return value if head == "observation" else value[:steps]


def _is_field(feature: Feature) -> bool:
    """Whether the feature becomes a field; otherwise it is a flag or goes into the episode's `info`."""
    name = feature.path.removeprefix("steps/")
    if feature.in_steps:
        return name not in _FLAGS
    if feature.kind == "image":
        return True
    size = math.prod(feature.shape) * 8
    return feature.kind == "tensor" and (-1 in feature.shape or size > _INFO_BYTES)


def _flag_specs(features: list[Feature]) -> list[FieldSpec]:
    """The fields that `is_terminal` and `is_last` become."""
    return [field_spec(f.name, bool, ()) for f in features if f.path in _FLAG_FIELDS and f.name]


def _field_spec_of(feature: Feature, shape: tuple[int, ...]) -> FieldSpec:
    per = "step" if feature.in_steps else "episode"
    if feature.kind == "image":
        return field_spec(
            feature.field, feature.dtype, shape, modality="image" if feature.dtype == "uint8" else None, per=per
        )
    return field_spec(feature.field, feature.dtype, shape, per=per, values=feature.classes or None)


# ---- values ----------------------------------------------------------------------------------------------------------


def _steps(example: Mapping[str, Value], features: list[Feature], where: str) -> int:
    """Number of steps. Raises DataError if the features of the steps do not agree."""
    counts: set[float] = set()
    for feature in features:
        if not feature.in_steps or feature.path not in example:
            continue
        value = example[feature.path]
        size = 1 if isinstance(value, list) else math.prod(feature.shape)
        if -1 not in feature.shape or isinstance(value, list):
            counts.add(len(value) / size if size else 0.0)
    if len(counts) != 1 or not next(iter(counts)).is_integer():
        raise DataError(
            f"{where}: the features have different numbers of steps ({', '.join(f'{c:g}' for c in sorted(counts)[:5])})"
        )
    steps = int(next(iter(counts)))
    if not 0 < steps <= EPISODE_STEPS:
        raise DataError(f"{where}: {steps:,} steps; an episode has 1 to {EPISODE_STEPS:,}")
    return steps


def _decode(example: Mapping[str, Value], feature: Feature, rows: int, where: str) -> np.ndarray:
    """[rows, *shape] of one feature."""
    if feature.path not in example:
        return _ragged(example, feature, rows, where)
    value = example[feature.path]
    if feature.kind == "text":
        return texts(_byte_rows(value, rows, where), where)
    if feature.kind == "image":
        return _images(_byte_rows(value, rows, where), feature, where)
    if isinstance(value, list):
        return _tensors(_byte_rows(value, rows, where), feature, where)
    if -1 in feature.shape:
        known = math.prod(s for s in feature.shape if s != -1)
        if feature.shape.count(-1) > 1 or value.size % max(rows * known, 1):
            raise DataError(f"{where}: {value.size} values do not make {rows} rows of shape {feature.shape}")
        shape = tuple(value.size // max(rows * known, 1) if s == -1 else s for s in feature.shape)
    else:
        shape = feature.shape
    if value.size != rows * math.prod(shape):
        raise DataError(f"{where}: {value.size} values do not make {rows} rows of shape {shape}")
    return _cast(value, feature.dtype, where).reshape(rows, *shape)


def _cast(value: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """As `dtype`. TFDS stores the bits of a uint64 as int64. Raises DataError if a value does not fit."""
    return value.view(np.uint64) if dtype == "uint64" and value.dtype == np.int64 else checked_cast(value, dtype, where)


def _byte_rows(value: Value, rows: int, where: str) -> list[bytes]:
    if not isinstance(value, list) or len(value) != rows:
        raise DataError(f"{where}: expected {rows} byte strings, found {len(value)} values, or numbers")
    return value


def _images(data: list[bytes], feature: Feature, where: str) -> np.ndarray:
    """Images of one size. An empty string, which TFDS writes for an absent image, becomes a black image."""
    shape = feature.shape if -1 not in feature.shape and feature.shape else None
    first = next((decode_image(d, where) for d in data if d), None) if shape is None else None
    if first is None and shape is None:
        raise DataError(f"{where}: the episode has no image, and features.json gives no shape")
    size = tuple(shape) if shape is not None else first.shape  # type: ignore[union-attr]
    check_shape((len(data), *size), np.dtype(feature.dtype).itemsize, where, EPISODE_BYTES)
    out = np.zeros((len(data), *size), np.dtype(feature.dtype))
    for row, encoded in enumerate(data):
        if encoded:
            array = decode_image(encoded, f"{where}, step {row}")
            if feature.dtype == "float32" and array.dtype == np.uint8 and array.shape[2] == 4:
                array = np.ascontiguousarray(array).view("<f4")  # TFDS stores the bytes of a float32 (depth) as RGBA
            if array.shape != size:
                raise DataError(f"{where}, step {row}: the image has shape {array.shape}, not {size}")
            out[row] = checked_cast(array, out.dtype, f"{where}, step {row}")
    return out


def _tensors(data: list[bytes], feature: Feature, where: str) -> np.ndarray:
    """Tensors that TFDS stored as bytes (plain or zlib), as [rows, *shape]."""
    if feature.encoding not in ("bytes", "zlib") or -1 in feature.shape:
        raise DataError(
            f"{where}: stored as bytes with encoding {feature.encoding!r} and shape {feature.shape}, which cannot be read"
        )
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    size = math.prod(check_shape((len(data), *feature.shape), dtype.itemsize, where)[1:]) * dtype.itemsize
    rows = [inflate(d, where, wbits=15, limit=size) if feature.encoding == "zlib" else d for d in data]
    if any(len(r) != size for r in rows):
        raise DataError(f"{where}: a tensor does not have the expected {size} bytes")
    return checked_cast(np.frombuffer(b"".join(rows), dtype).reshape(len(data), *feature.shape), feature.dtype, where)


def _ragged(example: Mapping[str, Value], feature: Feature, rows: int, where: str) -> np.ndarray:
    """A ragged feature, whose length must be the same for all steps of this episode.

    TFDS stores it as `ragged_flat_values` and `ragged_row_lengths_0`.
    """
    values = example.get(feature.path + "/ragged_flat_values")
    lengths = example.get(feature.path + "/ragged_row_lengths_0")
    if not isinstance(values, np.ndarray) or not isinstance(lengths, np.ndarray) or len(lengths) != rows:
        raise DataError(f"{where}: the ragged feature has no valid row lengths")
    if rows == 0 or bool(np.any(lengths != lengths[0])) or feature.shape.count(-1) != 1:
        raise DataError(
            f"{where}: the length differs from step to step, which cannot be read; to convert without this feature, "
            "remove it from features.json"
        )
    shape = check_shape([int(lengths[0]) if s == -1 else s for s in feature.shape], 8, where)
    if values.size != rows * math.prod(shape):
        raise DataError(f"{where}: {values.size} values do not make {rows} rows of shape {shape}")
    return _cast(values, feature.dtype, where).reshape(rows, *shape)
