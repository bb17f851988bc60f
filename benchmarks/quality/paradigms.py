"""Paradigms on one footing: the same data of mixed quality, the same model, the same training operations.

One policy learns three tasks. In each, a quarter of the steps or somewhat more are an expert's, the others those of a weak agent
(`weak.py`). `tt` plans, which costs many passes for each action. So it learns and plays CartPole alone, with a third of the
operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.quality.figures import Played, interval, normalised, span, table, two
from benchmarks.quality.weak import EXPERT
from benchmarks.quality.work import Work, steps_for

EPISODES = {"CartPole-v1": 600, "Pendulum-v1": 200, "MountainCar-v0": 200}
RATE = 3e-3
SHORT = {"CartPole-v1": "cartpole", "Pendulum-v1": "pendulum", "MountainCar-v0": "mountaincar"}
# What return-conditioned rows ask for: what the expert earns
TARGETS = {"CartPole-v1": "500", "Pendulum-v1": "-150", "MountainCar-v0": "-115"}
TOP = {"prefer": "top", "top": 0.25, "top_of": "steps"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    objective : mapping
        Its section of the recipe.
    entry : mapping
        Further keys of its mixture entries.
    asked : tuple of str
        What it is asked for: names of `Asking`'s fields.
    tasks : tuple of str
        What it learns and plays; empty: all.
    episodes : int
        Most episodes of each task that it plays for each seed.
    """

    objective: Mapping[str, Any]
    entry: Mapping[str, Any] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    episodes: int = 1 << 30


# A policy that sees many of its last actions learns to repeat them, so windows are short where no future is needed.
ROWS = {
    "bc": Row({"paradigm": "bc", "discretise": "no"}),
    "%bc": Row({"paradigm": "bc", "discretise": "no"}, entry=TOP),
    "dt": Row({"paradigm": "dt"}, asked=("target_return",)),
    "gato": Row(
        {"paradigm": "gato", "scheme": "compact", "discretise": "no", "prompt": 0.5, "prompt_steps": 8},
        asked=("prompt",),
    ),
    "unimask": Row({"paradigm": "unimask", "window": 10}, asked=("target_return", "query")),
    "tt": Row(
        {
            "paradigm": "tt",
            "context": 96,
            "window": 10,
            "fields": {"*": {"bins": 100}},
            "options": {"horizon": 4, "width": 8, "expand": 2, "cdf": 0.2},
        },
        tasks=("CartPole-v1",),
        episodes=10,
    ),
}


def recipe(row: Row, datasets: Mapping[str, str]) -> dict[str, Any]:
    """The recipe of a row, without its number of steps."""
    return {
        "data": {
            "mixture": [{"dataset": datasets[t], "objective": "it", **row.entry} for t in row.tasks or EPISODES],
            "validation": 0.0,
        },
        "objectives": {"it": {"context": 64, "window": 4, **row.objective}},
        "model": {"layers": 2, "hidden": 64, "heads": 2, "text_vocabulary": 300},
        "deepspeed": {"train_batch_size": 16},
    }


def collected(work: Work) -> dict[str, dict[str, Any]]:
    """The data of each task, with `best`: the score of the expert alone."""
    found = {}
    for task, n in EPISODES.items():
        mixed = work.collect(SHORT[task], task, n, "--policy", "benchmarks.quality.weak:Mixed", "--noise", "0")
        best = work.collect(f"{SHORT[task]}-expert", task, 10, "--noise", "0")
        found[task] = {**mixed, "best": best["expert"]}
    return found


def data_scores(data: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The normalised score of the mixture of agents, by task."""
    return {task: normalised(d["expert"], d["random"], d["best"]) for task, d in data.items()}


def run(
    work: Work, seeds: Sequence[int], tflop: float, episodes: int, rows: Sequence[str] = tuple(ROWS)
) -> dict[str, dict[str, list[Played]]]:
    """Do all stages. Returns, for each row and task, one `Played` for each seed."""
    data = collected(work)
    datasets = {task: found["dataset"] for task, found in data.items()}
    out: dict[str, dict[str, list[Played]]] = {name: {} for name in rows}
    for seed in seeds:
        for name in rows:
            row = ROWS[name]
            made = recipe(row, datasets)
            tasks = row.tasks or tuple(EPISODES)
            each = work.flops(name, made)
            made["train"] = {"steps": steps_for(tflop * 1e12 * len(tasks) / len(EPISODES), each)}
            policy = work.fit(name, seed, made, RATE)["policy"]
            for task in tasks:
                asked = {key: asking(key, task, datasets[task]) for key in row.asked}
                scores = work.evaluate(name, seed, policy, task, min(episodes, row.episodes), asked)
                played = Played.of(scores, data[task]["random"], data[task]["best"])
                out[name].setdefault(task, []).append(played)
    return out


def asking(key: str, task: str, dataset: str) -> dict[str, str]:
    """A field of `Asking` for one task. A prompt is the best episode of the data."""
    return {task: {"target_return": TARGETS[task], "query": "rc", "prompt": dataset}[key]}


def report(found: Mapping[str, Mapping[str, Sequence[Played]]], data: Mapping[str, float]) -> str:
    """The table in Markdown: for each task mean, worst seed and interval. `data`: the normalised score of the data by task."""
    head = [
        "",
        *(f"{t.removesuffix('-v0').removesuffix('-v1')}: mean" for t in EPISODES),
        "mean of the tasks",
        "worst task",
    ]
    rows = [["the data", *(two(data[t]) for t in EPISODES), two(float(np.mean(list(data.values())))), ""]]
    for name, tasks in found.items():
        cells = [cell(tasks[t]) if t in tasks else "" for t in EPISODES]
        whole = [s for t in EPISODES for s in [tasks.get(t)] if s]
        means = [float(np.mean([p.score for p in s])) for s in whole]
        complete = len(whole) == len(EPISODES)
        both = [f"{two(float(np.mean(means)))} ({span(interval(whole))})", two(min(means))] if complete else ["", ""]
        rows.append([name, *cells, *both])
    return table(head, rows)


def cell(seeds: Sequence[Played]) -> str:
    """Mean; worst seed; interval."""
    scores = [s.score for s in seeds]
    return f"{two(float(np.mean(scores)))}; {two(min(scores))}; {span(interval([seeds]))}"


assert set(EPISODES) == set(EXPERT) == set(TARGETS) == set(SHORT)
