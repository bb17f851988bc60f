"""Fields inferred from arrays and their names: role, modality, shape, and our name for what the formats call it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.convert.limits import FIELDS, TEXT_BYTES
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.inplace.kept import KeptVideo

# first part of a field's name -> how the formats spell it
_ALIASES = {
    "observation": "observation obs observations state states",
    "action": "action actions",
    "reward": "reward rewards",
    "terminated": "terminated terminal terminals termination terminations done dones is_terminal",
    "truncated": "truncated truncation truncations timeout timeouts",
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}
_TEXTS = re.compile(r"(^|[._])(text|texts|caption|captions|instruction|instructions|prompt|task|mission|utterance)s?$")
_EMBEDDING = re.compile(r"(language|instruction|text)\w*embedding")
# keys of JSON metadata; `task` is left out, because there it is the name of an environment
_LANGUAGE = re.compile(r"(^|_)(lang|language|text|caption|instruction|prompt|mission|utterance)s?$")
_METADATA_DEPTH = 3
_CHANNELS = (1, 2, 3, 4)
_SMALLEST_IMAGE = 16  # a smaller uint8 grid (MiniGrid's 7 × 7 × 3) holds codes, not colours


def canonical(name: str) -> str:
    """Our name: `obs.image` -> `observation.image`, `next.reward` -> `reward`. Other names are only made safe."""
    head, dot, rest = safe_name(name.removeprefix("next.")).partition(".")
    return _CANONICAL.get(head, head) + dot + rest


def safe_name(name: str) -> str:
    """The name with `_` for characters that names cannot have (spaces, slashes, …), at most 64 long, no empty parts."""
    parts = [p for p in re.sub(r"[^A-Za-z0-9_.-]", "_", name).split(".") if p]
    return ".".join(parts)[:64].rstrip(".") or "_"


def role_of(name: str, modality: str) -> str:
    """The usual role of a field with this canonical name; `info` if there is none."""
    head = name.partition(".")[0]
    if _EMBEDDING.search(name):
        return "info"
    if modality == "text":
        return "text" if head in ("observation", "text") or _TEXTS.search(name) else "info"
    if head in ("mask", "masks", "valid"):
        return "mask"
    return head if head in _ALIASES else "info"


def is_text_name(name: str) -> bool:
    """Whether a text of this name is a text for the model (an instruction, a caption, …), not only information."""
    return role_of(canonical(name), "text") == "text"


def language(metadata: Any, depth: int = 0) -> dict[str, str]:
    """The instructions and captions in JSON metadata: key -> text. A list of letters or words is joined."""
    out: dict[str, str] = {}
    if not isinstance(metadata, Mapping) or depth > _METADATA_DEPTH:
        return out
    for key, value in metadata.items():
        if isinstance(value, Mapping):
            out = language(value, depth + 1) | out
        elif _LANGUAGE.search(str(key)):
            if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                value = ("" if max(map(len, value)) == 1 else " ").join(value)
            if isinstance(value, str) and value:
                out[str(key)] = value
    return out


def renamed_role(role: str, name: str, modality: str) -> str:
    """The role of a field that a mapping file renames: the role that the new name states, else the role it had."""
    stated = role_of(name, modality)
    return stated if stated != "info" or name.partition(".")[0] in ("info", "infos") else role


def modality_of(dtype: np.dtype | str, shape: Sequence[int]) -> str:
    """Floats are continuous, uint8 arrays with the shape of an image are images, all other numbers are discrete."""
    if dtype == "str":
        return "text"
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return "continuous"
    if dtype == np.uint8 and is_image_shape(shape):
        return "image"
    return "discrete"


def is_image_shape(shape: Sequence[int]) -> bool:
    """Whether the shape is [H, W] or [H, W, C], at least 16 × 16, with at most 32 channels (stacked frames have many)."""
    if len(shape) == 2:
        return min(shape) >= _SMALLEST_IMAGE
    return len(shape) == 3 and min(shape[:2]) >= _SMALLEST_IMAGE and shape[2] <= 32


def channels_last(array: np.ndarray) -> np.ndarray:
    """uint8 images [T, H, W] or [T, C, H, W] as [T, H, W, C]. Other arrays are returned unchanged."""
    if array.dtype != np.uint8:
        return array
    shape = array.shape[1:]
    if len(shape) == 2 and is_image_shape(shape):
        return array[..., None]
    if len(shape) == 3 and shape[0] in _CHANNELS and min(shape[1:]) >= _SMALLEST_IMAGE and shape[2] not in _CHANNELS:
        return np.moveaxis(array, 1, -1)
    return array


def field_spec(name: str, dtype: Any, shape: Sequence[int], *, per: str = "step", **given: Any) -> FieldSpec:
    """A field from its name and dtype (NumPy's, or `str` for text). `given` overrides what would be inferred."""
    text = isinstance(dtype, str) and dtype == "str"
    if not text:
        dtype = np.dtype(dtype).newbyteorder("=")
        text = dtype.kind in "UST"
    kind = "str" if text else dtype.name
    modality = given.pop("modality", None) or modality_of(kind, shape)
    values = given.pop("values", None)
    if values is None:
        values = 2 if kind == "bool" else 0
    role = given.pop("role", None) or role_of(name, modality)
    return FieldSpec(
        name, role, modality, kind, () if text else tuple(int(s) for s in shape), values=values, per=per, **given
    )


def infer_task(
    name: str, episodes: Sequence[Episode], known: Mapping[str, FieldSpec] | None = None, **settings: Any
) -> TaskSpec:
    """A task from a few of its episodes, with the fields that all of them have.

    Text that does not change within any of these episodes becomes one text per episode. `known` gives fields that need
    no inference; `settings` are further attributes of the TaskSpec.
    """
    fields: list[FieldSpec] = []
    shared = sorted(set.intersection(*(set(e.fields) for e in episodes)))
    for key in shared:
        values = [e.fields[key] for e in episodes]
        per_episode = all(isinstance(v, str) or _row_count(v) is None for v in values)
        first = values[0]
        if isinstance(first, str) or (known and key in known and known[key].dtype == "str") or _is_text(first):
            fields.append(field_spec(key, "str", (), per="episode" if all(_constant(v) for v in values) else "step"))
        elif known and key in known:
            fields.append(known[key])
        else:
            array = np.asarray(first)
            shape = array.shape if per_episode else array.shape[1:]
            fields.append(field_spec(key, array.dtype, shape, per="episode" if per_episode else "step"))
    return TaskSpec(name, tuple(fields), **settings)


def _is_text(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "UST"


def _constant(value: Any) -> bool:
    return isinstance(value, str) or bool(np.all(value == value[:1]))


def _row_count(value: Any) -> int | None:
    return None if isinstance(value, str) or np.ndim(value) == 0 else len(value)


def texts(values: Iterable[str | bytes], where: str) -> np.ndarray:
    """Texts as an array of NumPy's StringDType. Raises DataError if one is not UTF-8, too long, or contains a NUL."""
    out = []
    for number, value in enumerate(values):
        if isinstance(value, bytes | np.bytes_):
            try:
                value = bytes(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}, row {number}: is not UTF-8 text ({error})") from None
        if not isinstance(value, str):
            raise DataError(f"{where}, row {number}: expected a text, not {type(value).__name__}")
        if len(value) > TEXT_BYTES:
            raise DataError(
                f"{where}, row {number}: the text has {len(value):,} characters; at most {TEXT_BYTES:,} are read"
            )
        if "\0" in value:
            raise DataError(f"{where}, row {number}: the text contains a NUL character")
        out.append(value)
    return np.array(out, dtype=StringDType())


def constant_text(array: np.ndarray, name: str, where: str) -> str:
    """The text of an episode, if all of its rows hold the same text."""
    first = str(array[0]) if len(array) else ""
    if len(array) and not bool(np.all(array == first)):
        raise DataError(
            f"{where}: {name!r} changes within this episode, but did not in those from which the fields were inferred; "
            f"write `fields: {{{name}: {{per: step}}}}` in a mapping file"
        )
    return first


def conform(episode: Episode, task: TaskSpec, where: str) -> Episode:
    """The episode with only the fields of its task, in the task's dtypes.

    Raises DataError if a field is missing, or if its rows, shape or values do not fit the task.
    """
    if len(task.fields) > FIELDS:
        raise DataError(f"{where}: has {len(task.fields):,} fields; at most {FIELDS:,} are read")
    fields: dict[str, Any] = {}
    for spec in task.fields:
        if spec.name not in episode.fields:
            raise DataError(
                f"{where}: lacks the field {spec.name!r} of task {task.name!r}; if it is not needed, drop it in a mapping file"
            )
        fields[spec.name] = _conform_field(episode.fields[spec.name], spec, episode.steps, where)
    return replace(episode, fields=fields)


def _conform_field(value: Any, spec: FieldSpec, steps: int, where: str) -> Any:
    if isinstance(value, KeptVideo):
        stream, rows = value.track.stream, len(value.frames)
        shape = spec.shape[:2]
        if spec.dtype != "uint8" or len(spec.shape) != 3 or shape != (stream.height, stream.width) or rows != steps:
            raise DataError(
                f"{where}: the video of {spec.name!r} has {rows} pictures of {stream.height} × {stream.width}, but the field has "
                f"{spec.dtype} {spec.shape} in {steps} rows"
            )
        return value
    if spec.dtype == "str":
        if spec.per == "episode":
            return value if isinstance(value, str) else constant_text(np.atleast_1d(value), spec.name, where)
        rows = max(steps, 1)
        array = np.full(rows, value, StringDType()) if isinstance(value, str) else np.asarray(value, StringDType())
    else:
        array = np.asarray(value)
        if array.dtype.kind in "USTO":
            raise DataError(f"{where}: field {spec.name!r} holds {array.dtype}, not {spec.dtype}")
        array = checked_cast(array, spec.dtype, f"{where}: field {spec.name!r}")
    shape = array.shape if spec.per == "episode" else array.shape[1:]
    same = len(shape) == len(spec.shape) and all(
        want in (0, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not same or (spec.per == "step" and not array.shape):
        raise DataError(f"{where}: field {spec.name!r} has shape {shape}, but its task says {spec.shape}")
    if spec.per == "step":
        max_rows = steps + 1 if spec.role in ("observation", "text", "mask", "info") or steps == 0 else steps
        if not max(steps, 1) <= len(array) <= max(max_rows, 1):
            raise DataError(f"{where}: field {spec.name!r} has {len(array)} rows for {steps} actions")
    return array
