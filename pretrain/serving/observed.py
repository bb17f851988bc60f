"""What a client of a policy server sends, as the fields of a task: names, shapes and pictures as others write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.observation import same_numbers
from tiphys.pretrain.acting.processor import Processor

# Names under which clients send what is to be done
WORDS = ("prompt", "task_description", "instruction", "language_instruction", "task")


@dataclass(frozen=True)
class Needed:
    """What a policy needs to see at each step of a task.

    Attributes
    ----------
    task, objective : str
        Their names.
    fields : mapping of str to FieldSpec
        The observations, and the fields that tell which actions can be taken.
    texts : sequence of str
        Names of the texts.
    """

    task: str
    objective: str
    fields: Mapping[str, FieldSpec]
    texts: Sequence[str]

    @classmethod
    def of(cls, processor: Processor, task: str, objective: str = "") -> Needed:
        """Raises DataError if the policy was not trained on the task, or not with this objective."""
        try:
            name = objective or processor.objective(task)
        except KeyError as error:
            raise DataError(str(error.args[0])) from None
        if task not in processor.layouts.get(name, {}):
            raise DataError(f"task {task!r} was not trained with an objective {name!r}")
        layout = processor.layouts[name][task]
        spec, used = processor.tasks[task], processor.used_fields(task, name)
        seen = [f.name for f in spec.with_role("observation") if f.name in used]
        seen += [e.field for e in layout.elements if e.role == "observation"]
        masks = [e.available for e in layout.elements if e.available]
        texts = (*layout.preamble, *(e.field for e in layout.elements if e.role == "text"))
        return cls(task, name, {n: spec.field(n) for n in dict.fromkeys([*seen, *masks])}, texts)

    def shapes(self) -> dict[str, dict[str, Any]]:
        """Name -> what is expected, as JSON."""
        found: dict[str, dict[str, Any]] = {
            name: {"modality": f.modality, "dtype": f.dtype, "shape": list(f.shape)} for name, f in self.fields.items()
        }
        return found | {name: {"modality": "text", "dtype": "str", "shape": []} for name in self.texts}

    def expected(self) -> str:
        """All fields with their shapes, for a message."""
        shown = [f"{name} {list(f.shape)} ({f.dtype})" for name, f in self.fields.items()]
        return ", ".join([*shown, *(f"{name} (text)" for name in self.texts)])


@dataclass(frozen=True)
class Sent:
    """What a client sent in one request.

    Attributes
    ----------
    values : mapping of str to value
        Dotted names, after renaming, to values.
    words : str or None
        What is to be done, in words.
    """

    values: Mapping[str, Any]
    words: str | None = None


@dataclass(frozen=True)
class Names:
    """How names of clients become names of fields: `/` is a dot, and `renamed` goes first.

    Attributes
    ----------
    renamed : mapping of str to str
        A client's name, dotted -> the name of a field.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Names:
        """From ``CLIENT=FIELD`` words of a command line. Raises DataError if one has another form."""
        renamed = {}
        for word in words:
            client, found, name = word.partition("=")
            if not (found and client and name):
                raise DataError(f"--map {word!r} is not of the form client/name=field.name")
            renamed[dotted(client)] = dotted(name)
        return cls(renamed)

    def sent(self, message: Mapping[str, Any]) -> Sent:
        """The values of a message by dotted names, and its words."""
        values: dict[str, Any] = {}
        words = None
        for name, value in _flat(message, ""):
            target = self.renamed.get(name, name)
            if target in values:
                raise DataError(f"{name!r} and another name of the message both mean {target!r}; rename one with --map")
            values[target] = value
        for name in WORDS:
            text = as_text(values.get(name))
            if words is None and text is not None:
                words = text
        return Sent(values, words)


def fit(needed: Needed, sent: Sent) -> dict[str, Any]:
    """The fields that a policy needs, from what a client sent. What it does not need is left out.

    Raises
    ------
    DataError
        If a field is missing or has another shape, or a value is NaN: the message says what was sent and how to rename it.
    """
    out: dict[str, Any] = {}
    for name, spec in needed.fields.items():
        found = _named(sent.values, name)
        if found is None:
            raise DataError(_missing(needed, sent, name))
        out[name] = fitted(sent.values[found], spec, found)
    missing = [name for name in needed.texts if _named(sent.values, name) is None]
    for name in needed.texts:
        if name not in missing:
            text = as_text(sent.values[_named(sent.values, name) or name])
            if text is None:
                raise DataError(f"{name!r} must be a text")
            out[name] = text
    if missing and sent.words is None:
        raise DataError(f"no instruction was given: send the text {missing[0]!r}, or `prompt`")
    if len(missing) > 1:
        raise DataError(f"task {needed.task!r} needs the texts {', '.join(missing)}; send them by these names")
    return out | dict.fromkeys(missing, sent.words)


def misfit(needed: Needed, sent: Sent) -> str:
    """Why what was sent cannot be of this task, by names and shapes; empty if it can."""
    for name, spec in needed.fields.items():
        found = _named(sent.values, name)
        if found is None:
            return _missing(needed, sent, name)
        try:
            fitted(sent.values[found], spec, found)
        except DataError as error:
            return str(error)
    return ""


def fitted(value: Any, spec: FieldSpec, sent_as: str) -> np.ndarray:
    """One value as its field holds it. Pictures may have colours first, and may hold fractions from 0 to 1."""
    if spec.modality == "text":
        text = as_text(value)
        if text is None:
            raise DataError(f"{sent_as!r} must be a text")
        return np.asarray(text)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{sent_as!r} must hold numbers")
    if spec.modality == "image":
        array = _picture(array, spec, sent_as)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise DataError(f"{sent_as!r} holds NaN at {np.argwhere(np.isnan(array))[0].tolist()}; send a number")
    if not same_numbers(array.shape, spec.shape):
        raise DataError(f"{sent_as!r} has shape {list(array.shape)}, but {spec.name} needs {list(spec.shape)}")
    if 0 not in spec.shape:
        array = array.reshape(spec.shape)
    if np.dtype(spec.dtype).kind != array.dtype.kind:
        array = checked_cast(array, spec.dtype, repr(sent_as), f"send {spec.dtype}")
    return array


def _picture(array: np.ndarray, spec: FieldSpec, sent_as: str) -> np.ndarray:
    if len(spec.shape) == 3 and array.ndim == 3 and not _may_be(array.shape, spec.shape):
        turned = np.moveaxis(array, 0, -1)
        if _may_be(turned.shape, spec.shape):
            array = turned
    if array.dtype.kind == "f" and spec.dtype == "uint8":
        if not ((array >= 0) & (array <= 1)).all():
            raise DataError(f"{sent_as!r} is a picture of floats outside 0 … 1; send uint8, or fractions from 0 to 1")
        array = np.rint(array * 255.0).astype(np.uint8)
    return array


def _may_be(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(0 in (a, b) or a == b for a, b in zip(shape, wanted, strict=True))


def as_text(value: Any) -> str | None:
    """A text, also if it came as an array of one text; None if it is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "US":
        found = value.reshape(-1)[0]
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
    return None


def dotted(name: str) -> str:
    return name.replace("/", ".").strip(".")


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(name, value)]
    parts = ((f"{name}.{dotted(key)}" if name else dotted(key), part) for key, part in value.items())
    return [pair for key, part in parts for pair in _flat(part, key)]


def _named(values: Mapping[str, Any], name: str) -> str | None:
    """Under which name a field was sent: its own, or its name below `observation`."""
    short = name.removeprefix("observation.")
    return next((one for one in (name, short) if one in values), None)


def _missing(needed: Needed, sent: Sent, name: str) -> str:
    there = ", ".join(
        f"{n} {list(np.shape(v))}" if not isinstance(v, str) else f"{n} (text)" for n, v in sent.values.items()
    )
    known = {one for n in (*needed.fields, *needed.texts) for one in (n, n.removeprefix("observation."))}
    spare = next((n for n, v in sent.values.items() if n not in known and not isinstance(v, str)), "its/name")
    return (
        f"task {needed.task!r} needs {name} {list(needed.fields[name].shape)}, which was not sent; sent were {there or 'none'}. "
        f"If one of them is meant, start the server with --map {spare}={name}"
    )
