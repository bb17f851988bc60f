"""The charts of a run's training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tiphys.dataio.plan.log import described
from tiphys.launch.report import svg
from tiphys.launch.report.files import Line, RunFiles
from tiphys.launch.report.svg import Points

Charts = list[tuple[str, str]]  # (title, SVG)


def training_charts(run: RunFiles) -> Charts:
    """All charts of the training, the most telling ones first. Vertical lines are resumes and changes."""
    train, seen = run.train, marks(run)
    by_task: dict[str, list[tuple[float, float]]] = {}
    for line in train:
        for task, loss in line.get("loss_by_task", {}).items():
            by_task.setdefault(task, []).append((line["step"], loss))
    charts = [
        ("Loss", smooth_lines({"loss": series(train, "loss")}, log=True, marks=seen)),
        ("Held-out loss", svg.lines(_held_out(run), log=True, marks=seen)),
        ("Loss by task", smooth_lines(by_task, log=True, marks=seen)),
        ("Gradient norm", smooth_lines({"norm": series(train, "gradient_norm")}, log=True, marks=seen)),
        ("Learning rate", svg.lines({"rate": series(train, "learning_rate")})),
        ("Tokens per second", smooth_lines({"tokens/s": series(train, "tokens_per_second")}, marks=seen)),
        ("Waiting for data, share of the step", smooth_lines({"wait": _shares(train)})),
        ("Cache, share of the bytes", svg.lines(_cache(train))),
        ("Peak memory of a process, GiB", svg.lines({"peak": _memory(train)})),
    ]
    routers = series(train, "auxiliary")
    if any(loss for _, loss in routers):  # a dense model has none
        charts.insert(6, ("Balance and z-loss", smooth_lines({"auxiliary": routers})))
    if scores := evaluations(run):
        charts.insert(2, ("Normalised score of checkpoints", svg.lines({"mean of the tasks": scores})))
    for task, by_field in action_errors(run).items():
        charts.append((f"Open-loop action error of {task}, held out", svg.lines(by_field, marks=seen)))
    for title, lines in perplexities(run):
        charts.insert(2, (title, svg.lines(lines, log=True, marks=seen)))
    shares = by_line(run, "gradient_by_line")
    if len(shares) > 1:
        charts.append(("Share of the gradient (Σ weight · loss) by mixture line", smooth_lines(shares, marks=seen)))
    if weights := by_line(run, "loss_weights"):
        charts.append(("Loss weights that are chosen", svg.lines(weights, log=True, marks=seen)))
    layout = {name: series(train, name) for name in ("bubble", "bubble_bound", "all_to_all")}
    if any(layout.values()):
        charts.append(("Pipeline bubble and all-to-all, shares", smooth_lines({n: p for n, p in layout.items() if p})))
    if drawn := mixture(run):
        charts.append(("Mixture, share of the windows", svg.lines(drawn, marks=seen)))
    return charts


def action_errors(run: RunFiles) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Task -> field -> points (step, error in the units of the data)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in run.kind("validation"):
        for task, by_field in line.get("action_error", {}).items():
            for field, error in by_field.items():
                found.setdefault(task, {}).setdefault(field, []).append((line["step"], error))
    return found


def perplexities(run: RunFiles) -> list[tuple[str, dict[str, list[tuple[float, float]]]]]:
    """(title, task -> points) of the perplexities of texts by token and by byte; none if no text is predicted."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"byte": {}, "token": {}}
    for line in run.kind("validation"):
        for task, known in line.get("perplexity", {}).items():
            for unit, value in known.items():
                found[unit].setdefault(task, []).append((line["step"], value))
    return [(f"Perplexity of texts by {unit}, held out", lines) for unit, lines in found.items() if lines]


def by_line(run: RunFiles, key: str) -> dict[str, list[tuple[float, float]]]:
    """Mixture line -> points (step, value) of a key of the training's lines that has a value for each."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in run.train:
        for name, value in line.get(key, {}).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def achieved_charts(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Charts:
    """For each task and objective that was asked for several returns: the mean return over the return that was asked for.

    rows  (task, objective, scores), see `tiphys.pretrain.acting.scores.by_objective`
    """
    charts = []
    for name, objective, scores in rows:
        points = [scores, *scores["curve"]] if scores.get("curve") else []
        if not points:
            continue
        ends = sorted(one["target_return"] for one in points)
        found = {"achieved": [(one["target_return"], one["mean_return"]) for one in points]}
        for i, bound in enumerate(("95 % interval: low", "high")):
            known = (one for one in points if one.get("mean_return_interval"))
            found[bound] = [(one["target_return"], one["mean_return_interval"][i]) for one in known]
        shown = {"as asked": [(ends[0], ends[0]), (ends[-1], ends[-1])], **{n: sorted(p) for n, p in found.items()}}
        charts.append((f"{name}, {objective}: achieved return over asked return", svg.lines(shown, x="asked return")))
    return charts


def smooth_lines(found: Mapping[str, Points], *, log: bool = False, marks: Sequence[tuple[float, str]] = ()) -> str:
    """A chart of running means, which says how many points they are of."""
    longest = max((len(points) for points in found.values()), default=0)
    smoothed = {name: svg.smooth(points) for name, points in found.items()}
    return svg.lines(smoothed, log=log, marks=marks, smoothed=svg.smoothing(longest))


def series(train: Iterable[Line], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in train if line.get(key) is not None]


def marks(run: RunFiles) -> list[tuple[float, str]]:
    """Resumes, changes of the mixture and rollbacks: (step, what)."""
    resumes = [(line["step"], f"resumed after step {line['step']}") for line in run.kind("launch") if line["step"]]
    events = [line["event"] for line in run.kind("change")]
    changes = [(event["step"], f"from step {event['step']} on: {described(event)}") for event in events]
    back = [(line["to"], f"went back from step {line['last']} to {line['to']}") for line in run.rollbacks]
    return sorted([*resumes, *changes, *back])


def evaluations(run: RunFiles) -> list[tuple[float, float]]:
    """(step, mean normalised score) of the evaluations beside training."""
    found = []
    for line in run.kind("evaluation"):
        known = [t["expert_normalized"] for t in line["tasks"].values() if t.get("expert_normalized") is not None]
        if known:
            found.append((line["step"], sum(known) / len(known)))
    return found


def mixture(run: RunFiles) -> dict[str, list[tuple[float, float]]]:
    """Mixture entry -> its share of the windows over the steps; empty if the run has one entry only."""
    plans, last = run.kind("plan"), run.train[-1]["step"] if run.train else 0
    found: dict[str, list[tuple[float, float]]] = {}
    for at, plan in enumerate(plans):
        end = plans[at + 1]["first"] if at + 1 < len(plans) else last
        for name, entry in plan["entries"].items():
            found.setdefault(name, []).extend([(plan["first"], entry["windows"]), (end, entry["windows"])])
    return found if len(found) > 1 else {}


def _held_out(run: RunFiles) -> dict[str, list[tuple[float, float]]]:
    return {"held out": series(run.kind("validation"), "loss")}


def _shares(train: Iterable[Line]) -> list[tuple[float, float]]:
    return [(line["step"], line["data_wait"] / max(line["seconds"], 1e-9)) for line in train]


def _memory(train: Iterable[Line]) -> list[tuple[float, float]]:
    return [(step, size / 2**30) for step, size in series(train, "peak_memory")]


def _cache(train: Sequence[Line]) -> dict[str, list[tuple[float, float]]]:
    """Share of the bytes that came from the cache, and the best share that a cache of this size can reach."""
    names = {"cache_hit_rate": "hit rate", "cache_hit_bound": "best possible"}
    return {
        shown: [(line["step"], line["loader"][key]) for line in train if key in line.get("loader", {})]
        for key, shown in names.items()
    }
