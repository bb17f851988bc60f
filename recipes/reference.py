"""`python -m tiphys.recipes.reference` writes the tables of all keys into docs/recipes.md, between two marker comments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tiphys.recipes.keys import Leaf, key_of, leaves, section_fields
from tiphys.recipes.resume import DEEPSPEED
from tiphys.recipes.schema import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BEGIN = "<!-- begin of the tables that `python -m tiphys.recipes.reference` writes -->"
END = "<!-- end of the tables -->"


def tables() -> str:
    """One table for each section of a recipe, as Markdown."""
    everything = list(leaves(Recipe))
    lines: list[str] = []
    for name, (_, of) in section_fields(Recipe).items():
        lines += [f"### `{name}`", "", f"{key_of(of).help}.", ""]
        lines += ["| key | type | default | allowed | meaning | may change on resume |", "|---|---|---|---|---|---|"]
        lines += [
            _row(leaf)
            for leaf in everything
            if leaf.path.removeprefix(name)[:1] in ("", ".", "[") and leaf.path.startswith(name)
        ]
        lines += ["", *_free_deepspeed()] if name == "deepspeed" else [""]
    return "\n".join(lines)


def _row(leaf: Leaf) -> str:
    key = leaf.key
    cells = (
        f"`{leaf.path}`",
        _type(leaf),
        _default(leaf),
        key.allowed() or key.text,
        key.help,
        "yes" if key.resume else "",
    )
    return f"| {' | '.join(cells)} |"


def _type(leaf: Leaf) -> str:
    """In words of YAML, with the unit of a number."""
    if leaf.key.size:
        return "size"
    if leaf.key.target:
        return {str: "target return", list[str]: "list of target returns"}.get(leaf.type, "section of target returns")
    words: dict[Any, str] = {
        int: "whole number",
        float: "number",
        float | str: "number or word",
        str: "text",
        bool: "true or false",
        list[str]: "list of texts",
        dict[str, str]: "section of texts",
    }
    return words.get(leaf.type, "section") + (f" ({leaf.key.unit})" if leaf.key.unit else "")


def _default(leaf: Leaf) -> str:
    if leaf.default == MISSING:
        return "required"
    if isinstance(leaf.default, bool):
        return str(leaf.default).lower()
    return str(leaf.default) if leaf.default != "" else "empty"


def _free_deepspeed() -> Iterator[str]:
    patterns = ", ".join(f"`{pattern.removeprefix('deepspeed.')}`" for pattern in DEEPSPEED)
    yield f"On resume these keys below `deepspeed` may change (`*` stands for anything): {patterns}."
    yield ""


def updated(page: str) -> str:
    """The page with the tables of this schema between the markers. Raises ValueError if the markers are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must contain the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> int:
    if not PAGE.is_file():
        print(f"{PAGE}: no such file; run this in a checkout of Tiphys", file=sys.stderr)
        return 2
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
