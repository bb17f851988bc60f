"""`key=value` on the command line: changes of a recipe's values, before they are checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tiphys.plain_yaml import YamlError, read
from tiphys.recipes.keys import leaf_at
from tiphys.recipes.schema import Recipe

_PART = re.compile(r"([^.\[\]=]+)|\[([^\[\]]+)\]")
_PATH = re.compile(r"[^.\[\]=]+(\.[^.\[\]=]+|\[[^\[\]]+\])*")


def override(values: dict[str, Any], overrides: Iterable[str], errors: list[str]) -> None:
    """Change the values as `train.steps=100` or `data.mixture[0].weight=0.7` say. What cannot be done is added to the errors."""
    for item in overrides:
        try:
            _set(values, item)
        except ValueError as error:
            errors.append(f"override {item!r}: {error}")


def _set(values: dict[str, Any], item: str) -> None:
    key, sign, text = _split(item)
    if not sign or not _PATH.fullmatch(key):
        raise ValueError("write key=value, for instance train.steps=100")
    value = _value(key, text)
    node: Any = values
    *parents, last = (name or index for name, index in _PART.findall(key))
    at = ""
    for name in parents:
        node, at = _inner(node, name, at, make=True), f"{at}.{name}" if at else name
    if isinstance(node, list):
        _inner(node, last, at)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ValueError(f"{at} is {node!r}, not a section")


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
