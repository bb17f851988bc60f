"""What the schema finds wrong with a recipe's plain values: unknown keys, wrong types, missing and forbidden values."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from dataclasses import make_dataclass
from functools import cache
from typing import Any, Protocol

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiphys.paths import expand
from tiphys.recipes.keys import Key, key_of, section_fields, subsection
from tiphys.recipes.schema import Recipe


class Where(Protocol):
    """Names the place of a key path for messages: `file:line: key path`."""

    def __call__(self, path: str) -> str: ...

    def written(self, path: str) -> str:
        """How the file writes the value; empty if it is not known."""


def schema_errors(values: Any, where: Where) -> Iterator[str]:
    """What is wrong with the values of a whole recipe, one line each."""
    yield from _check(Recipe, values, "", where)


def adapted(section: type, values: Any) -> Any:
    """A copy of the values in the forms of the schema: sizes are texts, `~` in a path is replaced, and true and false are the
    words yes and no if those are choices of the key (YAML reads `no` without quotes as false).
    """
    if not isinstance(values, dict):
        return values
    known = section_fields(section)
    copy: dict[Any, Any] = {}
    for name, value in values.items():
        hint, of = known.get(name, (None, None))
        inner = subsection(hint)
        if inner is not None:
            shape, kind = inner
            if shape == "list" and isinstance(value, list):
                value = [adapted(kind, item) for item in value]
            elif shape == "dict" and isinstance(value, dict):
                value = {part: adapted(kind, item) for part, item in value.items()}
            elif not shape:
                value = adapted(kind, value)
        elif of is not None:
            value = _adapted_value(key_of(of), value)
        copy[name] = value
    return copy


def _adapted_value(key: Key, value: Any) -> Any:
    if isinstance(value, bool) and {"yes", "no"} <= set(key.choices):
        return "yes" if value else "no"
    if key.size and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key.words and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if key.target:
        if isinstance(value, dict):
            return {name: _as_text(one) for name, one in value.items()}
        return [_as_text(one) for one in value] if isinstance(value, list) else _as_text(value)
    if key.path and isinstance(value, str):
        try:
            return expand(value)
        except ValueError:
            return value  # `_check_value` says why
    return value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check(section: type, values: Any, path: str, where: Where) -> Iterator[str]:
    """What is wrong with the values of a section, depth first."""
    if not isinstance(values, dict):
        yield f"{where(path)}: must be a section with keys, not {values!r}"
        return
    known = section_fields(section)
    for name, value in values.items():
        at = f"{path}.{name}" if path else str(name)
        if name in known:
            yield from _check_key(section, name, value, at, where)
        else:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(sorted(known))}."
            yield f"{where(at)}: unknown key. {hint}"
    for name in _missing(section, values):
        yield f"{where(f'{path}.{name}' if path else name)} is missing"


def _check_key(section: type, name: str, value: Any, at: str, where: Where) -> Iterator[str]:
    hint, _ = section_fields(section)[name]
    inner = subsection(hint)
    if inner is None:
        yield from _check_value(section, name, value, at, where)
        return
    shape, kind = inner
    if shape == "list":
        if not isinstance(value, list):
            yield f"{where(at)}: must be a list, not {value!r}"
            return
        for i, item in enumerate(value):
            yield from _check(kind, item, f"{at}[{i}]", where)
    elif shape == "dict":
        if not isinstance(value, dict):
            yield f"{where(at)}: must be a section of named parts, not {value!r}"
            return
        for part, item in value.items():
            yield from _check(kind, item, f"{at}.{part}", where)
    else:
        yield from _check(kind, value, at, where)


def _check_value(section: type, name: str, value: Any, at: str, where: Where) -> Iterator[str]:
    hint, of = section_fields(section)[name]
    if value is None or value == "???":
        yield f"{where(at)}: a value is missing"
        return
    if isinstance(value, str) and "${" in value:
        return  # an error of its own
    wrong = list(_not_texts(hint, key_of(of), value, at, where))
    if wrong:
        yield from wrong
        return
    for container, kind in ((list, "a list"), (dict, "a section with keys")):
        if (typing.get_origin(hint) or hint) is container and not isinstance(value, container):
            yield f"{where(at)}: must be {kind}, not {value!r}"
            return
    try:
        read: Any = OmegaConf.merge(_schema_of(section, name), {name: value})
    except (OmegaConfBaseException, OverflowError, TypeError, ValueError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint)
        if hint == float | str:
            wanted = " or ".join(["a number", *key_of(of).words])
        allowed = key_of(of).allowed()
        more = f"; allowed: {allowed}" if allowed and hint != float | str else ""
        yield f"{where(at)}: must be {wanted}, not {value!r}{more}" if wanted else f"{where(at)}: {first_line(error)}"
        return
    problem = key_of(of).problem(read[name])
    if problem:
        yield f"{where(at)}: {problem}"


@cache
def _schema_of(section: type, name: str) -> Any:
    """The schema of one key alone: `OmegaConf.merge` copies all of a schema, and it is called for each value of a recipe."""
    hint, of = section_fields(section)[name]
    return OmegaConf.structured(make_dataclass(section.__name__, [(name, hint, of)]))


def _not_texts(hint: Any, key: Key, value: Any, at: str, where: Where) -> Iterator[str]:
    """Values that are not texts although the key wants texts: YAML reads a word without quotes as something else."""
    if key.choices:
        return
    if hint == list[str] and isinstance(value, list):
        texts = {f"{at}[{i}]": item for i, item in enumerate(value)}
    elif hint == dict[str, str] and isinstance(value, dict):
        texts = {f"{at}.{name}": item for name, item in value.items()}
    elif hint is str:
        texts = {at: value}
    else:
        return
    for path, item in texts.items():
        if not isinstance(item, str):
            kind = {bool: "true or false", type(None): "nothing"}.get(type(item), "a number")
            kind = "a list or a section" if isinstance(item, list | dict) else kind
            written = where.written(path) or str(item)
            quotes = "" if isinstance(item, list | dict) else f'; write it in quotes: "{written}"'
            yield f"{where(path)}: must be a text, but YAML reads {written} as {kind}{quotes}"
        elif key.path and item.startswith("~"):
            try:
                expand(item)
            except ValueError as error:
                yield f"{where(path)}: {error}"


def _missing(section: type, values: dict[str, Any]) -> Iterator[str]:
    """Keys without a default that the values do not have, also in sections that are left out."""
    for name, (hint, of) in section_fields(section).items():
        inner = subsection(hint)
        if name in values:
            continue
        if of.default == MISSING:
            yield name
        elif inner is not None and not inner[0]:
            yield from (f"{name}.{below}" for below in _missing(inner[1], {}))


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
