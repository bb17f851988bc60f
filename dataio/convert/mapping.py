"""The mapping file: what the user knows better than inference. docs/converting.md describes it.

task: pick-and-place                 # or {name in the source: name here} fields:   observation.images.*: {encoding:
h264, frames: 16}   observation.state: {name: observation, low: -1, high: 1}   episode_index: drop text: {instruction:
pick up the bottle}
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.encodings import Encoding

_KEYS = frozenset({"task", "environment", "normalise", "random", "expert", "max_steps", "fields", "text", "options"})
_FIELD = frozenset(
    {"name", "role", "modality", "dtype", "low", "high", "values", "per", "encoding", "frames", "quality", "drop"}
)
_LIMIT = 1 << 20


@dataclass(frozen=True)
class Mapping:
    task: str | Dict[str, str] = ""
    about: Dict[str, Any] = field(
        default_factory=dict
    )  # environment, normalise, random, expert, max_steps of the TaskSpec
    fields: Dict[str, Dict[str, Any]] = field(default_factory=dict)  # name or glob -> what is said of it
    text: Dict[str, str] = field(default_factory=dict)
    options: Dict[str, Any] = field(default_factory=dict)  # of the converter

    @classmethod
    def load(cls, path: str) -> Mapping:
        """Read a YAML file (path or URL). All of its errors at once."""
        folder, _, name = path.rpartition("/")
        source = Source(folder or ".")
        return cls.parse(source.read(name, _LIMIT).decode("utf-8", "replace"), path)

    @classmethod
    def parse(cls, text: str, where: str) -> Mapping:
        import yaml

        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            raw = {} if node is None else _plain(node, where)
        except yaml.YAMLError as error:
            raise DataError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
        return cls.from_dict(raw, where)

    @classmethod
    def from_dict(cls, raw: Any, where: str = "mapping") -> Mapping:
        if not isinstance(raw, dict):
            raise DataError(f"{where}: keys and values are expected ({', '.join(sorted(_KEYS))})")
        errors = [f"unknown key {k!r}; known: {', '.join(sorted(_KEYS))}" for k in raw if k not in _KEYS]
        fields: dict[str, dict[str, Any]] = {}
        for pattern, said in _mapping(raw, "fields", errors).items():
            said = {"drop": True} if said == "drop" else said
            if not isinstance(said, dict):
                errors.append(f"fields.{pattern}: `drop` or a mapping is expected")
                continue
            errors += [
                f"fields.{pattern}: unknown key {k!r}; known: {', '.join(sorted(_FIELD))}"
                for k in said
                if k not in _FIELD
            ]
            if any(c in pattern for c in "*?[") and "name" in said:
                errors.append(f"fields.{pattern}: a glob cannot have one name")
            fields[str(pattern)] = said
        texts = _mapping(raw, "text", errors)
        errors += [f"text.{k}: a text is expected" for k, v in texts.items() if not isinstance(v, str)]
        task = raw.get("task", "")
        if not isinstance(task, str | dict):
            errors.append("task: a name, or {name in the source: name here}")
        if errors:
            raise DataError(f"{where}: " + "; ".join(errors))
        about = {k: raw[k] for k in ("environment", "normalise", "random", "expert", "max_steps") if k in raw}
        return cls(task, about, fields, texts, _mapping(raw, "options", errors))

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            **self.about,
            "fields": dict(self.fields),
            "text": dict(self.text),
            "options": dict(self.options),
        }

    def task_name(self, name: str) -> str:
        return (self.task or name) if isinstance(self.task, str) else str(self.task.get(name, name))

    def said(self, name: str) -> dict[str, Any]:
        """What is said of a field: of its name, and before that of every glob that matches it."""
        out: dict[str, Any] = {}
        for pattern, said in self.fields.items():
            if pattern != name and fnmatch.fnmatchcase(name, pattern):
                out.update(said)
        out.update(self.fields.get(name, {}))
        return out

    def tasks(self, found: list[TaskSpec]) -> list[TaskSpec]:
        """The tasks as they will be stored. DataError where the file speaks of fields that no task has."""
        known = sorted({f.name for t in found for f in t.fields})
        for pattern in self.fields:
            if not fnmatch.filter(known, pattern) and pattern not in known:
                raise DataError(f"mapping: no field matches {pattern!r}; there are {', '.join(known)}")
        if isinstance(self.task, dict):
            for name in self.task:
                if name not in {t.name for t in found}:
                    raise DataError(f"mapping: no task {name!r}; there are {', '.join(t.name for t in found)}")
        out: dict[str, TaskSpec] = {}
        for task in found:
            one = self._task(task)
            if out.setdefault(one.name, one) != one:
                raise DataError(f"mapping: two tasks would be called {one.name!r}, and their fields differ")
        return list(out.values())

    def _task(self, task: TaskSpec) -> TaskSpec:
        fields: list[FieldSpec] = []
        for spec in task.fields:
            said = self.said(spec.name)
            if not said.get("drop"):
                fields.append(_field(spec, said))
        fields = [f for f in fields if f.name not in self.text]
        fields += [FieldSpec(name, "text", "text", "str", per="episode") for name in self.text]
        names = [f.name for f in fields]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DataError(f"mapping: two fields of task {task.name!r} are called {', '.join(twice)}")
        try:
            return replace(task, name=self.task_name(task.name), fields=tuple(fields), **self.about)
        except (TypeError, ValueError) as error:
            raise DataError(f"mapping: {error}") from None

    def episode(self, episode: Episode) -> Episode:
        fields: dict[str, Any] = {}
        for name, value in episode.fields.items():
            said = self.said(name)
            if not said.get("drop"):
                fields[said.get("name", name)] = value
        fields.update(self.text)
        return replace(episode, task=self.task_name(episode.task), fields=fields)

    def encodings(self, found: list[TaskSpec]) -> dict[str, Encoding]:
        """Field as it will be called -> Encoding, where the file names one."""
        out = {}
        for spec in (f for t in found for f in t.fields):
            said = self.said(spec.name)
            if "encoding" in said and not said.get("drop"):
                kind, frames, quality = said["encoding"], said.get("frames", 0), said.get("quality", 0)
                if not isinstance(frames, int) or not isinstance(quality, int):
                    raise DataError(f"mapping: fields.{spec.name}: frames and quality are whole numbers")
                out[said.get("name", spec.name)] = Encoding(str(kind), frames, quality)
        return out


def _field(spec: FieldSpec, said: Dict[str, Any]) -> FieldSpec:
    given: dict[str, Any] = {k: said[k] for k in ("name", "role", "modality", "values", "per") if k in said}
    for key in ("low", "high"):
        if said.get(key) is not None:
            value = said[key] if isinstance(said[key], list) else [said[key]]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
                raise DataError(f"mapping: fields.{spec.name}.{key}: a number or a list of numbers")
            given[key] = tuple(float(v) for v in value)
    if "dtype" in said:
        try:
            given["dtype"] = np.dtype(said["dtype"]).name
        except TypeError:
            raise DataError(f"mapping: fields.{spec.name}: {said['dtype']!r} is not a NumPy dtype") from None
        if spec.dtype == "str" or np.dtype(given["dtype"]).kind not in "biuf":
            raise DataError(f"mapping: fields.{spec.name}: dtype {given['dtype']} for a field of {spec.dtype}")
    return replace(spec, **given)


def _mapping(raw: dict[str, Any], key: str, errors: list[str]) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        errors.append(f"{key}: keys and values are expected")
        return {}
    return value


def _plain(node: Any, where: str, depth: int = 0) -> Any:
    """A composed YAML node as plain values. Duplicate keys and aliases are errors; `1e-5` is a number."""
    import yaml

    line = f"{where}, line {node.start_mark.line + 1}"
    if depth > 8:
        raise DataError(f"{line}: nested too deeply (an alias of itself?)")
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in out:
                raise DataError(f"{where}, line {key.start_mark.line + 1}: the key {name!r} stands there twice")
            out[name] = _plain(value, where, depth + 1)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(v, where, depth + 1) for v in node.value]
    value = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, str) and node.style is None:
        try:
            return float(value)
        except ValueError:
            return value
    return value
