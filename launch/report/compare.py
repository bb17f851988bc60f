"""One page that compares runs: a table, the keys of their recipes that differ, and curves with a line for each run."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import write_text
from tiphys.launch.report import svg
from tiphys.launch.report.charts import evaluations, series, smooth_lines
from tiphys.launch.report.files import RunFiles, mean, recent
from tiphys.launch.report.page import cards, cell, document, duration, hours, short
from tiphys.launch.report.verdict import verdict
from tiphys.pretrain.acting.scores import by_objective


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page about several runs and return its path.

    Raises FileNotFoundError if a folder has no metrics.jsonl, and ValueError if a run is given twice.
    """
    resolved = [Path(folder).resolve() for folder in run_dirs]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run is given twice; name each run once")
    write_text(out, render_comparison([RunFiles.read(folder) for folder in run_dirs]))
    return Path(out)


def render_comparison(runs: Sequence[RunFiles]) -> str:
    """The page as text."""
    named = dict(zip(_labels(runs), runs, strict=True))
    title = f"{len(runs)} runs"
    body = [
        f"<h1>{title}</h1><p class='sub'>{html.escape(', '.join(named))}</p>",
        f"<div class='card scroll'>{_summary(named)}</div>",
        *([f"<h2>Evaluation</h2><div class='card scroll'>{played}</div>"] if (played := _scores(named)) else []),
        "<h2>What differs in their recipes</h2>",
        f"<div class='card scroll'>{_differences(named)}</div>",
        "<h2>Curves</h2>",
        cards(_charts(named)),
    ]
    return document(title, "".join(body))


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """The shortest ends of the folders that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-length:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    return [str(run.folder) for run in runs]


def _summary(named: Mapping[str, RunFiles]) -> str:
    head = ("run", "steps", "loss", "held-out loss", "score", "tokens/s", "MFU", "data wait", "time", "state")
    rows = []
    for name, run in named.items():
        late = recent(run.train)
        seconds = max(1e-9, sum(line["seconds"] for line in late))
        held_out = series(run.kind("validation"), "loss")
        cells = [
            html.escape(name),
            str(run.train[-1]["step"]) if run.train else "0",
            cell(mean(late[-25:], "loss")) if late else "–",
            cell(held_out[-1][1]) if held_out else "–",
            cell(run.score),
            short(mean(late, "tokens_per_second")),
            f"{100 * mean(late, 'mfu'):.1f} %",
            f"{100 * sum(line['data_wait'] for line in late) / seconds:.1f} %",
            duration(hours(run)),
            html.escape("healthy" if (found := verdict(run)).healthy else f"needs a look: {found.problems[0]}"),
        ]
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return _table(head, rows) + "<p class='note'>Loss: mean of the last 25 lines.</p>"


def _scores(named: Mapping[str, RunFiles]) -> str:
    """A line for each task and objective that was played: the score of each run, or what is known instead of it."""
    found = {
        name: {(task, objective): one for task, objective, one in by_objective(run.evaluation or {"tasks": {}})}
        for name, run in named.items()
    }
    rows = []
    for task, objective in dict.fromkeys(key for by_key in found.values() for key in by_key):
        played = [by_key.get((task, objective)) for by_key in found.values()]
        for what, key in (("normalised", "expert_normalized"), ("success", "success_rate"), ("return", "mean_return")):
            values = [one and one.get(key) for one in played]
            if any(isinstance(value, int | float) for value in values):
                cells = [html.escape(task), html.escape(objective) or "–", what, *map(cell, values)]
                rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
                break
    return _table(("task", "objective", "score", *named), rows) if rows else ""


def _differences(named: Mapping[str, RunFiles]) -> str:
    flat = {name: _flat(run.values) for name, run in named.items()}
    keys = sorted({key for values in flat.values() for key in values} - {"name", "run.dir"})
    rows = []
    for key in keys:
        values = [flat[name].get(key, "–") for name in named]
        if len(set(values)) > 1:
            rows.append("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in (key, *values)) + "</tr>")
    return _table(("key", *named), rows) if rows else "<p>Nothing but the name and the folder.</p>"


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Key path -> value as text."""
    if isinstance(value, Mapping):
        return {
            k: v for key, below in value.items() for k, v in _flat(below, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {k: v for i, below in enumerate(value) for k, v in _flat(below, f"{path}[{i}]").items()}
    return {path: str(value)}


def _charts(named: Mapping[str, RunFiles]) -> list[tuple[str, str]]:
    def of(key: str) -> dict[str, list[tuple[float, float]]]:
        return {name: series(run.train, key) for name, run in named.items()}

    held_out = {name: series(run.kind("validation"), "loss") for name, run in named.items()}
    return [
        ("Loss", smooth_lines(of("loss"), log=True)),
        ("Held-out loss", svg.lines(held_out, log=True)),
        ("Normalised score of checkpoints", svg.lines({name: evaluations(run) for name, run in named.items()})),
        ("Gradient norm", smooth_lines(of("gradient_norm"), log=True)),
        ("Learning rate", svg.lines(of("learning_rate"))),
        ("Tokens per second", smooth_lines(of("tokens_per_second"))),
    ]


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
