"""Recipes from files and plain values, and back. All errors of a recipe are found before any is raised."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiphys.recipes.keys import key_of, section_fields, subsection
from tiphys.recipes.schema import Recipe

FOLDER = Path(__file__).parent


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line each in `errors`."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        count = len(self.errors)
        super().__init__(f"{count} error{'s' if count > 1 else ''} in the recipe:\n" + "\n".join(self.errors))


@dataclass(frozen=True)
class Examined:
    """A recipe as it was written: plain values, what the schema finds wrong with them, and where each key is."""

    file: Path
    raw: dict[str, Any]
    errors: list[str]
    where: Callable[[str], str]  # key path -> `file:line: key path`


def examine(path: str | Path, overrides: Iterable[str] = ()) -> Examined:
    """Read a recipe and list what the schema finds wrong. Raises RecipeError only if it cannot be read at all."""
    file = find(path)
    errors: list[str] = []
    raw, lines = _read(file)
    raw = _as_words(Recipe, _override(raw, overrides, errors))
    where = _Where(str(file), lines)
    errors.extend(_check(Recipe, raw, "", where))
    return Examined(file, raw, errors, where)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file, or a recipe that is installed with Tiphys by its name, and apply overrides.

    Parameters
    ----------
    path
        A YAML file, or the name of an installed recipe such as `quickstart`.
    overrides
        `key=value`, for instance `train.steps=100` or `data.mixture[0].weight=0.7`.

    Returns
    -------
    Recipe
        With all defaults filled in.

    Raises
    ------
    RecipeError
        With every unknown key, wrong type, missing value, and value outside the allowed choices or range.
    """
    seen = examine(path, overrides)
    if seen.errors:
        raise RecipeError(seen.errors)
    return from_dict(seen.raw, str(seen.file))


def find(path: str | Path) -> Path:
    """The recipe's file: `path` itself, or the installed recipe of this name. Raises RecipeError if there is neither."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    near = difflib.get_close_matches(str(path), shipped)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError([f"{path}: neither a file nor an installed recipe ({', '.join(shipped)}).{hint}"])


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with every default written out."""
    container = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)
    assert isinstance(container, dict)
    return typing.cast(dict[str, Any], container)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """The inverse of `to_dict`. Errors name `source`. Raises RecipeError with everything that is wrong."""
    where = _Where(source, {})
    values = _as_words(Recipe, values)
    errors = list(_check(Recipe, values, "", where))
    if errors:
        raise RecipeError(errors)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise RecipeError([f"{source}: {_first_line(error)}"]) from None
    assert isinstance(recipe, Recipe)
    if any(_interpolated(value) for _, value in _leaves(values)):  # their values are known only now
        errors = list(_check(Recipe, to_dict(recipe), "", where))
        if errors:
            raise RecipeError(errors)
    return recipe


def digest(recipe: Recipe) -> str:
    """SHA-256 of the recipe with its defaults, by which checkpoints and model cards name it."""
    return hashlib.sha256(json.dumps(to_dict(recipe), sort_keys=True).encode()).hexdigest()


def differences(a: Recipe, b: Recipe) -> list[str]:
    """`key: value in a -> value in b` for every value that differs."""
    one, two = dict(_leaves(to_dict(a))), dict(_leaves(to_dict(b)))
    return [
        f"{key}: {one.get(key, '(absent)')!r} -> {two.get(key, '(absent)')!r}"
        for key in sorted({*one, *two})
        if one.get(key, _ABSENT) != two.get(key, _ABSENT)
    ]


_ABSENT = object()


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and node:
        for i, value in enumerate(node):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        yield path, node


class _Where:
    """Turns a key path into `file:line: path`. A key that is not in the file has the line of its section."""

    def __init__(self, file: str, lines: dict[str, int]) -> None:
        self.file, self.lines = file, lines

    def __call__(self, path: str) -> str:
        shown, parent = path, path
        while parent and parent not in self.lines:
            parent = parent[: max(parent.rfind("."), parent.rfind("["), 0)]
        return f"{self.file}:{self.lines[parent]}: {shown}" if parent else f"{self.file}: {shown}"


def _read(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    text = file.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = list(_repeated(node, ""))
        if repeated:
            raise RecipeError([f"{file}:{line}: {path}: this key appears twice" for path, line in repeated])
        # OmegaConf reads 1e-5 as a number, PyYAML as a string.
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except yaml.YAMLError as error:
        raise RecipeError([f"{file}: not YAML: {' '.join(str(error).split())}"]) from None
    except OmegaConfBaseException as error:
        raise RecipeError([f"{file}: {_first_line(error)}"]) from None
    if not isinstance(loaded, dict):
        raise RecipeError([f"{file}: a recipe must be a mapping of sections, not a {type(loaded).__name__}"])
    return typing.cast(dict[str, Any], loaded), dict(_lines(node, ""))


def _children(node: Any, path: str) -> Iterator[tuple[str, Any, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (f"{path}.{key.value}" if path else str(key.value)), value, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{path}[{i}]", value, value.start_mark.line + 1


def _lines(node: Any, path: str) -> Iterator[tuple[str, int]]:
    for name, value, line in _children(node, path):
        yield name, line
        yield from _lines(value, name)


def _repeated(node: Any, path: str) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for name, value, line in _children(node, path):
        if name in seen:
            yield name, line
        seen.add(name)
        yield from _repeated(value, name)


def _override(raw: dict[str, Any], overrides: Iterable[str], errors: list[str]) -> dict[str, Any]:
    config = OmegaConf.create(raw)
    for item in overrides:
        key, sign, _ = item.partition("=")
        if not sign or not key:
            errors.append(f"override {item!r}: write key=value, for instance train.steps=100")
            continue
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([item.replace(key, "x", 1)]), "x")
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError, IndexError) as error:
            errors.append(f"override {item!r}: {_first_line(error)}")
    container = OmegaConf.to_container(config, resolve=False)
    return typing.cast(dict[str, Any], container)


def _as_words(section: type, values: Any) -> Any:
    """A copy of the values in which true and false are the words yes and no if those are choices of the key.

    YAML reads an unquoted `no` as false.
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
                value = [_as_words(kind, item) for item in value]
            elif shape == "dict" and isinstance(value, dict):
                value = {part: _as_words(kind, item) for part, item in value.items()}
            elif not shape:
                value = _as_words(kind, value)
        elif isinstance(value, bool) and of is not None and {"yes", "no"} <= set(key_of(of).choices):
            value = "yes" if value else "no"
        copy[name] = value
    return copy


def _check(section: type, values: Any, path: str, where: _Where) -> Iterator[str]:
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


def _check_key(section: type, name: str, value: Any, at: str, where: _Where) -> Iterator[str]:
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


def _check_value(section: type, name: str, value: Any, at: str, where: _Where) -> Iterator[str]:
    if value is None or value == "???":
        yield f"{where(at)}: a value is missing"
        return
    if _interpolated(value):
        return  # OmegaConf resolves it when the whole recipe is known, and `from_dict` checks the result
    try:
        read: Any = OmegaConf.merge(OmegaConf.structured(section), {name: value})
    except (OmegaConfBaseException, OverflowError) as error:
        yield f"{where(at)}: {_first_line(error)}"
        return
    problem = key_of(section_fields(section)[name][1]).problem(read[name])
    if problem:
        yield f"{where(at)}: {problem}"


def _interpolated(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
