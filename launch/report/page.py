"""The HTML page about a run: scores, curves, use of experts, pictures of episodes, the recipe.

The page has no script and loads nothing from the network.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import write_text
from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.log import described
from tiphys.launch.report import svg
from tiphys.launch.report.svg import Points
from tiphys.plain_yaml import read
from tiphys.pretrain.acting.scores import by_objective

# Even if a name in the data became markup, the page would run no script and load nothing
CONTENT_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def write_report(run_dir: str | Path) -> Path:
    """Write `<run_dir>/report.html` from the files of a run and return its path.

    Raises FileNotFoundError if the folder has no metrics.jsonl.
    """
    folder = Path(run_dir)
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder}: not the folder of a run that has trained: it has no metrics.jsonl")
    lines = _lines(folder / "metrics.jsonl")
    page = render(lines, _json(folder / "evaluation.json"), _text(folder / "recipe.yaml"), folder / "pictures")
    target = folder / "report.html"
    write_text(target, page)
    return target


def render(
    lines: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None, recipe: str, pictures: Path
) -> str:
    """The page as text.

    lines       of metrics.jsonl
    evaluation  contents of evaluation.json, or None
    recipe      the resolved recipe as YAML, or ""
    pictures    folder of the pictures that `evaluation` names
    """
    train = [line for line in lines if "kind" not in line]
    name = (read(recipe, "recipe.yaml").values or {}).get("name", "run") if recipe else "run"
    parts = [
        f"<h1>{html.escape(str(name))}</h1><p class='sub'>{html.escape(_when(train))}</p>",
        _facts(train, evaluation),
        _evaluation(evaluation),
        "<h2>Training</h2>",
        _changes(lines),
        _curves(lines, train),
        _experts(lines),
        _pictures(evaluation, pictures),
        "<h2>Recipe</h2><div class='card'><details><summary>with all defaults and overrides</summary>"
        f"<pre>{html.escape(recipe)}</pre></details></div>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'{CONTENT_POLICY}<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(str(name))}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _when(train: Sequence[Mapping[str, Any]]) -> str:
    if not train:
        return "no training step yet"
    last = train[-1]
    return f"{last['step']} steps; {last['rows']} rows and about {last['tokens']} tokens per step"


def _facts(train: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None) -> str:
    facts: list[tuple[str, str]] = []
    if evaluation:
        scores = [t["expert_normalized"] for t in evaluation["tasks"].values() if t["expert_normalized"] is not None]
        if scores:
            facts.append((f"{sum(scores) / len(scores):.2f}", f"expert-normalised score, mean of {len(scores)} tasks"))
    if train:
        late = train[len(train) // 2 :]
        facts += [
            (f"{train[-1]['loss']:.3f}", "loss of the last step"),
            (_number(_mean(late, "tokens_per_second")), "tokens per second"),
            (f"{100 * _mean(late, 'mfu'):.1f} %", "model FLOPs utilisation"),
            (f"{100 * _wait(late):.1f} %", "of the time spent waiting for data"),
        ]
    return (
        "<div class='facts'>"
        + "".join(f"<div class='fact'><b>{a}</b><span>{b}</span></div>" for a, b in facts)
        + "</div>"
    )


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(line.get(key, 0.0)) for line in lines) / len(lines)


def _wait(lines: Sequence[Mapping[str, Any]]) -> float:
    return sum(line["data_wait"] for line in lines) / max(1e-9, sum(line["seconds"] for line in lines))


def _number(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


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
            *([_cell(task.get("target_return"))] if asked else []),
            _cell(score),
            f"<span class='bar{low}' style='width:{width:.0f}px'></span>",
            f"{interval[0]:.2f} … {interval[1]:.2f}" if interval else "–",
            _cell(task["mean_return"]),
            _cell(task["success_rate"]),
            _cell(task["random"]),
            _cell(task["expert"]),
            html.escape(str(task["episodes"])),
            _cell(task.get("seen_states")),
        ]
        body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in header)
    return (
        "<h2>Evaluation</h2><div class='card scroll'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class='sub'>Normalised: 0 is the score of random actions, 1 that of the expert. Seen states: share of the states of "
        "the evaluation that also occur in the demonstrations (only for small, discrete observations).</p>"
        + _achieved(rows)
    )


def _achieved(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """For each task and objective that was asked for several returns: the mean return over the return that was asked for."""
    cards = []
    for name, objective, task in rows:
        if not task.get("curve"):
            continue
        points = sorted({(one["target_return"], one["mean_return"]) for one in (task, *task["curve"])})
        ends = [points[0][0], points[-1][0]]
        series = {"achieved": points, "as asked": [(a, a) for a in ends]}
        for i, bound in enumerate(("95 % interval, low", "high")):
            known = (one for one in (task, *task["curve"]) if one.get("mean_return_interval"))
            series[bound] = sorted({(one["target_return"], one["mean_return_interval"][i]) for one in known})
        title = html.escape(f"{name}, {objective}: achieved return over asked return")
        cards.append(f"<div class='card'><h3>{title}</h3>{svg.lines(series, x='asked return')}</div>")
    return f"<div class='cards'>{''.join(cards)}</div>" if cards else ""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _curves(lines: Sequence[Mapping[str, Any]], train: Sequence[Mapping[str, Any]]) -> str:
    held_out = [(v["step"], v["loss"]) for v in lines if v.get("kind") == "validation"]
    by_task: dict[str, list[tuple[float, float]]] = {}
    for line in train:
        for task, loss in line.get("loss_by_task", {}).items():
            by_task.setdefault(task, []).append((line["step"], loss))
    charts = [
        ("Loss", svg.lines({"loss": svg.smooth(_series(train, "loss")), "held out": held_out}, log=True)),
        ("Loss by task", svg.lines({t: svg.smooth(p) for t, p in by_task.items()}, log=True)),
        ("Gradient norm", svg.lines({"norm": svg.smooth(_series(train, "gradient_norm"))}, log=True)),
        ("Learning rate", svg.lines({"rate": _series(train, "learning_rate")})),
        ("Tokens per second", svg.lines({"tokens/s": svg.smooth(_series(train, "tokens_per_second"))})),
        ("Balance and z-loss", svg.lines({"auxiliary": svg.smooth(_series(train, "auxiliary"))})),
        ("Waiting for data, share of the step", svg.lines({"wait": svg.smooth(_shares(train))})),
        ("Cache", svg.lines(_cache(train))),
        ("Peak memory of a process, GiB", svg.lines({"peak": _memory(train)})),
    ]
    charts += [
        (f"Open-loop action error of {html.escape(task)}, held out", svg.lines(by_field))
        for task, by_field in _action_errors(lines).items()
    ]
    layout = {name: svg.smooth(_series(train, name)) for name in ("bubble", "bubble_bound", "all_to_all")}
    if any(layout.values()):
        charts.append(("Pipeline bubble and all-to-all, shares", svg.lines({n: p for n, p in layout.items() if p})))
    cards = "".join(f"<div class='card'><h3>{title}</h3>{chart}</div>" for title, chart in charts)
    return f"<div class='cards'>{cards}</div>"


def _action_errors(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Task -> field -> points (step, error in the units of the data)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        for task, by_field in line.get("action_error", {}).items() if line.get("kind") == "validation" else ():
            for field, error in by_field.items():
                found.setdefault(task, {}).setdefault(field, []).append((line["step"], error))
    return found


def _changes(lines: Sequence[Mapping[str, Any]]) -> str:
    """Changes of the mixture while the run trained."""
    events = [line["event"] for line in lines if line.get("kind") == "change"]
    items = "".join(f"<li>From step {e['step']} on: {html.escape(described(e))}</li>" for e in events)
    return f"<div class='card'><h3>Changes of the mixture</h3><ul>{items}</ul></div>" if items else ""


def _series(train: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in train if line.get(key) is not None]


def _shares(train: Iterable[Mapping[str, Any]]) -> Points:
    return [(line["step"], line["data_wait"] / max(line["seconds"], 1e-9)) for line in train]


def _memory(train: Iterable[Mapping[str, Any]]) -> Points:
    return [(step, size / 2**30) for step, size in _series(train, "peak_memory")]


def _cache(train: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Share of the bytes that came from the cache, and the best share that a cache of this size can reach."""
    names = {"cache_hit_rate": "hit rate", "cache_hit_bound": "best possible"}
    return {
        shown: [(line["step"], line["loader"][key]) for line in train if key in line.get("loader", {})]
        for key, shown in names.items()
    }


def _experts(lines: Sequence[Mapping[str, Any]]) -> str:
    """One heat map per layer, of the last count: which tasks use which experts."""
    counted = [line for line in lines if line.get("kind") == "experts"]
    if not counted:
        return ""
    tasks = counted[-1]["tokens_by_task"]
    layers = len(next(iter(tasks.values())))
    cards = []
    for layer in range(layers):
        shares = [[c / max(1, sum(counts[layer])) for c in counts[layer]] for counts in tasks.values()]
        columns = [f"e{i}" for i in range(len(shares[0]))]
        cards.append(
            f"<div class='card'><h3>Expert layer {layer}, % of a task's tokens</h3>{svg.heat(list(tasks), columns, shares)}</div>"
        )
    return f"<h2>Experts by task</h2><div class='cards'>{''.join(cards)}</div>"


def _pictures(evaluation: Mapping[str, Any] | None, folder: Path) -> str:
    cards = []
    for name, task in (evaluation or {"tasks": {}})["tasks"].items():
        for picture in task.get("pictures", []):
            path = folder / Path(picture.get("file", "")).name  # none if it could not be drawn
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                image = f"<img class='strip' alt='' src='data:image/png;base64,{data}'>"
                cards.append(f"<div class='card'><h3>{html.escape(name)}</h3>{image}</div>")
    return f"<h2>Episodes of the evaluation</h2>{''.join(cards)}" if cards else ""


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, or write it again with `tiphys evaluate`") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. An incomplete last line, of a run that was killed, is left out."""
    found = []
    texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text or "{}")
        except ValueError as error:
            if number == len(texts):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
        if not isinstance(value, dict) or (text and "step" not in value):
            raise DataError(f"{path}, line {number}: not a line of metrics: {text[:60]}; remove the line")
        if text:
            found.append(value)
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
