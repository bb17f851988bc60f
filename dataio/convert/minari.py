"""Minari datasets in HDF5, Arrow or Parquet: one dataset folder, or a tree of them. https://minari.farama.org

Episodes have T actions and T + 1 observations. Spaces come from `metadata.json` or, before Minari 0.5, from the
attributes of the HDF5 file. Fields of an HDF5 file without spaces are inferred. If `metadata.json` states
`jpeg_encoding`, images are stored as JPEG.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_flags
from tiphys.dataio.convert import hdf5, spaces
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.exported import restore, tasks_of
from tiphys.dataio.convert.infer import channels_last, field_spec, infer_task, role_of, safe_name, texts
from tiphys.dataio.convert.limits import EPISODE_STEPS, FIELDS, check_shape, decode_image, parse_json
from tiphys.dataio.convert.names import AmbiguousNames
from tiphys.dataio.convert.parquet import to_rows, values
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec

MAIN = "main_data.hdf5"
EXPORTED = "tiphys"  # what our export adds to metadata.json and to each episode
_PIECE_BYTES = 256 << 20  # of a piece, about
_DERIVED = ("total_steps", "rewards_max", "rewards_mean", "rewards_min", "rewards_std", "rewards_sum")  # not kept
_RESULTS = {"rewards": "reward", "terminations": "terminated", "truncations": "truncated"}
_SPACES = {"observations": ("observation", "observation_space"), "actions": ("action", "action_space")}


@dataclass(frozen=True)
class Leaf:
    """A leaf of the observation or action space."""

    path: tuple[str, ...]  # keys from the space down to the leaf
    field: FieldSpec
    jpeg: bool  # stored as JPEG


class Minari(Converter):
    name = "minari"

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in source.files:
            folder, _, name = path.rpartition("/")
            if name == MAIN:
                return 1.0
            if name == "metadata.json" and f"{folder}/0/metadata.json".lstrip("/") in source.files:
                metadata = source.json(path)
                return 1.0 if isinstance(metadata, dict) and "data_format" in metadata else 0.0
        return 0.0

    @cached_property
    def _folders(self) -> list[str]:
        """The `data` folders of the source."""
        found = []
        for path in self.source.files:
            folder, _, name = path.rpartition("/")
            if name == MAIN:
                found.append(folder)
            elif name == "metadata.json":
                metadata = self.source.json(path)
                if isinstance(metadata, dict) and metadata.get("data_format", "hdf5") != "hdf5":
                    found.append(folder)
        if not found:
            raise DataError(f"{self.source.url}: has neither {MAIN} nor a metadata.json of Minari")
        return list(dict.fromkeys(found))

    def _path(self, folder: str, name: str) -> str:
        return f"{folder}/{name}" if folder else name

    @cached_property
    def _metadata(self) -> dict[str, dict[str, Any]]:
        """folder -> metadata.json, with `episodes` (their numbers) and `bytes` (of all data files) added."""
        out = {}
        for folder in self._folders:
            path = self._path(folder, "metadata.json")
            metadata = self.source.json(path) if self.source.exists(path) else {}
            if not isinstance(metadata, dict):
                raise DataError(f"{self.source.where(path)}: is not a JSON object")
            if self._is_hdf5(folder):
                main = self._path(folder, MAIN)
                with hdf5.open_hdf5(self.source, main) as file:
                    keys = ("observation_space", "action_space", "env_spec", "dataset_id")
                    metadata = {**{k: hdf5.attribute(file, k) for k in keys}, **metadata}
                    groups = [n for n in hdf5.names(file) if n.startswith("episode_") and n[8:].isdigit()]
                metadata["episodes"] = [int(n[8:]) for n in groups]
                metadata["bytes"] = self.source.size(main)
            else:
                metadata["episodes"], metadata["bytes"] = self._arrow_episodes(folder)
            out[folder] = metadata
        self._check_ids({f: str(m.get("dataset_id") or f) for f, m in out.items()})
        return out

    def _check_ids(self, ids: Mapping[str, str]) -> None:
        """Raises DataError if two folders hold the same dataset, because their episodes would have equal ids."""
        for dataset_id in ids.values():
            folders = [f for f, i in ids.items() if i == dataset_id]
            if len(folders) > 1:
                raise DataError(
                    f"{self.source.url}: dataset {dataset_id!r} is there more than once, in {', '.join(folders)}; "
                    "convert one of these folders"
                )

    def _is_hdf5(self, folder: str) -> bool:
        return self._path(folder, MAIN) in self.source.files

    def _arrow_files(self, folder: str) -> dict[int, list[str]]:
        """Number of an episode -> its data files."""
        out: dict[int, list[str]] = {}
        for path in self.source.files:
            parts = path.removeprefix(folder + "/" if folder else "").split("/")
            if len(parts) == 2 and parts[0].isdigit() and path.startswith(folder) and parts[1] != "metadata.json":
                out.setdefault(int(parts[0]), []).append(path)
        return out

    def _arrow_episodes(self, folder: str) -> tuple[list[int], int]:
        """The numbers of the episodes, and the bytes of all their files."""
        files = self._arrow_files(folder)
        return sorted(files), sum(self.source.size(p) for paths in files.values() for p in paths)

    def _task_name(self, folder: str) -> str:
        dataset_id = self._metadata[folder].get("dataset_id")
        return str(dataset_id) if dataset_id else folder.removesuffix("data").strip("/") or self.source.name

    def pieces(self) -> list[Piece]:
        out: list[Piece] = []
        for folder, metadata in self._metadata.items():
            numbers = metadata["episodes"]
            per_piece = max(1, int(_PIECE_BYTES * len(numbers) / max(metadata["bytes"], 1)))
            for first in range(0, len(numbers), per_piece):
                part = numbers[first : first + per_piece]
                files = [self._path(folder, MAIN)] if self._is_hdf5(folder) else []
                out.append(Piece(f"{len(out):06d}", {"folder": folder, "episodes": part, "files": files}))
        return out

    def versions(self, piece: Piece) -> list[str]:
        files = piece.data["files"]
        if not files:
            by_episode = self._arrow_files(piece.data["folder"])
            files = [p for n in piece.data["episodes"] for p in by_episode.get(n, [])]
        return [self.source.version(p) for p in files]

    def _exported(self, folder: str) -> tuple[TaskSpec, dict[str, dict[str, str]]] | None:
        """The task and {group: {field: key in the group}}, if the folder was written by our export."""
        metadata, where = self._metadata[folder].get(EXPORTED), self.source.where(folder)
        if metadata is None:
            return None
        if not isinstance(metadata, dict) or not all(isinstance(metadata.get(k), dict) for k in _SPACES):
            raise DataError(f"{where}: {EXPORTED!r} in metadata.json is not what an export writes")
        (task,) = tasks_of([metadata.get("task")], where)
        return task, {k: {str(f): str(p) for f, p in metadata[k].items()} for k in _SPACES}

    def tasks(self) -> list[TaskSpec]:
        return [self._spec(folder) for folder in self._folders]

    def _spec(self, folder: str) -> TaskSpec:
        metadata, where = self._metadata[folder], self.source.where(folder)
        if (exported := self._exported(folder)) is not None:
            return exported[0]
        from_spaces = {leaf.field.name: leaf.field for leaf in self._leaves(folder).values()}
        found: list[Episode] = []
        for piece in self.pieces():
            if piece.data["folder"] == folder and len(found) < 3:
                found += [
                    i
                    for i in self.episodes(Piece(piece.name, {**piece.data, "episodes": piece.data["episodes"][:3]}))
                    if isinstance(i, Episode)
                ]
        if not found:
            if not from_spaces:
                raise DataError(
                    f"{where}: the fields are unknown: no episode can be read, and the metadata has no spaces"
                )
            results = [
                field_spec("reward", "float64", ()),
                field_spec("terminated", bool, ()),
                field_spec("truncated", bool, ()),
            ]
            return TaskSpec(self._task_name(folder), (*from_spaces.values(), *results))
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        return infer_task(
            self._task_name(folder),
            found,
            from_spaces,
            random=float(low) if isinstance(low, int | float) else None,
            expert=float(high) if isinstance(high, int | float) else None,
            **_environment(metadata, where),
        )

    def _leaves(self, folder: str) -> dict[str, Leaf]:
        """Path such as `observations/a/0` -> its leaf; empty if the spaces are unknown."""
        if folder not in self._leaves_by_folder:
            self._leaves_by_folder[folder] = dict(self._find_leaves(folder))
        return self._leaves_by_folder[folder]

    @cached_property
    def _leaves_by_folder(self) -> dict[str, dict[str, Leaf]]:
        return {}

    def _find_leaves(self, folder: str) -> Iterator[tuple[str, Leaf]]:
        metadata, where = self._metadata[folder], self.source.where(folder)
        if not all(isinstance(metadata.get(key), str | Mapping) for _, key in _SPACES.values()):
            return
        found = [
            ("/".join((group, *path)), dotted, path, leaf)
            for group, (name, key) in _SPACES.items()
            for dotted, path, leaf in spaces.leaves(metadata[key], name, f"{where}, {key}")
        ]
        sources = [source for source, *_ in found]
        if len(set(sources)) != len(sources):
            raise AmbiguousNames(
                f"{where}: two leaves of the spaces have one path; is there a `/` in the key of a Dict?"
            )
        names = self.names.fields({source: dotted for source, dotted, *_ in found}, where)
        for source, _, path, leaf in found:
            if source in names:
                field = spaces.spec(names[source], leaf, where)  # first, because it refuses what is not a space
                jpeg = bool(metadata.get("jpeg_encoding", False)) and spaces.is_picture(leaf)
                yield source, Leaf(path, field, jpeg)

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        folder, numbers = piece.data["folder"], piece.data["episodes"]

        def where(number: int) -> str:
            return f"{self.source.where(folder)}, episode {number}"

        if not self._is_hdf5(folder):
            files = self._arrow_files(folder)
            yield from read_each(
                numbers, lambda n: self._read_arrow(folder, files.get(n, []), n, where(n)), where, start
            )
            return
        with hdf5.open_hdf5(self.source, self._path(folder, MAIN)) as file:
            yield from read_each(numbers, lambda n: self._read_hdf5(file, folder, n, where(n)), where, start)

    # ---- HDF5

    def _read_hdf5(self, file: Any, folder: str, number: int, where: str) -> Episode:
        group = hdf5.member(file, f"episode_{number}", where)
        if (exported := self._exported(folder)) is not None:
            return _read_exported(group, *exported, where)
        fields: dict[str, Any] = {}
        leaves = self._leaves(folder)
        for path, leaf in leaves.items():
            dataset = hdf5.member(group, path.partition("/")[0], where)
            for key in leaf.path:  # a Tuple's members are named _index_0, _index_1, …
                if not hasattr(dataset, "keys"):
                    raise DataError(f"{where}: expected groups along the path {path}")
                dataset = hdf5.member(dataset, f"_index_{key}" if hdf5.has(dataset, f"_index_{key}") else key, where)
            fields[leaf.field.name] = _decode_hdf5(dataset, leaf, f"{where}, {path}")
        if not leaves:
            for part, (name, _) in _SPACES.items():
                value = hdf5.member(group, part, where)
                found = hdf5.datasets(value, where, name) if hasattr(value, "keys") else {name: value}
                fields.update(
                    {k.replace("._index_", "."): channels_last(hdf5.read(d, f"{where}, {k}")) for k, d in found.items()}
                )
        for part, name in _RESULTS.items():
            fields[name] = hdf5.read(hdf5.member(group, part, where), f"{where}, {part}")
        if hdf5.has(group, "infos"):
            infos = hdf5.member(group, "infos", where)
            for key, dataset in hdf5.datasets(infos, f"{where}, infos").items() if hasattr(infos, "keys") else ():
                if dataset.shape and (dataset.dtype.kind in "biuf" or hdf5.is_text(dataset)):
                    fields[f"info.{key}"] = hdf5.read(dataset, f"{where}, infos.{key}")
                else:
                    self.leave_out(f"infos.{key}", "neither numbers nor texts by step")
        metadata = {k: hdf5.attribute(group, k) for k in list(group.attrs)[:FIELDS]}
        return self._episode(folder, number, fields, metadata, where)

    # ---- Arrow, Parquet

    def _read_arrow(self, folder: str, files: list[str], number: int, where: str) -> Episode:
        import pyarrow as pa

        if len(files) != 1:
            raise DataError(f"{where}: has {len(files)} data files; one is expected")
        table = self._table(files[0], where)
        if not len(table):
            raise DataError(f"{where}: has no rows")
        fields: dict[str, Any] = {}
        leaves = self._leaves(folder)
        if not leaves:
            raise DataError(f"{where}: metadata.json has no observation_space and action_space")
        steps = len(table) - 1
        for path, leaf in leaves.items():
            group = path.partition("/")[0]
            column = _column(table, group, where)
            for key in leaf.path:
                if not pa.types.is_struct(column.type) or column.type.get_field_index(key) < 0:
                    raise DataError(f"{where}: {path} has no member {key!r}")
                column = column.field(key)
            column = column.slice(0, steps) if group == "actions" else column
            fields[leaf.field.name] = _decode_arrow(column, leaf, f"{where}, {path}")
        for part, name in _RESULTS.items():
            fields[name] = to_rows(_column(table, part, where), f"{where}, {part}", ())[:steps]
        if "infos" in table.schema.names:
            fields.update(_infos(_column(table, "infos", where), "info", where, self.leave_out))
        path = self._path(folder, f"{number}/metadata.json")
        metadata = self.source.json(path) if self.source.exists(path) else {}
        return self._episode(folder, number, fields, _flat(metadata), where)

    def _table(self, path: str, where: str) -> Any:
        import pyarrow as pa

        from tiphys.dataio.convert.parquet import batches, open_parquet

        if path.endswith(".parquet"):
            with open_parquet(self.source, path) as file:
                return pa.Table.from_batches(list(batches(file, file.schema_arrow.names, where)), file.schema_arrow)
        with self.source.open(path) as stream:
            try:
                table = pa.ipc.open_file(stream).read_all()
                table.validate(full=True)
                return table
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{where}: is not a readable Arrow file ({error})") from None

    # ---- both

    def _episode(
        self, folder: str, number: int, fields: dict[str, Any], metadata: Mapping[str, Any], where: str
    ) -> Episode:
        """metadata: single values that belong to the whole episode, such as `options/task`"""
        reward = fields["reward"]
        steps = len(reward)
        if reward.ndim != 1 or not 0 < steps <= EPISODE_STEPS:
            raise DataError(
                f"{where}: the rewards have shape {reward.shape}; [T] with 1 to {EPISODE_STEPS:,} steps is expected"
            )
        for name in ("terminated", "truncated"):
            fields[name] = checked_flags(fields[name], f"{where}, {name}")
        for name in [n for n in fields if n.startswith("info.")]:
            if len(fields[name]) not in (steps, steps + 1):
                self.leave_out(name.replace("info.", "infos.", 1), "in some episodes it does not have one row per step")
                del fields[name]
        info = {}
        for key, value in metadata.items():
            name = safe_name(key.replace("/", "."))
            if isinstance(value, str) and name not in fields and role_of(name, "text") == "text":
                fields[name] = str(texts([value], f"{where}, {key}")[0])
            elif key not in _DERIVED and isinstance(value, str | int | float | bool):
                info[key] = value
        success = fields.get("info.success", fields.get("info.is_success"))
        task = self._task_name(folder)
        return Episode(
            id=f"{task}/{number:06d}",
            task=task,
            fields=fields,
            steps=steps,
            success=None if success is None else bool(np.any(success)),
            agent=str(self._metadata[folder].get("algorithm_name") or ""),
            info=info,
        )


def _environment(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`environment` and `max_steps` of a TaskSpec, if Gymnasium's name alone identifies the environment."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    spec = parse_json(text, f"{where}, env_spec") if isinstance(text, str) else {}
    name, steps = (spec.get("id"), spec.get("max_episode_steps")) if isinstance(spec, dict) else (None, None)
    # Gymnasium would import the module of `module:Name-v0`, and the data may name any
    if not isinstance(name, str) or not re.fullmatch(r"[\w./-]{1,128}", name) or spec.get("kwargs"):
        return {}
    return {"environment": name, "max_steps": steps if isinstance(steps, int) and 0 < steps < 1 << 31 else 0}


def _decode_hdf5(dataset: Any, leaf: Leaf, where: str) -> Any:
    if leaf.jpeg and getattr(dataset, "ndim", 3) <= 2:
        return _jpegs(hdf5.read_bytes_rows(dataset, where), where)
    return _shaped(hdf5.read(dataset, where), leaf.field, where)


def _decode_arrow(column: Any, leaf: Leaf, where: str) -> Any:
    if leaf.jpeg:
        rows = values(column, where)
        if not all(isinstance(r, bytes) for r in rows):
            raise DataError(f"{where}: expected encoded images")
        return _jpegs(rows, where)
    return _shaped(to_rows(column, where), leaf.field, where)


def _read_exported(group: Any, task: TaskSpec, places: dict[str, dict[str, str]], where: str) -> Episode:
    """An episode that `tiphys.dataio.export.minari` wrote."""
    metadata = parse_json(str(hdf5.read(hdf5.member(group, EXPORTED, where), where)), f"{where}, {EXPORTED}")
    fields: dict[str, Any] = {}
    for part, keys in places.items():
        for name, key in keys.items():
            holder = hdf5.member(group, part, where)
            fields[name] = hdf5.read(hdf5.member(holder, key, where) if key else holder, f"{where}, {part}/{key}")
    for part, name in _RESULTS.items():
        fields[name] = hdf5.read(hdf5.member(group, part, where), f"{where}, {part}")
    if hdf5.has(group, "infos"):
        found = hdf5.datasets(hdf5.member(group, "infos", where), where)
        fields.update({name: hdf5.read(dataset, f"{where}, infos.{name}") for name, dataset in found.items()})
    words = metadata.get("words") if isinstance(metadata, dict) else None
    fields.update({k: texts(v, f"{where}, {k}") for k, v in words.items()} if isinstance(words, dict) else {})
    return restore(metadata, fields, task, where)


def _shaped(array: np.ndarray, field: FieldSpec, where: str) -> np.ndarray:
    if field.dtype == "str":
        return array
    wanted = (len(array), *field.shape) if array.ndim else ()
    if array.ndim == 0 or array.size != np.prod(wanted, dtype=np.int64):
        raise DataError(f"{where}: the array has shape {array.shape}, but its space has {field.shape} per row")
    return array.reshape(wanted)


def _jpegs(rows: list[bytes], where: str) -> np.ndarray:
    """JPEGs as uint8 [n, H, W, C]. Rows of a rectangular dataset may end in zeros, which a JPEG decoder ignores."""
    if not rows:
        raise DataError(f"{where}: has no images")
    first = decode_image(rows[0], f"{where}, row 0")
    out = np.empty(check_shape((len(rows), *first.shape), 1, where), np.uint8)
    for number, row in enumerate(rows):
        image = decode_image(row, f"{where}, row {number}")
        if image.shape != first.shape or image.dtype != np.uint8:
            raise DataError(
                f"{where}, row {number}: the image is {image.dtype} of shape {image.shape}; "
                f"uint8 of shape {first.shape} is expected"
            )
        out[number] = image
    return out


def _column(table: Any, name: str, where: str) -> Any:
    import pyarrow as pa

    if name not in table.schema.names:
        raise DataError(f"{where}: lacks the column {name!r}")
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _flat(metadata: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested objects: path with slashes -> value."""
    out: dict[str, Any] = {}
    for key, value in metadata.items() if isinstance(metadata, dict) else ():
        out.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def _infos(column: Any, prefix: str, where: str, leave_out: Callable[[str, str], None]) -> dict[str, np.ndarray]:
    """Fields from the members of the struct `infos`, at any depth. Members with nulls are left out."""
    import pyarrow as pa

    out: dict[str, np.ndarray] = {}
    if not pa.types.is_struct(column.type):
        return out
    for i in range(column.type.num_fields):
        kind, child = column.type.field(i), column.field(i)
        name = f"{prefix}.{kind.name}"
        if pa.types.is_struct(kind.type):
            found = _infos(child, name, where, leave_out)
            if found.keys() & out.keys():
                raise AmbiguousNames(
                    f"{where}: two members of `infos` would become {sorted(found.keys() & out.keys())[0]!r}"
                )
            out.update(found)
        elif name in out:
            raise AmbiguousNames(f"{where}: two members of `infos` would become {name!r}")
        elif pa.types.is_null(kind.type) or child.null_count:
            leave_out(name.replace("info.", "infos.", 1), "some steps have no value")
        elif pa.types.is_string(kind.type) or pa.types.is_large_string(kind.type):
            out[name] = texts(values(child, where), f"{where}, {name}")
        else:
            array = to_rows(child, f"{where}, {name}")
            shape = (kind.metadata or {}).get(b"shape", b"").decode("ascii", "replace")
            sizes = [int(s) for s in shape.split(",") if s.isdigit()]
            if array.dtype.kind in "biuf" and array.size == len(array) * int(np.prod(sizes, dtype=np.int64)) and sizes:
                array = array.reshape(len(array), *sizes)
            elif array.ndim == 2 and array.shape[1] == 1:  # scalars are stored as lists of one number
                array = array[:, 0]
            out[name] = array
    return out
