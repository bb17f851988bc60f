"""Recipes made by walking the schema: random valid values, and values just outside each range."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from tiphys.recipes.keys import Key, Leaf, key_of, leaves, section_fields, subsection
from tiphys.recipes.schema import Recipe

NUMBERS = [leaf for leaf in leaves(Recipe) if leaf.type in (int, float, float | str)]
WORDS = [leaf for leaf in leaves(Recipe) if leaf.type in (str, list[str])]
_TEXT = st.text("abz019._-/:* é", max_size=8).filter(lambda text: text != "???")


def outside(leaf: Leaf) -> list[Any]:
    """Values just outside the range of a numeric key."""
    key = leaf.key

    def after(bound: float, toward: float) -> float:
        return bound + int(math.copysign(1, toward)) if leaf.type is int else math.nextafter(bound, toward)

    values = [after(key.low, -math.inf)] if key.low is not None else []
    values += [after(key.high, math.inf)] if key.high is not None else []
    values += [leaf.type(bound) for bound in (key.above, key.below) if bound is not None]
    return values + ([math.nan, math.inf, -math.inf] if leaf.type is not int else [])


def given(leaf: Leaf, value: Any) -> dict[str, Any]:
    """A recipe in which only this key is given, beside those that have no default."""
    values: dict[str, Any] = {"name": "a", "run": {"dir": "b"}, "data": {"mixture": [{"dataset": "c"}]}}
    node: Any = values
    *parents, name = place(leaf).replace("[0]", ".0").split(".")
    for parent in parents:
        node = node[0] if parent == "0" else node.setdefault(parent, {})
    node[name] = value
    return values


def place(leaf: Leaf) -> str:
    """The path of a key in the recipe that `given` makes."""
    return leaf.path.replace("[*]", "[0]").replace("*", "x")


def sections(section: type) -> st.SearchStrategy[dict[str, Any]]:
    """Valid values for all keys of a section."""
    return st.fixed_dictionaries(
        {name: _values(hint, key_of(of)) for name, (hint, of) in section_fields(section).items()}
    )


def _values(hint: Any, key: Key) -> st.SearchStrategy[Any]:
    inner = subsection(hint)
    if inner is not None:
        shape, section = inner
        if shape == "list":
            return st.lists(sections(section), max_size=2)
        return st.dictionaries(_TEXT, sections(section), max_size=2) if shape == "dict" else sections(section)
    if key.choices:
        words = st.sampled_from(key.choices)
        return st.lists(words, max_size=2) if hint == list[str] else words
    if key.size:
        return st.sampled_from(["0", "512MiB", "1.5k", "2 TB"])
    if key.target:
        targets = st.sampled_from(["best", "1.2x", "q0.9", "450", "-150.5", "1e3"])
        if hint == dict[str, str]:
            return st.dictionaries(st.sampled_from(["*", "CartPole-v1"]), targets, max_size=2)
        return targets if hint is str else st.lists(targets, max_size=2)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(key.low, key.high)  # type: ignore[arg-type]
    if hint in (float, float | str):
        low, high = (key.low if key.above is None else key.above), (key.high if key.below is None else key.below)
        numbers = st.floats(low, high, allow_nan=False, allow_infinity=False)
        return numbers.filter(lambda number: not key.problem(number))
    if hint is str:
        return _TEXT
    if hint == list[str]:
        return st.lists(_TEXT, max_size=2)
    if hint == list[Any]:
        return st.lists(st.integers(0, 9) | st.none(), max_size=2)
    if hint == dict[str, str]:
        return st.dictionaries(st.sampled_from(["a", "b"]), _TEXT, max_size=2)
    return st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.booleans() | _TEXT, max_size=2)
