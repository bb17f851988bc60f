"""YAML that people write, as plain values: mappings with text keys, lists, texts, numbers, true and false, null.

Recipes, mapping files and the recipe of a run are read by `read`. They may come from strangers, so size, depth and number of
values are bounded, and tags, anchors and aliases are refused. A word that YAML readers disagree about is refused too, unless it
is in quotes. `dump` writes values that `read` reads back unchanged. This module imports nothing else of Tiphys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000
DEEPEST = 24

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0b[01]+")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{word: True for base in ("true", "yes", "on") for word in (base, base.title(), base.upper())},
    **{word: False for base in ("false", "no", "off") for word in (base, base.title(), base.upper())},
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_DISPUTED = {
    "a date": re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?"),
    "a number in base 60": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    "an octal number": re.compile(r"[-+]?0[0-9_]+|0o[0-7]+"),
    "a number that is not finite": re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE),
}
_LONGEST_NUMBER = 40  # characters


class YamlError(ValueError):
    """Everything that is wrong with a YAML file, one line each in `errors`. A line names the file and the line in it."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


@dataclass(frozen=True)
class Document:
    """A YAML file as plain values.

    values   mappings have text keys, as they are written
    lines    path of a value, such as `data.mixture[0].weight` -> its line, from 1
    written  path of a value without quotes that is not a text -> how it is written
    """

    values: Any
    lines: dict[str, int] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


def read(data: bytes | str, name: str) -> Document:
    """Read a YAML document. An empty one has the value None.

    Parameters
    ----------
    data
        The document. Bytes must be UTF-8.
    name
        The file, for messages.

    Raises
    ------
    YamlError
        If it is not UTF-8, not YAML, too large or too deep; if it has tags, anchors, aliases, keys that are not texts or appear
        twice, or a word without quotes that YAML readers disagree about.
    """
    import yaml

    text = data if isinstance(data, str) else decode(data, name)
    if len(text) > MOST_BYTES:
        raise YamlError([f"{name}: is larger than {MOST_BYTES} bytes"])
    reader = _Reader(name, yaml)
    try:
        return reader.document(iter(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = " ".join(part for part in (error.context, error.problem) if part)
        hint = " (indent with spaces, not with tabs)" if "\\t" in why or _has_tab(text, mark) else ""
        raise YamlError([f"{name}:{mark.line + 1 if mark else 1}: not YAML: {why}{hint}"]) from None
    except yaml.YAMLError as error:
        raise YamlError([f"{name}: not YAML: {' '.join(str(error).split())}"]) from None


def _has_tab(text: str, mark: Any) -> bool:
    lines = text.splitlines()
    return bool(mark) and mark.line < len(lines) and "\t" in re.match(r"\s*", lines[mark.line])[0]  # type: ignore[index]


def decode(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without a byte order mark. Raises YamlError that says what is wanted if they are not UTF-8 text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:4].count(0) >= 2:
        raise YamlError([f"{name}: is UTF-16 or UTF-32, or no text; save it as UTF-8"])
    if b"\0" in data:
        raise YamlError([f"{name}: is not a text file (byte {data.index(0)} is 0); a YAML file in UTF-8 is expected"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"{name}:{data.count(10, 0, error.start) + 1}"
        byte = f"byte {error.start} (0x{data[error.start]:02x})"
        raise YamlError([f"{at}: is not UTF-8: {byte}; save it as UTF-8 (it may be Windows-1252 or Latin-1)"]) from None


def scalar(text: str) -> Any:
    """The value of a word without quotes. Raises ValueError if YAML readers disagree about it."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for what, pattern in _DISPUTED.items():
        if pattern.fullmatch(text):
            raise ValueError(f'{text} can be read as {what}; write it in quotes, "{text}", if it is a text')
    number = int if _INT.fullmatch(text) else float if _FLOAT.fullmatch(text) else None
    if number is None:
        return text
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters is too long; write it in quotes if it is a text")
    value = int(text, 0) if number is int else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number; write it in quotes if it is a text")
    return value


def is_word(text: str) -> bool:
    """Whether `scalar` gives the text itself, so that it needs no quotes."""
    try:
        return scalar(text) == text
    except ValueError:
        return False


def dump(values: Any) -> str:
    """Plain values as YAML that `read` gives back: a text that looks like a number, a date or true is put in quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = None if is_word(value) and value.isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


class _Reader:
    """Makes values of the events of one document."""

    def __init__(self, name: str, yaml: Any) -> None:
        self.name, self.yaml = name, yaml
        self.errors: list[str] = []
        self.lines: dict[str, int] = {}
        self.written: dict[str, str] = {}
        self.count = 0

    def document(self, events: Iterator[Any]) -> Document:
        values, documents = None, 0
        for event in events:
            if isinstance(event, self.yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.fail(event, "a second document begins; one file holds one document")
                values = self.value(next(events), events, "", 0)
        if self.errors:
            raise YamlError(self.errors)
        return Document(values, self.lines, self.written)

    def at(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}"

    def fail(self, event: Any, why: str) -> NoReturn:
        raise YamlError([*self.errors, f"{self.at(event)}: {why}"])

    def value(self, event: Any, events: Iterator[Any], path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            self.fail(event, f"more than {MOST_VALUES} values")
        if depth > DEEPEST:
            self.fail(event, f"nested more than {DEEPEST} levels deep")
        if isinstance(event, self.yaml.AliasEvent):
            self.fail(event, f"*{event.anchor} is an alias; aliases are not allowed: write the value out")
        if event.anchor:
            self.fail(
                event, f"&{event.anchor} is an anchor; anchors are not allowed: write the value out where it is used"
            )
        if event.tag is not None:
            self.fail(event, f"{event.tag} is a tag; tags are not allowed (quotes make a text)")
        if isinstance(event, self.yaml.MappingStartEvent):
            return self.mapping(events, path, depth)
        if isinstance(event, self.yaml.SequenceStartEvent):
            return self.sequence(events, path, depth)
        if event.style or not event.implicit[0]:
            return event.value
        try:
            value = scalar(event.value)
        except ValueError as error:
            self.errors.append(f"{self.at(event)}: {path + ': ' if path else ''}{error}")
            return None
        if not isinstance(value, str):
            self.written[path] = event.value
        return value

    def mapping(self, events: Iterator[Any], path: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, int] = {}
        while not isinstance(key := next(events), self.yaml.MappingEndEvent):
            if not isinstance(key, self.yaml.ScalarEvent) or key.anchor or key.tag:
                self.fail(key, "a key must be a text, without anchor or tag")
            name, line = key.value, key.start_mark.line + 1
            if name == "<<" and not key.style:
                self.fail(key, "<< merges mappings; this is not allowed: write the keys out")
            at = f"{path}.{name}" if path else name
            if name in out:
                self.errors.append(f"{self.name}:{line}: {at}: this key appears twice, first on line {first[name]}")
            else:
                self.lines[at], first[name] = line, line
            value = self.value(next(events), events, at, depth + 1)
            out.setdefault(name, value)
        return out

    def sequence(self, events: Iterator[Any], path: str, depth: int) -> list[Any]:
        out: list[Any] = []
        while not isinstance(event := next(events), self.yaml.SequenceEndEvent):
            at = f"{path}[{len(out)}]"
            self.lines[at] = event.start_mark.line + 1
            out.append(self.value(event, events, at, depth + 1))
        return out
