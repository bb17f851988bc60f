"""Types and ranges of values in `deepspeed:`, which YAML gives as texts, numbers, lists and sections."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tiphys.recipes.keys import Key

Error: TypeAlias = tuple[str, str]  # key path in the recipe, reason
NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a section",
}


@dataclass(frozen=True)
class Value:
    """What a key may hold: one of the types, and the choices or the range of a `Key`."""

    type: type
    key: Key = field(default=Key(""))


def switch() -> Value:
    return Value(bool)


def number(**facts: Any) -> Value:
    return Value(float, Key("", **facts))


def whole(**facts: Any) -> Value:
    return Value(int, Key("", **facts))


def text(*choices: str) -> Value:
    return Value(str, Key("", choices=choices))


def problem(wanted: Value, value: Any) -> str:
    """Why a value is not allowed; empty if it is."""
    return type_problem(wanted.type, value) or wanted.key.problem(value)


def type_problem(wanted: type, value: Any, *, integral: bool = False) -> str:
    """Why a value does not have the type; empty if it has. `integral`: a number such as 5e8 is a whole number too."""
    if wanted is float and _is_number(value) and math.isfinite(value):
        return ""
    if wanted is int and _is_number(value) and (isinstance(value, int) or (integral and float(value).is_integer())):
        return ""
    if wanted not in (int, float) and isinstance(value, wanted):
        return _home(value)
    hint = ""
    if isinstance(value, str) and wanted in (bool, int, float):
        hint = "; write it without quotes" if _reads_as(wanted, value) else ""
    elif wanted is int and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return f"must be {NAMES[wanted]}, not {'the text ' if isinstance(value, str) else ''}{value!r}{hint}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reads_as(wanted: type, text: str) -> bool:
    if wanted is bool:
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    try:
        float(text)
    except ValueError:
        return False
    return True


def _home(value: Any) -> str:
    return (
        "write the whole path: DeepSpeed does not know `~`" if isinstance(value, str) and value.startswith("~") else ""
    )


def unknown(key: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """Says that a key is unknown. `others`: what people write -> the key that they mean."""
    names = sorted(known)
    meant = (others or {}).get(key)
    near = [meant] if meant in names else difflib.get_close_matches(key, names, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}"
    return f"DeepSpeed has no such key{hint}"


def table_errors(path: str, values: Mapping[str, Any], known: Mapping[str, Value]) -> Iterator[Error]:
    """What is wrong with the values of a section, by a table of its keys. `auto` is left to DeepSpeed's default."""
    for name, value in values.items():
        if name not in known:
            yield f"{path}.{name}", unknown(name, known)
        elif value != "auto" and (wrong := problem(known[name], value)):
            yield f"{path}.{name}", wrong
