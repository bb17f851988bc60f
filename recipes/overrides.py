"""`key=value` on the command line: changes of a recipe's values, before they are checked."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from typing import Any

from tiphys.plain_yaml import YamlError, read
from tiphys.recipes.keys import leaf_at, section_fields, subsection
from tiphys.recipes.schema import Recipe

_PART = re.compile(r"([^.\[\]=]+)|\[([^\[\]]+)\]")
_PATH = re.compile(r"[^.\[\]=]+(\.[^.\[\]=]+|\[[^\[\]]+\])*")


def override(values: dict[str, Any], overrides: Iterable[str], errors: list[str]) -> dict[str, str]:
    """Change the values as `train.steps=100` or `data.mixture[0].weight=0.7` say. What cannot be done is added to the errors.

    Returns key path -> the override that wrote it.
    """
    written: dict[str, str] = {}
    for item in overrides:
        try:
            written[_set(values, item)] = item
        except ValueError as error:
            errors.append(f"override {item!r}: {error}")
    return written


def _set(values: dict[str, Any], item: str) -> str:
    """Change one value. Returns its key path as errors name it: `data.mixture[0].weight`, `objectives.bc.fields.a.b.bins`."""
    key, sign, text = _split(item)
    if not sign or not _PATH.fullmatch(key):
        raise ValueError("write key=value, for instance train.steps=100")
    *parents, last = names = _names(_PART.findall(key))
    value = _value(_written(names), text)
    if isinstance(value, dict):
        *parents, last = _names(_PART.findall(key), of_section=True)
    node: Any = values
    at = ""
    for name in parents:
        node, at = _inner(node, name, at, make=True), _below(node, at, name)
    if isinstance(node, list):
        _inner(node, last, at)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ValueError(f"{at} is {node!r}, not a section")
    return _below(node, at, last)


def _below(node: Any, at: str, name: str) -> str:
    """The key path of an element of `node`, whose own path is `at`."""
    if isinstance(node, list):
        return f"{at}[{int(name)}]"
    return f"{at}.{name}" if at else name


def _names(parts: list[tuple[str, str]], *, of_section: bool = False) -> list[str]:
    """The keys of a path, where a name of one's own may contain dots: `fields.observation.state.bins` has the field
    `observation.state`.

    parts       (name, "") or ("", name in brackets) of each part of the path
    of_section  the value is a section, so a path that ends without a known key ends with a name
    """
    section: type | None = Recipe
    names: list[str] = []
    at = 0
    while at < len(parts):
        names.append(parts[at][0] or parts[at][1])
        hint = section_fields(section).get(names[-1], (None,))[0] if section else None
        inner, at = subsection(hint), at + 1
        section = inner[1] if inner else None
        if inner and inner[0] == "list" and at < len(parts):
            names.append(parts[at][0] or parts[at][1])
            at += 1
        elif inner and inner[0] == "dict" and at < len(parts):
            assert section is not None
            end = at + 1 if parts[at][1] else _end_of_name(section, [name for name, _ in parts], at, of_section)
            names.append(".".join(name or index for name, index in parts[at:end]))
            at = end
        elif at < len(parts) and (hint == dict[str, str] or names == ["model", "init_map"]):
            names.append(".".join(name or index for name, index in parts[at:]))
            break
    return names


def _end_of_name(section: type, parts: list[str], at: int, of_section: bool) -> int:
    """Where a name that begins at `at` ends: before the first known key of its section, else before the last part."""
    known = section_fields(section)
    ends = (
        i
        for i in range(at + 1, len(parts))
        if parts[i] in known and (i + 1 == len(parts) or _has_keys(known[parts[i]][0]))
    )
    return next(ends, len(parts) if of_section else max(at + 1, len(parts) - 1))


def _has_keys(hint: Any) -> bool:
    return subsection(hint) is not None or typing.get_origin(hint) in (dict, list)


def _written(names: list[str]) -> str:
    """The key path of these names, with brackets around those that contain a dot."""
    path = names[0]
    for name in names[1:]:
        path += f"[{name}]" if "." in name or name.isdecimal() else f".{name}"
    return path


def _split(item: str) -> tuple[str, str, str]:
    """Key, `=` and value. A key in brackets, such as `fields[a=b]`, may contain the sign."""
    found = re.match(r"((?:[^=\[]|\[[^\]]*\])*)(=)(.*)", item, re.DOTALL)
    return (found[1], found[2], found[3]) if found else (item, "", "")


def _inner(node: Any, name: str, at: str, *, make: bool = False) -> Any:
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise ValueError(f"{at} has {len(node)} entries, numbered from 0; there is no {name!r}")
        return node[int(name)]
    if not isinstance(node, dict):
        raise ValueError(f"{at} is {node!r}, not a section")
    if make and node.get(name) is None:
        node[name] = {}
    return node.get(name)


def _value(key: str, text: str) -> Any:
    """The value as YAML. Where the schema wants a text, it is the text itself: the shell takes quotes away."""
    leaf = leaf_at(Recipe, key)
    words = leaf is not None and leaf.type is str and not text.lstrip().startswith(("'", '"'))
    try:
        value = read(text, "value").values
    except YamlError as error:
        if words:
            return text
        raise ValueError("; ".join(line.removeprefix("value:1: ") for line in error.errors)) from None
    if words and not (isinstance(value, bool) and leaf is not None and {"yes", "no"} <= set(leaf.key.choices)):
        return text
    return value
