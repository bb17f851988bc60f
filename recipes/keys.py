"""The facts about a key of a recipe beside its type and default: meaning, choices, range, unit, "may change on resume".

`schema.py` declares each key as a dataclass field made by `key(…)`; the facts lie in the metadata of the field. The schema check
(`load.py`), the resume check (`resume.py`) and the table in docs/recipes.md (`reference.py`) all read them from there.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from tiphys.recipes.sizes import parse_size
from tiphys.recipes.target_return import FORMS, TargetReturn


@dataclass(frozen=True)
class Key:
    """The facts about one key.

    help      what it means, in one sentence without the final dot
    unit      what a number counts
    choices   the words that are allowed, also of each string of a list
    text      what a string without choices holds: a folder, a name, …
    size      a string holds a number of bytes (`sizes.parse_size`)
    target    a string, or each string of a list or section, holds a target return (`target_return.TargetReturn`)
    path      a string holds a path or URL; `~` at its beginning is the home folder
    low, high     the lowest and the highest allowed number, themselves allowed
    above, below  the same, themselves not allowed
    also      further numbers that are allowed, outside the range
    words     words that may stand in place of a number
    resume    it may change between a checkpoint and its continuation
    """

    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    text: str = ""
    size: bool = False
    target: bool = False
    path: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    words: tuple[str, ...] = ()
    resume: bool = False

    def allowed(self) -> str:
        """The choices or the range in words; empty if neither is limited."""
        if self.choices:
            return ", ".join(self.choices)
        if self.size:
            return "for example 512MiB, 8GiB, 2TB"
        if self.target:
            return FORMS
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        limits = ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return "; or ".join([limits, *map(str, self.also), *self.words])

    def problem(self, value: Any) -> str:
        """Why a value of the key's type is not allowed; empty if it is."""
        if self.size:
            try:
                parse_size(value)
            except ValueError as error:
                return str(error)
        elif self.target:
            try:
                each = [value] if isinstance(value, str) else value.values() if hasattr(value, "values") else value
                for one in each:
                    TargetReturn.parse(one)
            except ValueError as error:
                return str(error)
        elif self.choices:
            each = [value] if isinstance(value, str | int | float) else value
            for one in (one for one in each if one not in self.choices):
                near = difflib.get_close_matches(str(one), self.choices, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                return f"{one!r} is not allowed; allowed: {self.allowed()}.{hint}"
        elif self.words and isinstance(value, str):
            return "" if value in self.words else f"{value!r} is not allowed; allowed: a number {self.allowed()}"
        elif isinstance(value, int | float) and not isinstance(value, bool) and not self._in_range(value):
            return f"{value!r} is out of range; allowed: {self.allowed()}"
        return ""

    def _in_range(self, value: float) -> bool:
        return value in self.also or (
            -math.inf < value < math.inf  # false for nan
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def key(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with a `Key` of these facts. If the default is a class (`list`, `dict`, a section), it is a factory."""
    metadata = {"key": Key(help, **facts)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(of: Field[Any]) -> Key:
    return typing.cast(Key, of.metadata["key"])


@cache
def section_fields(section: type) -> dict[str, tuple[Any, Field[Any]]]:
    """Name -> (type, field) of every key of a section."""
    hints = typing.get_type_hints(section)
    return {f.name: (hints[f.name], f) for f in fields(section)}


def subsection(hint: Any) -> tuple[str, type] | None:
    """("", section), ("list", section of an item) or ("dict", section of an item); None if keys of this type hold a value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return "", typing.cast(type, hint)
    if origin is list and is_dataclass(args[0]):
        return "list", typing.cast(type, args[0])
    if origin is dict and is_dataclass(args[1]):
        return "dict", typing.cast(type, args[1])
    return None


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value. In `path`, `*` stands for any index or name: `data.mixture[*].weight`, `objectives.*.context`."""

    path: str
    type: Any
    default: Any
    key: Key


def leaves(section: type, path: str = "") -> Iterator[Leaf]:
    """Every key below a section that holds a value, in the schema's order."""
    for name, (hint, of) in section_fields(section).items():
        at = f"{path}.{name}" if path else name
        inner = subsection(hint)
        if inner is None:
            default = of.default_factory() if of.default_factory is not MISSING else of.default
            yield Leaf(at, hint, default, key_of(of))
        else:
            shape, kind = inner
            yield from leaves(kind, at + {"": "", "list": "[*]", "dict": ".*"}[shape])


def leaf_at(section: type, path: str) -> Leaf | None:
    """The leaf of a key path without `*`, such as `data.mixture[0].weight`; None if the schema has none there."""
    return next((leaf for pattern, leaf in _patterns(section) if pattern.fullmatch(path)), None)


@cache
def _patterns(section: type) -> list[tuple[re.Pattern[str], Leaf]]:
    """A pattern of the key paths of each leaf. A name of one's own may stand in brackets: `fields[observation.image]`."""
    name = r"(\.[^.\[\]]+|\[[^\[\]]+\])"
    written = (re.escape(leaf.path).replace(r"\[\*\]", r"\[\d+\]").replace(r"\.\*", name) for leaf in leaves(section))
    return [(re.compile(pattern), leaf) for pattern, leaf in zip(written, leaves(section), strict=True)]
