"""load_recipe(path, overrides) -> Recipe. Every error of the file is found before any is raised."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiphys.recipes.schema import Recipe

FOLDER = Path(__file__).parent

# Values that are one of a few words: key path (a `*` stands for any index or name) -> allowed.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.mixture.*.prefer": ("uniform", "return", "top", "success"),
    "data.weight_unit": ("windows", "tokens"),
    "objectives.*.scheme": ("auto", "gato", "compact"),
    "objectives.*.softmax": ("auto", "vocabulary", "range"),
    "objectives.*.discretise": ("auto", "yes", "no"),
    "objectives.*.fields.*.encoding": ("auto", "gato", "vector", "grid", "uniform", "quantile", "skip"),
    "publish.keep": ("last", "best"),
}


class RecipeError(ValueError):
    """All that is wrong with a recipe, one line each in `errors`."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        count = len(self.errors)
        super().__init__(f"{count} error{'s' if count > 1 else ''} in the recipe:\n" + "\n".join(self.errors))


@dataclass(frozen=True)
class Examined:
    """A recipe as it was written: plain values, the errors of its schema, and where each key stands."""

    file: Path
    raw: dict[str, Any]
    errors: list[str]
    where: Callable[[str], str]  # key path -> `file:line: key path`


def examine(path: str | Path, overrides: Iterable[str] = ()) -> Examined:
    """Read a recipe and list what its schema finds wrong, without raising for it."""
    file = find(path)
    errors: list[str] = []
    raw, lines = _read(file)
    raw = _override(raw, overrides, errors)
    where = _Where(str(file), lines)
    errors.extend(_check(Recipe, raw, "", where))
    return Examined(file, raw, errors, where)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file, or a recipe of `recipes/` by its name, and lay `a.b=value` overrides over it.

    Raises RecipeError with every unknown key, wrong type, missing value and word that is not allowed.
    """
    seen = examine(path, overrides)
    if seen.errors:
        raise RecipeError(seen.errors)
    return from_dict(seen.raw, str(seen.file))


def find(path: str | Path) -> Path:
    """The recipe's file: `path` itself, or `<name>.yaml` among those that are installed with Tiphys."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    near = difflib.get_close_matches(str(path), shipped)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError([f"{path}: no such file, nor a recipe of that name (there are {', '.join(shipped)}).{hint}"])


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values, every default written out."""
    container = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)
    assert isinstance(container, dict)
    return typing.cast(dict[str, Any], container)


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """The inverse of `to_dict`."""
    errors = list(_check(Recipe, values, "", _Where(source, {})))
    if errors:
        raise RecipeError(errors)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise RecipeError([f"{source}: {_first_line(error)}"]) from None
    assert isinstance(recipe, Recipe)
    return recipe


def digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe, the name that checkpoints and model cards carry."""
    return hashlib.sha256(json.dumps(to_dict(recipe), sort_keys=True).encode()).hexdigest()


def differences(a: Recipe, b: Recipe) -> list[str]:
    """`key: value in a -> value in b` for every leaf that differs."""
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
    """Turns a key path into `file:line: path`."""

    def __init__(self, file: str, lines: dict[str, int]) -> None:
        self.file, self.lines = file, lines

    def __call__(self, path: str) -> str:
        line = self.lines.get(path)
        return f"{self.file}:{line}: {path}" if line else f"{self.file}: {path}"


def _read(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    text = file.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = list(_repeated(node, ""))
        if repeated:
            raise RecipeError([f"{file}:{line}: {path}: the key stands twice" for path, line in repeated])
        # OmegaConf's own YAML reads 1e-5 as a number, which PyYAML does not.
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except yaml.YAMLError as error:
        raise RecipeError([f"{file}: not YAML: {' '.join(str(error).split())}"]) from None
    except OmegaConfBaseException as error:
        raise RecipeError([f"{file}: {_first_line(error)}"]) from None
    if not isinstance(loaded, dict):
        raise RecipeError([f"{file}: a recipe is a mapping of sections, not a {type(loaded).__name__}"])
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


def _check(kind: Any, value: Any, path: str, where: _Where) -> Iterator[str]:
    """Errors of `value` against a structured config, depth first."""
    if not isinstance(value, dict):
        yield f"{where(path)}: a section with keys is wanted, not {value!r}"
        return
    hints = typing.get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    for key, item in value.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(sorted(names))}."
            yield f"{where(at)}: unknown key. {hint}"
            continue
        yield from _check_value(hints[key], kind, key, item, at, where)
    for key in _missing(kind):
        if key not in value:
            yield f"{where(path)}.{key} is missing" if path else f"{where.file}: {key} is missing"
    for key in sorted(k for k in names - set(value) if is_dataclass(hints[k]) and any(_missing(hints[k]))):
        for inner in _missing(hints[key]):
            yield f"{where.file}: {f'{path}.{key}' if path else key}.{inner} is missing"


def _check_value(hint: Any, kind: Any, key: str, item: Any, at: str, where: _Where) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        yield from _check(hint, item, at, where)
    elif origin is list and is_dataclass(args[0]):
        if not isinstance(item, list):
            yield f"{where(at)}: a list is wanted, not {item!r}"
            return
        for i, part in enumerate(item):
            yield from _check(args[0], part, f"{at}[{i}]", where)
    elif origin is dict and is_dataclass(args[1]):
        if not isinstance(item, dict):
            yield f"{where(at)}: a section of named parts is wanted, not {item!r}"
            return
        for name, part in item.items():
            yield from _check(args[1], part, f"{at}.{name}", where)
    else:
        yield from _check_leaf(kind, key, item, at, where)


def _check_leaf(kind: Any, key: str, item: Any, at: str, where: _Where) -> Iterator[str]:
    if item is None or item == "???":
        yield f"{where(at)}: a value is missing"
        return
    if isinstance(item, str) and item.startswith("${"):
        return  # an interpolation: OmegaConf resolves it, and checks its type, when the whole recipe is there
    try:
        OmegaConf.merge(OmegaConf.structured(kind), {key: item})
    except OmegaConfBaseException as error:
        yield f"{where(at)}: {_first_line(error)}"
        return
    pattern = _pattern(at)
    allowed = CHOICES.get(pattern)
    if allowed and item not in allowed:
        near = difflib.get_close_matches(str(item), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield f"{where(at)}: {item!r} is not allowed; allowed: {', '.join(allowed)}.{hint}"


def _pattern(path: str) -> str:
    """`data.mixture[0].prefer` -> `data.mixture.*.prefer`; names under `objectives` and `fields` become `*` too."""
    parts = path.replace("[", ".[").split(".")
    parts = ["*" if p.startswith("[") else p for p in parts]
    if parts[0] == "objectives" and len(parts) > 2:
        parts[1] = "*"
        if parts[2] == "fields":
            parts = [*parts[:3], "*", parts[-1]]  # a field's name may hold dots
    return ".".join(parts)


def _missing(kind: Any) -> Iterator[str]:
    for f in fields(kind):
        if isinstance(f.default, str) and f.default == "???":
            yield f.name


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
