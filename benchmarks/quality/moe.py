"""Mixtures of experts against a dense model, at equal training operations, and whether it matters which task uses which expert.

Five tasks of the small set. An expert is as wide as the dense layer that it replaces. So with one expert for each token, a step
costs what it costs in the dense model; with two it costs more, and there are fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.figures import Played, interval, iqm, matrix, span, table, two, worst_task
from benchmarks.quality.play import play
from benchmarks.quality.small import collected, continuous_of
from benchmarks.quality.small import recipe as recipe_of_tasks
from benchmarks.quality.work import Work, digest, steps_for
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.model.moe import MixtureOfExperts, mixtures

TASKS = (
    *("BabyAI-GoToRedBallGrey-v0", "BabyAI-GoToLocal-v0"),
    *("metaworld/reach-v3", "metaworld/push-v3", "LunarLander-v3"),
)
DENSE = {"experts": 0}
PLAIN = {"modality": False, "task": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "1 expert": {"experts": 1, "experts_per_token": 1},
    "4 experts, top 1": {"experts": 4, "experts_per_token": 1},
    "8 experts, top 1": {"experts": 8, "experts_per_token": 1},
    "4 experts, top 2": {"experts": 4, "experts_per_token": 2},
    "8 experts, top 2": {"experts": 8, "experts_per_token": 2},
    "4, top 1, router without modality": {"experts": 4, "experts_per_token": 1, **PLAIN},
    "4, top 1, router with task": {"experts": 4, "experts_per_token": 1, "task": True},
}
RATE = 2e-3


def recipe(datasets: Mapping[str, str], experts: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a model, without its number of steps."""
    made = recipe_of_tasks(datasets, continuous_of(list(datasets)))
    mixture = [e for e in made["data"]["mixture"] if e["objective"] != "prompted"]
    return {
        "data": {"mixture": mixture, "validation": 0.0},
        "objectives": {name: o for name, o in made["objectives"].items() if name != "prompted"},
        "model": {"layers": 2, "hidden": 64, "heads": 2, "text_vocabulary": 300, "moe": {"every": 2, **experts}},
        "deepspeed": {"train_batch_size": 16},
    }


def run(
    work: Work, seeds: Sequence[int], tflop: float, episodes: int, scale: float, models: Sequence[str] = tuple(MODELS)
) -> dict[str, dict[str, Any]]:
    """Do all stages. Returns for each model `played` (by task, one for each seed), `loss` and `steps` (by seed)."""
    data = {task: collected(work, task, scale, {}) for task in TASKS}
    datasets = {task: found["dataset"] for task, found in data.items()}
    out: dict[str, dict[str, Any]] = {
        name: {"played": {t: [] for t in TASKS}, "loss": [], "steps": []} for name in models
    }
    for seed in seeds:
        for name in models:
            made = recipe(datasets, MODELS[name])
            each = work.flops(name, made)
            made["train"] = {"steps": steps_for(tflop * 1e12, each)}
            trained = work.fit(name.replace(" ", "-").replace(",", ""), seed, made, RATE)
            out[name]["loss"].append(trained["loss"])
            out[name]["steps"].append(trained["steps"])
            for task in TASKS:
                scores = work.evaluate(name, seed, trained["policy"], task, episodes, sample=True)
                out[name]["played"][task].append(Played.of(scores, data[task]["random"], data[task]["expert"]))
    return out


def report(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    head = [
        "model",
        "steps",
        "loss",
        *(t.split("/")[-1].rsplit("-", 1)[0] for t in TASKS),
        "mean",
        "95 % interval",
        "IQM",
        "worst",
    ]
    rows = []
    for name, model in found.items():
        played = list(model["played"].values())
        scores = matrix(played)
        rows.append(
            [
                *(name, str(round(float(np.mean(model["steps"])))), f"{np.mean(model['loss']):.3f}"),
                *(two(s) for s in scores.mean(0)),
                *(two(float(scores.mean())), span(interval(played)), two(iqm(scores)), two(worst_task(scores))),
            ]
        )
    return table(head, rows)


# Which expert is used for a token instead of the chosen one
WAYS = ("as chosen", "tokens of a task exchanged", "as another task", "renumbered")


def permuted(
    work: Work, seeds: Sequence[int], name: str, episodes: int, found: Mapping[str, Any]
) -> dict[str, dict[str, list[Played]]]:
    """Play with another assignment of experts. Returns way -> task -> one `Played` for each seed.

    - `tokens of a task exchanged`: tokens that are read together exchange their experts at random. They belong to one
      task, so the task uses each expert as often as before.
    - `as another task`: each token gets the experts that a random token of another task had.
    - `renumbered`: each expert's tokens go to the next one.
    """
    out: dict[str, dict[str, list[Played]]] = {way: {t: [] for t in TASKS} for way in WAYS}
    for seed in seeds:
        folder = work.folder("policies", f"{name.replace(' ', '-').replace(',', '')}-{seed}")
        for way in WAYS:
            for i, task in enumerate(TASKS):
                other = TASKS[(i + 2) % len(TASKS)]  # of another family

                def do(
                    way: str = way, task: str = task, other: str = other, folder: str = str(folder)
                ) -> dict[str, Any]:
                    return _played(folder, task, other, way, episodes)

                what = {"run": name, "seed": seed, "task": task, "way": way}
                scores = work.stages.run("permuted", what, [digest(str(folder)), episodes], do)["result"]
                known = found["played"][task][0]
                out[way][task].append(Played.of(scores, known.random, known.expert))
    return out


def permutation_report(found: Mapping[str, Mapping[str, Sequence[Played]]]) -> str:
    """The table in Markdown."""
    rows = []
    for way, tasks in found.items():
        played = list(tasks.values())
        scores = matrix(played)
        rows.append([way, *(two(s) for s in scores.mean(0)), two(float(scores.mean())), span(interval(played))])
    head = ["experts of a token", *(t.split("/")[-1].rsplit("-", 1)[0] for t in TASKS), "mean", "95 % interval"]
    return table(head, rows)


def _played(folder: str, task: str, other: str, way: str, episodes: int) -> dict[str, Any]:
    from tiphys.pretrain.acting.ask import Ask

    policy = Policy.load(folder, sample=True)
    layers = mixtures(policy.model)
    others: list[Tensor] = []
    if way == "as another task":
        seen: list[list[Tensor]] = [[] for _ in layers]

        def remember(number: int, chosen: Tensor) -> Tensor:
            seen[number].append(chosen)
            return chosen

        with assigned(layers, remember):
            play(policy, other, Ask(other), 5)
        others = [torch.cat(one) for one in seen]
    draws = torch.Generator().manual_seed(0)

    def assign(number: int, chosen: Tensor) -> Tensor:
        if way == "tokens of a task exchanged":
            return chosen[torch.randperm(len(chosen), generator=draws)]
        if way == "as another task":
            return others[number][torch.randint(len(others[number]), (len(chosen),), generator=draws)]
        return (chosen + 1) % layers[number].num_experts if way == "renumbered" else chosen

    with assigned(layers, assign):
        return play(policy, task, Ask(task), episodes)


@contextmanager
def assigned(layers: Sequence[MixtureOfExperts], assign: Any) -> Iterator[None]:
    """Inside, `assign(number of the layer, chosen [T, k]) -> [T, k]` says which experts are used. The gates stay as they were."""

    def mix(number: int, layer: MixtureOfExperts) -> Any:
        def other(x: Tensor, chosen: Tensor, gates: Tensor, prepared: Any) -> Tensor:
            chosen = assign(number, chosen)
            prepared = layer._count(chosen)  # a policy's experts are all on one rank
            return MixtureOfExperts.mix(layer, x, chosen, gates, prepared)

        return other

    for number, layer in enumerate(layers):
        layer.mix = mix(number, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.mix
