"""RLDS episodes of TensorFlow Datasets (Open X-Embodiment): TFRecord shards with `features.json`, without TensorFlow.

TFDS flattens nested features into one tf.Example with names such as `steps/observation/image`. A feature of the steps
holds the values of all steps one after another. Every other feature, such as those of `episode_metadata`, becomes a
field with one value per episode.

By default the last row of an episode is kept with its action. In some datasets that action is valid (most of Open
X-Embodiment), in others it is not (the RLDS specification). The option `last_step: observation` drops it: the last row
then holds only an observation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_flags
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt
from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.rlds_values import LENGTH_DIFFERS, count_steps, decode
from tiphys.dataio.convert.source import Source
from tiphys.dataio.convert.tfds import DatasetFolder, Feature, choose_folders, leaves, name_episode_features
from tiphys.dataio.convert.tfrecord import parse_example, records
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec

_FLAGS = ("is_first", "is_last", "is_terminal")
_FLAG_FIELDS = {"steps/is_terminal": "terminated", "steps/is_last": "truncated"}
_INSPECTED = 4  # episodes that are read to find out whether a text changes from step to step
_SHARD = re.compile(r"(.*)\.tfrecord(?:\.gz)?-(\d{5,})-of-(\d{5,})(?:\.gz)?")
_OTHER_CONTAINERS = re.compile(r"\.(array_record|riegeli|bagz)-\d{5,}-of-\d{5,}$")


class Rlds(Converter):
    name = "rlds"
    options_known = frozenset({"config", "last_step", "split", "version"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        folders = [p for p in source.files if p.rpartition("/")[2] == "features.json"]
        data = any(".tfrecord" in p or _OTHER_CONTAINERS.search(p) for p in source.files)
        return 1.0 if folders and data else 0.0

    @cached_property
    def _folders(self) -> list[str]:
        """Folders of the source that hold a features.json, one for each dataset; '' is the source itself.

        Raises DataError if a dataset is there several times, as versions or configs, and no option chooses one.
        """
        paths = [p.rpartition("/")[0] for p in self.source.files if p.rpartition("/")[2] == "features.json"]
        if not paths:
            raise DataError(
                f"{self.source.url}: there is no features.json, and TFRecord files cannot be read without it"
            )
        found = [DatasetFolder.of(p, self._info(p), self.source.name) for p in paths]
        return choose_folders(found, self.options, self.source.url)

    def _path(self, folder: str, name: str) -> str:
        return f"{folder}/{name}" if folder else name

    def _info(self, folder: str) -> dict[str, Any]:
        path = self._path(folder, "dataset_info.json")
        info = self.source.json(path) if self.source.exists(path) else {}
        if not isinstance(info, dict):
            raise DataError(f"{self.source.where(path)}: not a JSON object")
        return info

    def _task(self, folder: str) -> str:
        return DatasetFolder.of(folder, self._info(folder), self.source.name).name

    @cached_property
    def _features_by_folder(self) -> dict[str, list[Feature]]:
        return {}

    def _features(self, folder: str) -> list[Feature]:
        """The features that can be read, with the names of their fields, in the order of features.json.

        `name` of a flag is empty if it becomes no field. Features that the mapping file drops by their path are absent.
        """
        if folder not in self._features_by_folder:
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
            found = name_episode_features(found)
            usual = {
                f.path: _FLAG_FIELDS.get(f.path, f.field) for f in found if not _is_flag(f) or f.path in _FLAG_FIELDS
            }
            names = self.names.fields(usual, self.source.where(path))
            kept = [f for f in found if f.path in names or _is_flag(f)]
            self._features_by_folder[folder] = [replace(f, name=names.get(f.path, "")) for f in kept]
        return self._features_by_folder[folder]

    @cached_property
    def _skipped(self) -> list[str]:
        return []

    @cached_property
    def _shards(self) -> list[dict[str, Any]]:
        """The data of a piece for each shard, folder by folder, sorted by name. `count`: None if it is unknown."""
        out: list[dict[str, Any]] = []
        for folder in self._folders:
            lengths = self._lengths(folder)
            for path in self.source.files:
                head, _, name = path.rpartition("/")
                match = _SHARD.fullmatch(name)
                if head != folder or not match:
                    continue
                split, shard, total = match.group(1).rpartition("-")[2], int(match.group(2)), int(match.group(3))
                if self.options.get("split") in (None, split):
                    known = lengths.get(split)
                    count = known[shard] if known and shard < len(known) else None
                    shared = {"folder": folder, "split": split, "files": [path], "count": count}
                    out.append({**shared, "shard": shard, "shards": total})
        if not out:
            raise DataError(self._no_shards())
        return out

    def _no_shards(self) -> str:
        other = next((m.group(1) for p in self.source.files if (m := _OTHER_CONTAINERS.search(p))), "")
        if other:
            return (
                f"{self.source.url}: the data are {other} files, and only TFRecord files are read; write the dataset "
                "again with `file_format=tfrecord` (TFDS: tfds.scripts.cli convert_format)"
            )
        split = self.options.get("split")
        wanted = f" of split {split!r}" if split is not None else ""
        return f"{self.source.url}: there is no file *.tfrecord-NNNNN-of-NNNNN{wanted} beside features.json"

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
        out: list[str] = []
        for folder in self._folders:
            have = {s["split"] for s in self._shards if s["folder"] == folder}
            for split in self._lengths(folder):
                if self.options.get("split") in (None, split) and split not in have:
                    out.append(
                        f"split {split!r} of {self._task(folder)} is listed in dataset_info.json, but has no files"
                    )
            self._features(folder)  # fills `_skipped`
            for path, reason in self._unreadable(folder).items():
                out.append(f"left out: {path} ({reason})")
        return out + [f"left out: {name}" for name in dict.fromkeys(self._skipped)]

    def pieces(self) -> list[Piece]:
        out = [Piece(f"{i:06d}", data) for i, data in enumerate(self._shards)]
        missing: dict[tuple[str, str], set[int]] = {}
        for data in self._shards:
            missing.setdefault((data["folder"], data["split"]), set(range(data["shards"]))).discard(data["shard"])
        for (folder, split), shards in missing.items():
            for shard in sorted(shards):  # each missing shard is an error, or listed with --skip-bad
                out.append(Piece(f"{len(out):06d}", {"folder": folder, "split": split, "files": [], "missing": shard}))
        return out

    def tasks(self) -> list[TaskSpec]:
        return [self._task_spec(folder) for folder in dict.fromkeys(s["folder"] for s in self._shards)]

    def _task_spec(self, folder: str) -> TaskSpec:
        """Fields from features.json. The first episodes show whether a text varies, and which length an open dimension has."""
        unreadable, inspected = self._unreadable(folder), self._inspected(folder)
        fields = []
        for feature in self._features(folder):
            if feature.path in unreadable or _is_flag(feature):
                continue
            seen = [v for v in inspected.get(feature.path, ()) if isinstance(v, np.ndarray)]
            if feature.kind == "text":
                varies = feature.in_steps and any(bool(np.any(s != s[0])) for s in seen if len(s))
                fields.append(field_spec(feature.field, "str", (), per="step" if varies else "episode"))
            elif -1 in feature.shape and not seen:
                raise DataError(
                    f"{self.source.url}: feature {feature.path!r} has no fixed shape, and no episode could be read to infer it"
                )
            else:
                fields.append(_field_spec_of(feature, seen[0].shape[1:] if -1 in feature.shape else feature.shape))
        fields += _flag_specs(self._features(folder))
        return TaskSpec(self._task(folder), tuple(fields))

    @cached_property
    def _inspected_by_folder(self) -> dict[str, dict[str, list[np.ndarray | DataError]]]:
        return {}

    def _inspected(self, folder: str) -> dict[str, list[np.ndarray | DataError]]:
        """Path -> values in the first episodes, of the features which features.json does not describe completely."""
        if folder not in self._inspected_by_folder:
            features = [f for f in self._features(folder) if -1 in f.shape or (f.kind == "text" and f.in_steps)]
            found: dict[str, list[np.ndarray | DataError]] = {f.path: [] for f in features}
            for record, where in self._first_records(folder) if features else ():
                example = parse_example(record, where)
                try:
                    steps = count_steps(example, self._features(folder), where)
                except DataError:
                    continue
                for feature in features:
                    value = attempt(partial(decode, example, feature, steps if feature.in_steps else 1, where), where)
                    found[feature.path].append(DataError(value.reason) if isinstance(value, BadEpisode) else value)
            self._inspected_by_folder[folder] = found
        return self._inspected_by_folder[folder]

    def _first_records(self, folder: str) -> Iterator[tuple[memoryview, str]]:
        number = 0
        for data in self._shards:
            if data["folder"] == folder and number < _INSPECTED:
                where = self.source.where(data["files"][0])
                with self.source.open(data["files"][0]) as stream:
                    try:
                        for record in records(stream, self.source.size(data["files"][0]), where):
                            parse_example(record, where)
                            yield record, where
                            number += 1
                            if number >= _INSPECTED:
                                break
                    except DataError:
                        continue  # `episodes` reports the damage

    def _unreadable(self, folder: str) -> dict[str, str]:
        """Path -> why no field can hold the feature: its length differs from step to step, or between episodes."""
        out: dict[str, str] = {}
        inspected = self._inspected(folder)
        for feature in self._features(folder):
            if -1 not in feature.shape:
                continue
            found = inspected[feature.path]
            shapes = {v.shape[1:] for v in found if isinstance(v, np.ndarray)}
            problems = [str(v) for v in found if isinstance(v, DataError)]
            if len(shapes) > 1 and feature.kind != "image":
                out[feature.path] = "its length differs between episodes"
            elif problems and (not shapes or LENGTH_DIFFERS in problems[0]):
                out[feature.path] = problems[0].rpartition(": ")[2]
        return out

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        folder, split = piece.data["folder"], piece.data["split"]
        if not piece.data["files"]:
            yield BadEpisode(self.source.url, f"shard {piece.data['missing']} of split {split!r} is missing")
            return
        path = piece.data["files"][0]
        where, number = self.source.where(path), 0
        left_out, task = self._unreadable(folder), self._task(folder)
        unused = {
            f.path for f in self._features(folder) if not _is_flag(f) and f.field in self.dropped
        } | left_out.keys()
        features = [f for f in self._features(folder) if f.path not in unused]
        with self.source.open(path) as stream:
            for record in records(stream, self.source.size(path), where):
                if number >= start:
                    key = f"{task}/{split}-{piece.data['shard']:05d}-{number:06d}"
                    here = f"{where}, record {number}"
                    yield attempt(partial(self._read, record, features, folder, task, key, here), here)
                number += 1
        if piece.data.get("count") is not None and number != piece.data["count"]:
            raise DataError(
                f"{where}: holds {number} episodes, but dataset_info.json lists {piece.data['count']}; the file is cut"
            )

    def _read(
        self, record: memoryview, features: list[Feature], folder: str, task: str, key: str, where: str
    ) -> Episode:
        example = parse_example(record, where)
        in_steps = [f for f in features if f.in_steps]
        steps = count_steps(example, in_steps or self._features(folder), where)
        fields: dict[str, Any] = {}
        flags: dict[str, np.ndarray] = {}
        for feature in features:
            value = decode(example, feature, steps if feature.in_steps else 1, f"{where}, {feature.path}")
            if _is_flag(feature):
                flags[feature.path.removeprefix("steps/")] = checked_flags(value, f"{where}, {feature.path}")
            elif feature.in_steps:
                fields[feature.field] = value
            else:
                fields[feature.field] = str(value[0]) if feature.kind == "text" else value[0]
        names = {f.path: f.name for f in features}
        if terminated := names.get("steps/is_terminal"):
            fields[terminated] = flags["is_terminal"]
        if truncated := names.get("steps/is_last"):
            fields[truncated] = flags["is_last"] & ~flags.get("is_terminal", np.zeros(steps, bool))
        if self.options.get("last_step") == "observation" and steps > 1:
            steps -= 1
            by_episode = {f.field for f in features if not f.in_steps}
            fields = {k: v if k in by_episode else _drop_last_step(k, v, steps) for k, v in fields.items()}
        return Episode(id=key, task=task, fields=fields, steps=steps)


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


def _is_flag(feature: Feature) -> bool:
    return feature.in_steps and feature.path.removeprefix("steps/") in _FLAGS


def _flag_specs(features: list[Feature]) -> list[FieldSpec]:
    """The fields that `is_terminal` and `is_last` become."""
    return [field_spec(f.name, bool, ()) for f in features if f.path in _FLAG_FIELDS and f.name]


def _field_spec_of(feature: Feature, shape: tuple[int, ...]) -> FieldSpec:
    per, role = ("step", None) if feature.in_steps else ("episode", "info")
    if feature.kind == "image":
        modality = "image" if feature.dtype == "uint8" else None
        return field_spec(feature.field, feature.dtype, shape, modality=modality, role=role, per=per)
    return field_spec(feature.field, feature.dtype, shape, per=per, role=role, values=feature.classes or None)
