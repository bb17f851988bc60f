"""Writes docs/paradigms.md: a section for each row, from the table, its recipe, its experiment and the figures of the last run.

`python -m benchmarks.ideas.page` writes it. `python -m benchmarks.ideas ROW… --control --record` measures first.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ideas import marks
from tiphys.dataio.atomic import write_text
from tiphys.pretrain.tokens.paradigms import NOTHING, PARADIGMS, table
from tiphys.recipes.load import FOLDER

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "paradigms.md"
ABOUT = Path(__file__).with_name("about")  # what is to be said of rows beside the table
FIGURES = Path(__file__).with_name("figures.json")
INTRODUCTION = """# Paradigms

One table says how each way of learning decisions from episodes is done here: which parts a timestep has, which of them are
predicted, who sees whom, what stands before a window, what the data need, and how the policy acts. `tiphys objectives` prints
it, `tiphys objectives dt` one row of it. A part with a star is predicted; one in brackets is hidden, so the token `mask` stands
in its place.

Each row has a recipe, and a small experiment that shows that its idea works: `python -m benchmarks.ideas ROW --control`. It
trains a model of two layers on toy episodes, through the same code as any run. Their `model.init_std` is .02, or 1 / √`hidden`
(the default of recipes) where a model of width 32 must learn to compare tokens in a few hundred steps. A control breaks one
thing that the idea needs, and must fail. This page is written by `python -m benchmarks.ideas.page`; the figures are those
of seeds 0, 1 and 2, as far as they were recorded.
"""
_SHOWN = {
    "at the start": "at the start",
    "each step": "each step",
    "at the end": "at the end",
    "codes": "codes",
    "mask": "sees",
    "hides": "hides",
    "prompt": "prompt",
    "needs": "needs",
    "acts by": "acts by",
    "options": "options of acting",
    "differs": "differs from the source",
}


def record(found: Sequence[dict[str, Any]]) -> None:
    """Keep the figures of the rows that were measured, and write the page again."""
    known = figures()
    for row in {mark["row"] for mark in found}:
        known[row] = [mark for mark in found if mark["row"] == row]
    write_text(FIGURES, json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n")
    write_text(PAGE, page())


def figures() -> dict[str, list[dict[str, Any]]]:
    """Row -> its marks, as they were recorded."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def page() -> str:
    """The content of docs/paradigms.md."""
    found = figures()
    declaration = (ABOUT / "declaration.md").read_text(encoding="utf-8")
    rows = [_section(row, found.get(row["name"], [])) for row in table()]
    return "\n".join([INTRODUCTION, declaration, *rows, *(_key(name, found.get(name, [])) for name in marks.MORE)])


def _section(row: dict[str, str], found: Sequence[dict[str, Any]]) -> str:
    name = row["name"]
    lines = [f"## {name}", "", *_about(name), "", f"Source: {PARADIGMS[name].source}.", ""]
    lines += [f"- {label}: {row[key]}" for key, label in _SHOWN.items() if row[key] != NOTHING]
    commands = [line[1:].strip() for line in _head(name) if line.startswith("#   tiphys ")]
    lines += ["", f"Recipe: `recipes/{name}.yaml`", "", "```", *commands, "```", ""]
    return "\n".join([*lines, *_figures(found), ""])


def _key(name: str, found: Sequence[dict[str, Any]]) -> str:
    """The section of an experiment with a key of a recipe."""
    return "\n".join([f"## {name}", "", *_about(name), "", *_figures(found), ""])


def _figures(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return ["Its experiment has not been recorded yet."]
    head = ["| measure | bar | scores | control | its bar | scores |", "|---|---|---|---|---|---|"]
    return [*head, *(_line(group) for group in _groups(found))]


def _about(name: str) -> list[str]:
    """What the experiment is about: the docstring of its module."""
    if name not in marks.rows():
        return ["It has no experiment yet."]
    source = (Path(__file__).parent / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()  # read, because an import would load torch
    more = ABOUT / f"{name}.md"
    return [*lines, "", *more.read_text(encoding="utf-8").splitlines()] if more.exists() else lines


def _head(name: str) -> list[str]:
    file = FOLDER / f"{name}.yaml"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _groups(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The marks of one measure and one control together, of all seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for mark in found:
        groups.setdefault((mark["measure"], mark["broken"]), []).append(mark)
    return list(groups.values())


def _line(group: Sequence[dict[str, Any]]) -> str:
    first = group[0]
    cells = [first["measure"].replace("|", "\\|"), first["bar"], _numbers(group, "score") + _missed(group, "the bar")]
    cells += [first["broken"], first["control_bar"] or "", _numbers(group, "control") + _missed(group, "the control")]
    return f"| {' | '.join(cells)} |"


def _missed(group: Sequence[dict[str, Any]], what: str) -> str:
    """Says with which seeds a bar is missed, if there are any."""
    seeds = [str(mark["seed"]) for mark in group if mark["fault"].startswith(what)]
    return f"; **missed** with seed {', '.join(seeds)}" if seeds else ""


def _numbers(group: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{mark[key]:z.2f}" for mark in group if mark[key] is not None)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"written: {PAGE}")
