"""Recipes from files and plain values, and back. All errors of a recipe are found before any is raised."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiphys.paths import expand
from tiphys.plain_yaml import MOST_BYTES, Document, YamlError, dump, read
from tiphys.recipes.automatic import with_defaults
from tiphys.recipes.interpolation import ABSENT, resolve
from tiphys.recipes.keys import leaf_at
from tiphys.recipes.overrides import override
from tiphys.recipes.schema import Recipe
from tiphys.recipes.schema_check import adapted, first_line, schema_errors

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
    raw: dict[str, Any]  # keys that `parallel.auto` is still to fill have a value that is valid anywhere
    errors: list[str]
    where: Callable[[str], str]  # key path -> `file:line: key path`
    written: dict[str, Any]  # as `raw`, before that


def examine(path: str | Path, overrides: Iterable[str] = ()) -> Examined:
    """Read a recipe and list what the schema finds wrong. Raises RecipeError only if it cannot be read at all."""
    file = find(path)
    errors: list[str] = []
    document = _read(file)
    where, raw = _Where(str(file), document), document.values or {}
    where.overrides = override(raw, overrides, errors)
    written, unresolved = _resolved(raw, where)
    raw = with_defaults(written)
    return Examined(file, raw, [*errors, *unresolved, *schema_errors(raw, where)], where, written)


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
    return _built(seen.raw, str(seen.file))


def find(path: str | Path) -> Path:
    """The recipe's file: `path` itself, or the installed recipe of this name. Raises RecipeError if there is neither."""
    file = Path(expand(path))
    if file.is_file():
        return file
    shipped = {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    beside = [str(p) for p in sorted(file.parent.glob("*.y*ml"))] if file.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), [*beside, *shipped], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError([f"{path}: neither a file nor an installed recipe ({', '.join(shipped)}).{hint}"])


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with every default written out."""
    return asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out."""
    return dump(to_dict(recipe))


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """The inverse of `to_dict`. Errors name `source`. Raises RecipeError with everything that is wrong."""
    where = _Where(source)
    values, errors = _resolved(values, where)
    errors += schema_errors(values, where)
    if errors:
        raise RecipeError(errors)
    return _built(values, source)


def _built(values: dict[str, Any], source: str) -> Recipe:
    """The recipe of values in which the schema finds nothing wrong."""
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise RecipeError([f"{source}: {first_line(error)}"]) from None
    assert isinstance(recipe, Recipe)
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
    """Turns a key path into `file:line: path`, or into `override 'key=value': path` if the command line wrote the value.

    A key that is not in the file has the line of its section.
    """

    def __init__(self, file: str, document: Document | None = None) -> None:
        self.file = file
        self.overrides: dict[str, str] = {}  # key path -> `key=value`
        self.lines, self._written = (document.lines, document.written) if document else ({}, {})

    def __call__(self, path: str) -> str:
        shown, parent = path, path
        if item := self._override(path):
            return f"override {item!r}: {shown}"
        while parent and parent not in self.lines:
            parent = _section_of(parent)
        return f"{self.file}:{self.lines[parent]}: {shown}" if parent else f"{self.file}: {shown}"

    def written(self, path: str) -> str:
        return "" if self._override(path) else self._written.get(path, "")

    def _override(self, path: str) -> str:
        """The override that wrote this key, a section around it, or a part of a section that the file lacks."""
        section = path
        while section and section not in self.overrides:
            section = _section_of(section)
        if section:
            return self.overrides[section]
        inner = (item for key, item in self.overrides.items() if key.startswith((f"{path}.", f"{path}[")))
        return next(inner, "") if path and path not in self.lines else ""


def _section_of(path: str) -> str:
    """The key path without its last part."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def _read(file: Path) -> Document:
    with file.open("rb") as opened:
        data = opened.read(MOST_BYTES + 1)
    try:
        document = read(data, str(file))
    except YamlError as error:
        raise RecipeError(error.errors) from None
    if not isinstance(document.values, dict | None):
        kind = type(document.values).__name__
        raise RecipeError([f"{file}: a recipe must be a mapping of sections, not a {kind}"])
    return document


def _resolved(values: Any, where: _Where) -> tuple[Any, list[str]]:
    """The values with each `${key}` replaced and paths expanded, and what cannot be."""
    resolved, errors = resolve(values, _default)
    return adapted(Recipe, resolved), [f"{where(path)}: {reason}" for path, reason in errors]


def _default(path: str) -> Any:
    leaf = leaf_at(Recipe, path)
    return ABSENT if leaf is None or leaf.default == MISSING else leaf.default
