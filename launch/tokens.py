"""`tiphys tokens`: one training row as the model sees it, as a table for the terminal or as an HTML page with its pictures."""

from __future__ import annotations

import base64
import html
import io
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.messages import printable

if TYPE_CHECKING:
    from tiphys.dataio.episode import Window
    from tiphys.dataio.loader import MakeBatch
    from tiphys.pretrain.tokens.describe import ElementView, WindowView

_HEADER = ("step", "what", "field", "positions", "value", "-> predicts", "weight")
# Columns that are made narrower to fit, in this order, and the least width of each.
_FLEXIBLE = {"-> predicts": 12, "field": 13, "value": 12}
_STYLE = """
th, td { text-align: left }
td { vertical-align: top }
td.wide { white-space: normal; overflow-wrap: anywhere }
td img { display: block; min-width: 96px; image-rendering: pixelated; margin-bottom: 4px }
"""


@dataclass(frozen=True)
class Row:
    """A row of a batch: its step and number, its used and its available positions, and its windows."""

    step: int
    row: int
    used: int
    length: int
    windows: list[WindowView]

    @property
    def title(self) -> str:
        windows = f"{len(self.windows)} {'window' if len(self.windows) == 1 else 'windows'}"
        return f"step {self.step}, row {self.row}: {self.used} of {self.length} positions, {windows}"


def show_row(recipe_path: str, overrides: Sequence[str], step: int, row: int, page: str = "") -> str:
    """The table of a row. With `page`, it is written to that file as HTML too."""
    from tiphys.dataio.atomic import write_text

    found = load_row(recipe_path, overrides, step, row)
    text = as_text(found, shutil.get_terminal_size((80, 24)).columns)
    if page:
        write_text(page, as_html(found))
        text += f"\nwritten: {page}"
    return text


def load_row(recipe_path: str, overrides: Sequence[str], step: int, row: int) -> Row:
    """A row that training with this recipe will see. Raises IndexError if there is no such step or row."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.dataio.placement import Home
    from tiphys.launch.check import check
    from tiphys.launch.plan import loader_arguments, make_plan, open_datasets
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.pretrain.tokens.describe import view_windows

    recipe = check(recipe_path, overrides)
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    if not 0 <= row < plan.rows:
        raise IndexError(f"--row {row}: a batch of this recipe has rows 0 … {plan.rows - 1}")
    if step < 0:
        raise IndexError(f"--step {step}: the first step is 0")
    settings = loader_arguments(recipe, objectives)
    settings["make_batch"] = _RowWindows(row, settings["make_batch"])
    home = Home(process=0, processes=1, weights=None)
    with TrajectoryLoader(plan, home, **settings, start=step, stop=step + 1) as loader:
        loaded = next(loader)
        windows: list[Window] = pickle.loads(loaded.arrays["windows"].tobytes())
        loaded.release()
    # A row does not depend on the rows beside it, so it is made alone.
    arrays = objectives.make_batch(step, np.array([row]), [windows], seed=recipe.train.seed)
    batch = TokenBatch.from_arrays(arrays)
    views = view_windows(
        batch, 0, windows, objectives.layouts, objectives.vocabulary, objectives.text, recipe.train.seed
    )
    return Row(step, row, batch.real_tokens, batch.length, views)


@dataclass(frozen=True)
class _RowWindows:
    """A `make_batch` that hands over the windows of one row instead of their tokens.

    make_batch  that of training; it refuses bad values, so the windows are those that training gets
    """

    row: int
    make_batch: MakeBatch

    def __call__(self, step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
        self.make_batch(step, rows, windows)
        mine = windows[int((rows == self.row).argmax())]
        return {"windows": np.frombuffer(pickle.dumps(mine), np.uint8)}


def window_title(number: int, window: WindowView) -> str:
    """The header line of a window."""
    kind = "prompt" if window.prompt else "window"
    return (
        f"{kind} {number}: task {printable(window.task, '')}, episode {printable(window.episode, '')}, "
        f"from step {window.start}, {window.steps} {'step' if window.steps == 1 else 'steps'}; softmax: {window.softmax}"
    )


def _cells(window: WindowView) -> list[tuple[str, ...]]:
    """A row of cells for each element. The number of a step stands only beside its first element."""
    rows: list[tuple[str, ...]] = []
    before = None
    for e in window.elements:
        step = "" if e.step is None or e.step == before else str(e.step)
        before = e.step
        positions = str(e.first) if e.first == e.last else f"{e.first}–{e.last}"
        predicted = "" if e.weight is None else f"-> {e.predicted}"
        weight = "" if e.weight is None else f"{e.weight:g}"
        rows.append((step, e.what, e.field, positions, e.value, predicted, weight))
    return rows


def as_text(row: Row, width: int = 80) -> str:
    """The row as a table for each window, `width` characters wide if possible. Values that do not fit are cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = _widths([cells for window in row.windows for cells in _cells(window)], width)
    out = io.StringIO()
    console = Console(file=out, width=max(width, sum(widths.values()) + len(widths)))
    console.print(Text(row.title))
    for number, window in enumerate(row.windows, 1):
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name, most in widths.items():
            justify: Any = "right" if name in ("step", "weight") else "left"
            table.add_column(name, justify=justify, width=most, no_wrap=True)
        for cells in _cells(window):
            shown = zip(cells, widths.items(), strict=True)
            table.add_row(*(Text(_cut(cell, most, name == "field")) for cell, (name, most) in shown))
        console.print()
        console.print(Text(window_title(number, window)))
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _widths(rows: Sequence[Sequence[str]], width: int) -> dict[str, int]:
    """The width of each column: that of its longest cell, or less, so that the table fits into `width` characters."""
    columns = zip(_HEADER, *rows, strict=True)
    widths = {column[0]: max(len(printable(cell, "")) for cell in column) for column in columns}
    for name, least in _FLEXIBLE.items():
        excess = sum(widths.values()) + len(widths) - width  # a space follows each column
        if excess > 0:
            widths[name] = max(min(least, widths[name]), widths[name] - excess)
    return widths


def _cut(cell: str, most: int, left: bool) -> str:
    """A cell of at most `most` characters. Of a name, whose end says more than its beginning, the left part is cut."""
    cell = printable(cell, "")
    if len(cell) <= most:
        return cell
    return "…" + cell[1 - most :] if left else cell[: most - 1] + "…"


def as_html(row: Row) -> str:
    """The row as a page of its own, with its pictures in it."""
    from tiphys.launch.report.page import CONTENT_POLICY, STYLE

    parts = [f"<h1>tokens</h1><p class='sub'>{html.escape(row.title)}</p>"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADER)
    for number, window in enumerate(row.windows, 1):
        body = [
            "<tr>" + "".join(_html_cell(n, cell, e) for n, cell in zip(_HEADER, cells, strict=True)) + "</tr>"
            for e, cells in zip(window.elements, _cells(window), strict=True)
        ]
        parts.append(
            f"<h2>{html.escape(window_title(number, window))}</h2><div class='card scroll'><table><thead><tr>{head}</tr>"
            f"</thead><tbody>{''.join(body)}</tbody></table></div>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"{CONTENT_POLICY}<title>tokens</title><style>{STYLE}{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _html_cell(name: str, cell: str, element: ElementView) -> str:
    picture = _picture(element.picture) if name == "value" and element.picture is not None else ""
    wide = " class='wide'" if name in _FLEXIBLE else ""
    return f"<td{wide}>{picture}{html.escape(cell)}</td>"


def _picture(pixels: np.ndarray) -> str:
    """An <img> with the PNG in it. Other pictures than RGB ones show their channels side by side."""
    from PIL import Image

    flat = pixels if pixels.shape[-1] == 3 else np.concatenate(list(np.moveaxis(pixels, -1, 0)), axis=1)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(flat)).save(out, "PNG")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}'>"
