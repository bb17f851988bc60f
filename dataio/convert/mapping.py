"""The mapping file, in which the user corrects what a converter infers.

docs/converting.md describes it. An example:

    task: pick-and-place                 # or {name in the source: name here}
    fields:
      observation.images.*: {encoding: h264, frames: 16}
      observation.state: {name: observation, low: -1, high: 1}
      episode_index: drop
    text: {instruction: pick up the bottle}
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import renamed_role
from tiphys.dataio.convert.names import AmbiguousNames, address
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import MODALITIES, ROLES, DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.encodings import Encoding
from tiphys.plain_yaml import MOST_BYTES, YamlError, read

# Key -> (what it holds, what it means), for messages and for the tables in docs/converting.md
KEYS = {
    "task": ("text, or {name in the source: new name}", "Name of the task; empty: names stay"),
    "environment": ("text", "Environment in which policies of the task are evaluated"),
    "normalise": ("return or success", "What a score is a share of"),
    "random": ("number", "Mean return or success rate of random actions"),
    "expert": ("number", "Mean return or success rate of an expert"),
    "max_steps": ("whole number", "Steps after which an episode in the environment ends; 0: as the environment says"),
    "fields": ("section", "Field, name in the source or glob -> `drop`, or the keys of the next table"),
    "text": ("section", "Name -> text that every episode gets as a field"),
    "options": ("section", "Options of the format; the table of formats lists them"),
}
FIELD_KEYS = {
    "name": ("text", "New name of the field; not for a glob"),
    "role": (", ".join(ROLES), "What the field is for; info: not learned"),
    "modality": (", ".join(MODALITIES), "What its values are"),
    "dtype": ("NumPy dtype", "Type of its values; a value that would change is an error"),
    "low": ("number, or one for each element", "Smallest possible value; with `high`"),
    "high": ("number, or one for each element", "Largest possible value; with `low`"),
    "unit": ("text", "Unit of its values, such as mm"),
    "values": ("whole number", "Number of values of a discrete field, which are 0, 1, …"),
    "per": ("step or episode", "Whether it has a value for each step or one for the episode"),
    "encoding": (
        "raw, png, webp, jpeg, webp-lossy, h264, av1 or keep",
        "How images are stored; default: without loss; keep: a video stays as it is",
    ),
    "frames": ("whole number", "With `encoding`: images of one chunk"),
    "quality": ("whole number", "With a lossy `encoding`: its quality; 0: the default of the encoding"),
    "drop": ("true or false", "Leave the field out; `field: drop` is the same"),
}
_TASK_KEYS = ("environment", "normalise", "random", "expert", "max_steps")  # attributes of TaskSpec
KEEP = "keep"  # an encoding of the mapping file: videos are copied
_KEYS, _FIELD_KEYS = frozenset(KEYS), frozenset(FIELD_KEYS)
_TEXTS = ("name", "role", "modality", "dtype", "per", "encoding")  # settings of a field that are texts


@dataclass(frozen=True)
class Mapping:
    """The contents of a mapping file.

    task           new name of the task, or {name in the source: new name}; empty: names stay
    task_settings  values for environment, normalise, random, expert and max_steps of the TaskSpec
    fields         name in the source, name of a field, or glob of names of fields -> settings; see `resolve`
    text           name -> text that every episode gets
    options        options of the converter
    """

    task: str | Dict[str, str] = ""
    task_settings: Dict[str, Any] = field(default_factory=dict)
    fields: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    text: Dict[str, str] = field(default_factory=dict)
    options: Dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> Mapping:
        """Read a YAML file (path or URL). Raises DataError that lists all unknown keys and wrong kinds of value."""
        folder, _, name = path.rpartition("/")
        source = Source(folder or ".")
        return cls.parse(source.read(name, MOST_BYTES), path)

    @classmethod
    def parse(cls, text: bytes | str, where: str) -> Mapping:
        try:
            document = read(text, where)
        except YamlError as error:
            raise DataError(str(error)) from None
        return cls.from_dict({} if document.values is None else document.values, where, document.written)

    @classmethod
    def from_dict(cls, raw: Any, where: str = "mapping", written: Dict[str, str] | None = None) -> Mapping:
        """written: how the file writes a value that is not a text, for messages"""
        if not isinstance(raw, dict):
            raise DataError(f"{where}: keys and values are expected; known keys: {', '.join(sorted(_KEYS))}")
        errors = [
            f"unknown key {k!r}; {_did_you_mean(k, _KEYS)}known: {', '.join(sorted(_KEYS))}"
            for k in raw
            if k not in _KEYS
        ]
        fields: dict[str, dict[str, Any]] = {}
        for pattern, settings in _section(raw, "fields", errors).items():
            settings = {"drop": True} if settings == "drop" else settings
            if not isinstance(settings, dict):
                errors.append(f"fields.{pattern}: expected `drop` or {{key: value}}")
                continue
            errors += [
                f"fields.{pattern}: unknown key {k!r}; {_did_you_mean(k, _FIELD_KEYS)}"
                f"known: {', '.join(sorted(_FIELD_KEYS))}"
                for k in settings
                if k not in _FIELD_KEYS
            ]
            if any(c in pattern for c in "*?[") and "name" in settings:
                errors.append(f"fields.{pattern}: `name` needs a single field, not a glob")
            errors += _not_texts(
                {f"fields.{pattern}.{k}": settings[k] for k in _TEXTS if settings.get(k) is not None}, written
            )
            fields[str(pattern)] = settings
        texts = _section(raw, "text", errors)
        errors += _not_texts({f"text.{k}": v for k, v in texts.items()}, written)
        task = raw.get("task", "")
        errors += _not_texts(
            {f"task.{k}": v for k, v in task.items()} if isinstance(task, dict) else {"task": task}, written
        )
        errors += _not_texts({k: raw[k] for k in ("environment", "normalise") if raw.get(k) is not None}, written)
        if errors:
            raise DataError(f"{where}: " + "; ".join(errors))
        task_settings = {k: raw[k] for k in _TASK_KEYS if k in raw}
        _check_task_settings(task_settings, where)
        return cls(task, task_settings, fields, texts, _section(raw, "options", errors))

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            **self.task_settings,
            "fields": dict(self.fields),
            "text": dict(self.text),
            "options": dict(self.options),
        }

    def resolve(self, names: Dict[str, tuple[str, str | None]]) -> Mapping:
        """The mapping with names of fields in place of names in the source.

        A key that is exactly a name in the source addresses that array only; `FieldNames` has renamed or dropped it
        already. Any other key is the name of a field or a glob of such names.

        Parameters
        ----------
        names : Mapping[str, tuple[str, str | None]]
            Name in the source -> (its usual field, its field; None if dropped).

        Raises
        ------
        AmbiguousNames
            If a key is the name of one array in the source and the field of another one, or if two keys address one field.
        """
        owners = {address(source, self.fields, names): source for source in names}
        fields: dict[str, dict[str, Any]] = {}
        keys: dict[str, str] = {}
        for key, given in self.fields.items():
            settings = dict(given)
            source = owners.get(key)
            target = key
            if source is not None:
                usual, field = names[source]
                others = [s for s, (_, f) in names.items() if f == key and s != source]
                if others and usual != key:
                    raise AmbiguousNames(
                        f"mapping: fields.{key} is ambiguous: {source!r} is a name in the source, and {others[0]!r} becomes "
                        f"a field of this name; write {usual!r} for the first, {others[0]!r} for the second"
                    )
                if field is None:
                    continue
                target, settings = field, {k: v for k, v in settings.items() if k != "name"}
            if target in keys:
                raise AmbiguousNames(
                    f"mapping: fields.{keys[target]} and fields.{key} address the same field; write one entry for both"
                )
            fields[target], keys[target] = settings, key
        return replace(self, fields=fields)

    def task_name(self, name: str) -> str:
        return (self.task or name) if isinstance(self.task, str) else str(self.task.get(name, name))

    def field_settings(self, name: str) -> dict[str, Any]:
        """The settings of a field. Those under its own name override those of the globs that match it."""
        out: dict[str, Any] = {}
        for pattern, settings in self.fields.items():
            if pattern != name and fnmatch.fnmatchcase(name, pattern):
                out.update(settings)
        out.update(self.fields.get(name, {}))
        return out

    def tasks(self, found: list[TaskSpec], names: Iterable[str] = ()) -> list[TaskSpec]:
        """The tasks as they will be stored. Raises DataError if the mapping names a field or task that does not exist.

        names  names in the source, for messages
        """
        known = sorted({f.name for t in found for f in t.fields})
        for pattern in self.fields:
            if not fnmatch.filter(known, pattern) and pattern not in known:
                hint = _did_you_mean(pattern, [*known, *names])
                raise DataError(f"mapping: no field matches {pattern!r}; {hint}there are {', '.join(known)}")
        if isinstance(self.task, dict):
            for name in self.task:
                if name not in {t.name for t in found}:
                    tasks = [t.name for t in found]
                    raise DataError(
                        f"mapping: no task {name!r}; {_did_you_mean(name, tasks)}there are {', '.join(tasks)}"
                    )
        out: dict[str, TaskSpec] = {}
        for task in found:
            mapped = self._task(task)
            if out.setdefault(mapped.name, mapped) != mapped:
                raise DataError(f"mapping: two tasks would be named {mapped.name!r}, but they differ")
        return list(out.values())

    def _task(self, task: TaskSpec) -> TaskSpec:
        fields: list[FieldSpec] = []
        for spec in task.fields:
            settings = self.field_settings(spec.name)
            if not settings.get("drop"):
                fields.append(_with_settings(spec, settings))
        fields = [f for f in fields if f.name not in self.text]
        fields += [FieldSpec(name, "text", "text", "str", per="episode") for name in self.text]
        names = [f.name for f in fields]
        duplicates = sorted({n for n in names if names.count(n) > 1})
        if duplicates:
            raise DataError(f"mapping: two fields of task {task.name!r} would be named {', '.join(duplicates)}")
        try:
            return replace(task, name=self.task_name(task.name), fields=tuple(fields), **self.task_settings)
        except (TypeError, ValueError) as error:
            raise DataError(f"mapping: {error}") from None

    def dropped(self, found: list[TaskSpec]) -> tuple[str, ...]:
        """The names in the source of the fields that the file drops."""
        names = {f.name for t in found for f in t.fields}
        return tuple(sorted(n for n in names if self.field_settings(n).get("drop")))

    def kept(self, found: list[TaskSpec]) -> tuple[str, ...]:
        """The names in the source of the fields whose videos are copied."""
        names = {f.name for t in found for f in t.fields}
        settings = {n: self.field_settings(n) for n in names}
        return tuple(sorted(n for n, s in settings.items() if s.get("encoding") == KEEP and not s.get("drop")))

    def episode(self, episode: Episode) -> Episode:
        """The episode as it will be stored."""
        fields: dict[str, Any] = {}
        for name, value in episode.fields.items():
            settings = self.field_settings(name)
            if not settings.get("drop"):
                fields[settings.get("name", name)] = value
        fields.update(self.text)
        return replace(episode, task=self.task_name(episode.task), fields=fields)

    def encodings(self, found: list[TaskSpec]) -> dict[str, Encoding]:
        """New name of a field -> its Encoding, for the fields whose encoding the file sets."""
        out = {}
        for spec in (f for t in found for f in t.fields):
            settings = self.field_settings(spec.name)
            alone = [k for k in ("frames", "quality") if k in settings and "encoding" not in settings]
            if alone:
                raise DataError(f"mapping: fields.{spec.name}: {alone[0]} has an effect only with `encoding`; name one")
            if "encoding" in settings and not settings.get("drop"):
                kind, frames, quality = settings["encoding"], settings.get("frames", 0), settings.get("quality", 0)
                if kind == KEEP:
                    if frames or quality:
                        raise DataError(
                            f"mapping: fields.{spec.name}: `encoding: keep` copies a video; remove frames and quality"
                        )
                    continue
                if not isinstance(frames, int) or not isinstance(quality, int):
                    raise DataError(f"mapping: fields.{spec.name}: frames and quality must be whole numbers")
                out[settings.get("name", spec.name)] = Encoding(str(kind), frames, quality)
        return out


def _did_you_mean(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {near[0]!r}? " if near else ""


def _with_settings(spec: FieldSpec, settings: Dict[str, Any]) -> FieldSpec:
    given: dict[str, Any] = {
        k: settings[k] for k in ("name", "role", "modality", "values", "per", "unit") if k in settings
    }
    if not isinstance(given.get("unit", ""), str):
        raise DataError(f"mapping: fields.{spec.name}.unit: expected a text such as mm, not {given['unit']!r}")
    if "name" in given and "role" not in given:
        given["role"] = renamed_role(spec.role, str(given["name"]), spec.modality)
    for key in ("low", "high"):
        if settings.get(key) is not None:
            value = settings[key] if isinstance(settings[key], list) else [settings[key]]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
                raise DataError(f"mapping: fields.{spec.name}.{key}: expected a number or a list of numbers")
            given[key] = tuple(float(v) for v in value)
    values = settings.get("values", 0)
    if not isinstance(values, int) or isinstance(values, bool) or values < 0:
        raise DataError(f"mapping: fields.{spec.name}.values: {values!r} is not a whole number of at least 0")
    if not isinstance(settings.get("name", ""), str):
        raise DataError(f"mapping: fields.{spec.name}.name: {settings['name']!r} is not a text")
    if "dtype" in settings:
        try:
            given["dtype"] = np.dtype(settings["dtype"]).name
        except TypeError:
            raise DataError(f"mapping: fields.{spec.name}: {settings['dtype']!r} is not a NumPy dtype") from None
        if spec.dtype == "str" or np.dtype(given["dtype"]).kind not in "biuf":
            raise DataError(
                f"mapping: fields.{spec.name}: dtype {given['dtype']} is not possible for a field of {spec.dtype}"
            )
    mapped = replace(spec, **given)
    if "values" in settings and not settings.keys() & {"low", "high"}:
        mapped = replace(mapped, low=None, high=None)  # those of the source, which would override `values`
    _check_range(mapped, f"mapping: fields.{spec.name}", settings)
    return mapped


def _check_range(spec: FieldSpec, where: str, given: Dict[str, Any]) -> None:
    """Raises DataError if low, high and values, if given, have no effect, or do not fit the field's shape or each other."""
    if "values" in given and spec.modality in ("continuous", "text"):
        raise DataError(
            f"{where}: `values` has no effect on a {spec.modality} field; add `modality: discrete`, or remove it"
        )
    if not given.keys() & {"low", "high"}:
        return
    low, high = (None if b is None else spec.entries(b) for b in (spec.low, spec.high))
    if spec.modality == "continuous" and (low is None or high is None):
        raise DataError(f"{where}: `low` and `high` have an effect only together; give both")
    if low is None or high is None:
        return
    if (low > high).any():
        at = int((low > high).argmax())
        raise DataError(f"{where}: low {low.flat[at]:g} is above high {high.flat[at]:g}; exchange them")
    if given.get("values") and spec.modality == "discrete" and given["values"] != (high - low + 1).max():
        raise DataError(
            f"{where}: `values` is {given['values']}, but low and high make {(high - low + 1).max():g}; remove it"
        )


def _check_task_settings(given: Dict[str, Any], where: str) -> None:
    for key in ("random", "expert"):
        value = given.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value)
        ):
            raise DataError(f"{where}: {key}: {value!r} is not a number")
    if not isinstance(given.get("environment", ""), str):
        raise DataError(f"{where}: environment: {given['environment']!r} is not a text")


def _section(raw: dict[str, Any], key: str, errors: list[str]) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        errors.append(f"{key}: keys and values are expected")
        return {}
    return value


def _not_texts(values: Dict[str, Any], written: Dict[str, str] | None) -> list[str]:
    """An error for each value that must be a text and is none: YAML reads words such as `on` or `7` as something else."""
    return [
        f'{key}: must be a text; write it in quotes: "{(written or {}).get(key, value)}"'
        for key, value in values.items()
        if not isinstance(value, str)
    ]


def tables() -> str:
    """The keys of a mapping file and those of a field, as Markdown."""
    lines: list[str] = []
    for title, keys in (("key", KEYS), ("key of a field", FIELD_KEYS)):
        lines += [f"| {title} | holds | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {holds} | {meaning} |" for name, (holds, meaning) in keys.items()]
        lines += [""]
    return "\n".join(lines)
