"""The HTML page about a run: whether it is healthy, scores, curves, use of experts, pictures of episodes, the recipe.

The page has no script and loads nothing from the network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import write_text
from tiphys.dataio.messages import counted
from tiphys.launch.report import svg
from tiphys.launch.report.charts import achieved_charts, marks, training_charts
from tiphys.launch.report.files import RunFiles, mean, recent
from tiphys.launch.report.verdict import breakdown, epochs, verdict
from tiphys.pretrain.acting.scores import by_objective

# Even if a name in the data became markup, the page would run no script and load nothing
CONTENT_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def write_report(run_dir: str | Path, out: str | Path = "") -> Path:
    """Write the report from the files of a run and return its path: `out`, or `<run_dir>/report.html`.

    Raises FileNotFoundError if the folder has no metrics.jsonl.
    """
    target = Path(out) if out else Path(run_dir) / "report.html"
    write_text(target, render(RunFiles.read(run_dir)))
    return target


def render(run: RunFiles) -> str:
    """The page as text."""
    parts = [
        f"<h1>{html.escape(run.name)}</h1><p class='sub'>{html.escape(_when(run))}</p>",
        _verdict(run),
        _facts(run),
        _evaluation(run.evaluation),
        "<h2>Training</h2>",
        cards(training_charts(run)),
        "<h2>The run</h2>",
        f"<div class='cards'>{_about(run)}{_breakdown(run)}{_events(run)}{_epochs(run)}</div>",
        _experts(run),
        _pictures(run.evaluation, run.folder / "pictures"),
        "<h2>Recipe</h2><div class='card'><details><summary>with all defaults and overrides</summary>"
        f"<pre>{html.escape(run.recipe)}</pre></details></div>",
    ]
    return document(run.name, "".join(parts))


def document(title: str, body: str) -> str:
    """A whole HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'{CONTENT_POLICY}<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def cards(charts: Sequence[tuple[str, str]]) -> str:
    """Charts as cards; those without any value are left out."""
    shown = [(title, chart) for title, chart in charts if "<svg" in chart]
    return (
        f"<div class='cards'>{''.join(f'<div class=card><h3>{html.escape(t)}</h3>{c}</div>' for t, c in shown)}</div>"
    )


def cell(value: Any) -> str:
    """A number of a table."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def hours(run: RunFiles) -> float:
    """Hours of training, of the steps that count."""
    every = max(1, round(run.train[-1]["step"] / len(run.train))) if run.train else 1
    return every * sum(float(line["seconds"]) for line in run.train) / 3600


def short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _when(run: RunFiles) -> str:
    if not run.train:
        return "no training step yet"
    last = run.train[-1]
    of = f" of {run.steps}" if run.steps else ""
    return f"{last['step']}{of} steps; {counted(last['rows'], 'row')} and about {last['tokens']} tokens per step"


def _verdict(run: RunFiles) -> str:
    found = verdict(run)
    state = "Healthy" if found.healthy else "Needs a look"
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in found.problems)
    return (
        f"<div class='card verdict{'' if found.healthy else ' look'}'><b>{state}</b> · bottleneck: "
        f"{html.escape(found.bottleneck)}{f'<ul>{items}</ul>' if items else ''}</div>"
    )


def _facts(run: RunFiles) -> str:
    facts: list[tuple[str, str]] = []
    if run.evaluation and (score := run.score) is not None:
        known = [t for t in run.evaluation["tasks"].values() if t.get("expert_normalized") is not None]
        facts.append((f"{score:.2f}", f"expert-normalised score, mean of {counted(len(known), 'task')}"))
    if run.train:
        late = recent(run.train)
        waited = sum(line["data_wait"] for line in late) / max(1e-9, sum(line["seconds"] for line in late))
        held_out = [line["loss"] for line in run.kind("validation") if line["loss"] is not None]
        facts += [
            (cell(run.train[-1]["loss"]), "loss of the last step"),
            *([(cell(held_out[-1]), "held-out loss")] if held_out else []),
            (short(mean(late, "tokens_per_second")), "tokens per second"),
            (f"{100 * mean(late, 'mfu'):.1f} %", "model FLOPs utilisation"),
            (f"{100 * waited:.1f} %", "of the time spent waiting for data"),
            (duration(hours(run)), "of training"),
        ]
    return (
        "<div class='facts'>"
        + "".join(f"<div class='fact'><b>{a}</b><span>{b}</span></div>" for a, b in facts)
        + "</div>"
    )


def duration(found: float) -> str:
    return f"{found:.1f} h" if found >= 1 else f"{60 * found:.1f} min"


def _about(run: RunFiles) -> str:
    """When, where and on what layout."""
    launches = run.kind("launch")
    if not launches:
        return ""
    last = launches[-1]
    rows = [
        ("begun", _date(launches[0]["time"])),
        *([("last resumed", f"{_date(last['time'])}, after step {last['step']}")] if len(launches) > 1 else []),
        ("launches", str(len(launches))),
        ("host", ", ".join(dict.fromkeys(str(line["host"]) for line in launches))),
        (
            "layout",
            f"{counted(last['ranks'], 'process', 'processes')} on {last['device']}: {last['layout']}, {last['precision']}",
        ),
        ("folder", str(run.folder)),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows)
    return f"<div class='card'><h3>When and where</h3><dl>{items}</dl></div>"


def _date(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(text)


def _breakdown(run: RunFiles) -> str:
    """Where the time of a step goes."""
    parts = breakdown(run.train)
    if not parts:
        return ""
    bar = "".join(
        f"<span class='s{i % 10}' style='width:{100 * share:.2f}%'></span>" for i, (_, share) in enumerate(parts)
    )
    keys = "".join(f"<span class='s{i % 10}'>{html.escape(n)} {share:.1%}</span>" for i, (n, share) in enumerate(parts))
    seconds = mean(recent(run.train), "seconds")
    return (
        f"<div class='card'><h3>A step: {1000 * seconds:.0f} ms</h3><div class='parts'>{bar}</div>"
        f"<p class='legend'>{keys}</p><p class='note'>Mean of the later half of the steps. What a device still computes counts "
        "for the part that waits for it.</p></div>"
    )


def _events(run: RunFiles) -> str:
    """Resumes, changes of the mixture and rollbacks."""
    items = "".join(f"<li>{html.escape(what[:1].upper() + what[1:])}</li>" for _, what in marks(run))
    return f"<div class='card'><h3>Resumes and changes</h3><ul>{items}</ul></div>" if items else ""


def _epochs(run: RunFiles) -> str:
    """How often the data were seen."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{share:.1%}</td><td>{episodes}</td><td>{times:.2f}</td></tr>"
        for name, share, times, episodes in epochs(run)
    )
    if not rows:
        return ""
    head = "<tr><th>mixture entry</th><th>windows</th><th>episodes</th><th>epochs</th></tr>"
    return (
        f"<div class='card scroll'><h3>Data seen</h3><table><thead>{head}</thead><tbody>{rows}</tbody></table>"
        "<p class='note'>Epochs: tokens delivered ÷ tokens of the entry's episodes.</p></div>"
    )


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    rows = list(by_objective(evaluation))
    asked = any("target_return" in scores for _, _, scores in rows)
    header = (
        *("task", "objective", *(["asked return"] if asked else []), "normalised", "", "95 % interval", "return"),
        *("success", "random", "expert", "episodes", "seen states"),
    )
    body = []
    for name, objective, task in rows:
        score = task["expert_normalized"]
        width = 0 if score is None else max(0.0, min(1.2, score)) * 80
        low = "" if score is not None and score >= 0.75 else " low"
        interval = task.get("expert_normalized_interval")
        cells = [
            html.escape(name),
            html.escape(objective) or "–",
            *([cell(task.get("target_return"))] if asked else []),
            cell(score),
            f"<span class='bar{low}' style='width:{width:.0f}px'></span>",
            f"{interval[0]:.2f} … {interval[1]:.2f}" if interval else "–",
            cell(task["mean_return"]),
            cell(task["success_rate"]),
            cell(task["random"]),
            cell(task["expert"]),
            html.escape(str(task["episodes"])),
            cell(task.get("seen_states")),
        ]
        body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in header)
    return (
        "<h2>Evaluation</h2><div class='card scroll'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class='sub'>Normalised: 0 is the score of random actions, 1 that of the expert. Seen states: share of the states of "
        "the evaluation that also occur in the demonstrations (only for small, discrete observations).</p>"
        + (cards(achieved) if (achieved := achieved_charts(rows)) else "")
    )


def _experts(run: RunFiles) -> str:
    """One heat map per layer, of the last count: which tasks use which experts."""
    counted = run.kind("experts")
    if not counted:
        return ""
    tasks = counted[-1]["tokens_by_task"]
    layers = len(next(iter(tasks.values())))
    maps = []
    for layer in range(layers):
        shares = [[c / max(1, sum(counts[layer])) for c in counts[layer]] for counts in tasks.values()]
        columns = [f"e{i}" for i in range(len(shares[0]))]
        maps.append((f"Expert layer {layer}, % of a task's tokens", svg.heat(list(tasks), columns, shares)))
    return f"<h2>Experts by task</h2>{cards(maps)}"


def _pictures(evaluation: Mapping[str, Any] | None, folder: Path) -> str:
    found = []
    for name, task in (evaluation or {"tasks": {}})["tasks"].items():
        for picture in task.get("pictures", []):
            path = folder / Path(picture.get("file", "")).name  # none if it could not be drawn
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                image = f"<img class='strip' alt='' src='data:image/png;base64,{data}'>"
                found.append(f"<div class='card'><h3>{html.escape(name)}</h3>{image}</div>")
    return f"<h2>Episodes of the evaluation</h2>{''.join(found)}" if found else ""
