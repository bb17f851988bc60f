"""One policy over many tasks: ten BabyAI levels, ten of Meta-World (MT10), four of classic control and Box2D.

Four more tasks are never trained on: two BabyAI levels, whose instructions the policy reads, and two of Meta-World, of which it
is shown a demonstration. `full` adds all of Meta-World, and the tasks of a file that names an agent for each, such as those of
MuJoCo and Atari.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.figures import Played, interval, iqm, matrix, span, table, task_row, two, worst_task
from benchmarks.quality.play import play
from benchmarks.quality.work import Work, digest, measure, optimizer

BABYAI = tuple(
    f"BabyAI-{level}-v0"
    for level in (
        *("GoToRedBallGrey", "GoToRedBall", "GoToObj", "GoToLocal", "GoToDoor"),
        *("PickupLoc", "OpenDoorColor", "OpenRedDoor", "ActionObjDoor", "PutNextLocalS5N3"),
    )
)
MT10 = tuple(
    f"metaworld/{task}-v3"
    for task in (
        *("reach", "push", "pick-place", "door-open", "drawer-open"),
        *("drawer-close", "button-press-topdown", "peg-insert-side", "window-open", "window-close"),
    )
)
CLASSIC = ("CartPole-v1", "Pendulum-v1", "MountainCar-v0", "LunarLander-v3")
# Never trained on -> the trained task whose fields and encoding it shares
HELD_OUT = {
    "BabyAI-GoToRedBlueBall-v0": "BabyAI-GoToLocal-v0",
    "BabyAI-PickupDist-v0": "BabyAI-PickupLoc-v0",
    "metaworld/door-close-v3": "metaworld/door-open-v3",
    "metaworld/button-press-v3": "metaworld/button-press-topdown-v3",
}
DEMONSTRATIONS = {"BabyAI": 6000, "metaworld": 100, "CartPole-v1": 60, "Pendulum-v1": 150, "LunarLander-v3": 200}
OTHERS = 100  # demonstrations of a task that is not named above
SHARES = {"BabyAI": 0.4, "metaworld": 0.4, "others": 0.2}
PROMPTED = 0.15  # share of Meta-World's windows that are learned with a demonstration before them
OVERHEAD = 1.2  # time of a training step ÷ time of its passes


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes
    ----------
    minutes : float
        Training time of one seed, on as many cores as there are processes.
    episodes : int
        Episodes that are played of each task and seed.
    scale : float
        Factor on the numbers of demonstrations.
    """

    minutes: float
    episodes: int
    scale: float


def family(task: str) -> str:
    """BabyAI, metaworld or others."""
    return next((f for f in ("BabyAI", "metaworld") if task.startswith(f)), "others")


def tasks_of(what: str, chosen: Sequence[str], agents: Mapping[str, str]) -> list[str]:
    """The tasks that are trained on: those of `small`, or of `full`; of these, the ones that match a glob in `chosen`, if any."""
    found = [*BABYAI, *MT10, *CLASSIC]
    if what == "full":
        from tiphys.dataio import environments

        more = [t for t in environments.names() if t.startswith("metaworld/")]
        found += [t for t in [*more, *agents] if t not in found and t not in HELD_OUT]
    return [t for t in found if not chosen or any(fnmatchcase(t, glob) for glob in chosen)]


def agents_of(file: str) -> dict[str, str]:
    """Task -> agent, as `tiphys collect --policy` takes it, from a JSON file; empty: none. Paths count from the file's folder."""
    if not file:
        return {}
    place = Path(file).resolve().parent
    given: dict[str, str] = json.loads(Path(file).read_text(encoding="utf-8"))
    return {task: str(place / agent) if agent.endswith(".zip") else agent for task, agent in given.items()}


def collected(work: Work, task: str, scale: float, agents: Mapping[str, str]) -> dict[str, Any]:
    """Demonstrations of a task. The zips of agents contain pickles: who names them in the file of agents trusts them."""
    count = DEMONSTRATIONS.get(task, DEMONSTRATIONS.get(family(task), OTHERS))
    options: list[str] = []
    if task in agents:
        options = ["--policy", agents[task], *(["--trust-policy"] if agents[task].endswith(".zip") else [])]
    return work.collect(named(task), task, max(10, round(count * scale)), *options)


def named(task: str) -> str:
    """A name of a folder for a task."""
    return task.replace("/", "-").lower()


def recipe(datasets: Mapping[str, str], continuous: Sequence[str]) -> dict[str, Any]:
    """The recipe of a policy of all tasks, without its number of steps.

    datasets    task -> dataset
    continuous  the tasks whose actions are continuous
    """
    members = {f: [t for t in datasets if family(t) == f] for f in SHARES}
    mixture: list[dict[str, Any]] = []
    for task, dataset in datasets.items():
        weight = SHARES[family(task)] / len(members[family(task)])
        entry = {
            "dataset": dataset,
            "weight": weight,
            "objective": "instructed" if family(task) == "BabyAI" else "discrete",
        }
        if task in continuous:
            entry |= {"objective": "continuous", "loss_weight": 10}
        if family(task) == "metaworld" and len(members["metaworld"]) > 1:  # demonstrations tell several tasks apart
            mixture.append({**entry, "objective": "prompted", "weight": weight * PROMPTED})
            entry["weight"] = weight * (1 - PROMPTED)
        mixture.append(entry)
    objectives: dict[str, Any] = {
        "instructed": {"paradigm": "bc", "scheme": "compact", "context": 128, "window": 12},
        "discrete": {"paradigm": "bc", "scheme": "compact", "context": 128, "window": 4},
        "continuous": {"paradigm": "bc", "scheme": "compact", "context": 128, "window": 1, "discretise": "no"},
        "prompted": {"paradigm": "prompt-dt", "context": 128, "window": 4, "prompt_steps": 5},
    }
    used = {entry["objective"] for entry in mixture}
    return {
        # the objective that plays a trained task is the first that it was trained with
        "data": {"mixture": sorted(mixture, key=lambda e: e["objective"] == "prompted"), "validation": 0.01},
        "objectives": {name: section for name, section in objectives.items() if name in used},
        "model": {
            "layers": 4,
            "hidden": 128,
            "heads": 4,
            "text_vocabulary": 512,
            "moe": {"experts": 4, "experts_per_token": 1, "every": 4},
        },
        "deepspeed": optimizer(24),
        "train": {"log_every": 10},
        "checkpoint": {"every": 0, "minutes": 1, "keep": 2},
        "validate": {"rows": 32},
        "evaluate": {"sample": True},
    }


def run(
    work: Work, seeds: Sequence[int], size: Size, tasks: Sequence[str], agents: Mapping[str, str] | None = None
) -> tuple[dict[str, list[Played]], dict[str, list[Played]]]:
    """Do all stages. Returns task -> one `Played` for each seed: of the trained tasks, and of those that are held out."""
    agents = agents or {}
    data = {task: collected(work, task, size.scale, agents) for task in tasks}
    prompted = sum(family(t) == "metaworld" for t in tasks) > 1
    away = [t for t, like in HELD_OUT.items() if like in tasks and (prompted or family(t) != "metaworld")]
    shown = {task: work.collect(f"held-out-{named(task)}", task, 10) for task in away}
    made = recipe({t: found["dataset"] for t, found in data.items()}, continuous_of(tasks))
    paced = work.stages.run("paced", {"minutes": size.minutes}, [made, work.processes], lambda: pace(work, made, size))
    made["train"]["steps"] = paced["result"]["steps"]
    trained: dict[str, list[Played]] = {task: [] for task in tasks}
    held_out: dict[str, list[Played]] = {}
    for seed in seeds:
        policy = work.train("policy", seed, made)["policy"]
        for task in tasks:
            scores = work.evaluate("policy", seed, policy, task, size.episodes)
            trained[task].append(Played.of(scores, data[task]["random"], data[task]["expert"]))
        for task in away:
            for way in ("told", "not told"):
                scores = unseen(work, seed, policy, task, shown[task]["dataset"], size.episodes, told=way == "told")
                played = Played.of(scores, shown[task]["random"], shown[task]["expert"])
                held_out.setdefault(f"{task}, {way}", []).append(played)
    return trained, held_out


def continuous_of(tasks: Sequence[str]) -> list[str]:
    """The tasks whose actions are continuous."""
    from tiphys.dataio import environments

    actions = {t: next(f for f in environments.spec(t).fields if f.role == "action") for t in tasks}
    return [t for t, field in actions.items() if field.modality == "continuous"]


def pace(work: Work, made: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """How many training steps fit the time, by the processor time of a few."""
    flops, seconds = measure({**made, "train": {"steps": 100}}, 8)
    steps = max(20, round(size.minutes * 60 * work.processes / (OVERHEAD * seconds)))
    return {"steps": steps, "flops": flops, "seconds": seconds}


def unseen(work: Work, seed: int, policy: str, task: str, dataset: str, episodes: int, *, told: bool) -> dict[str, Any]:
    """Play a task that was never trained on.

    BabyAI: the instruction is in the observation; not told: it is that of another level. Meta-World: a demonstration of the task
    stands before the history; not told: one of the trained task that it acts as.
    """

    def do() -> dict[str, Any]:
        from tiphys.pretrain.acting.ask import Ask, demonstration

        like = HELD_OUT[task]
        if family(task) == "metaworld":
            other = str(work.folder("datasets", named(like)))
            prompt = demonstration(f"{dataset}:0", task) if told else demonstration(f"{other}:0", like)
            return play(policy, task, Ask(like, objective="prompted", prompt=prompt), episodes)
        return play(
            policy, task, Ask(like), episodes, mission="" if told else "put the yellow key next to the green box"
        )

    settings = [digest(policy), dataset, episodes, told]
    what = {"run": "policy", "seed": seed, "task": task, "told": told}
    return work.stages.run("held out", what, settings, do)["result"]


def report(trained: Mapping[str, Sequence[Played]], held_out: Mapping[str, Sequence[Played]]) -> str:
    """Three tables in Markdown: each task, all tasks together, and those that were held out."""
    head = ["task", "mean", "worst seed", "95 % interval", "episodes"]
    whole = list(trained.values())
    each = table(head, [task_row(name, seeds) for name, seeds in trained.items()])
    summary = [["all", *over(whole)]]
    for name in SHARES:
        members = [seeds for task, seeds in trained.items() if family(task) == name]
        if members:
            summary.append([name, *over(members)])
    together = table(["tasks", "IQM", "95 % interval", "mean", "95 % interval", "worst task"], summary)
    apart = table(head, [task_row(name, seeds) for name, seeds in held_out.items()]) if held_out else ""
    return "\n\n".join(part for part in (each, together, apart) if part)


def over(played: Sequence[Sequence[Played]]) -> list[str]:
    """IQM, mean, and worst task over some tasks, with intervals of the first two."""
    scores = matrix(played)
    return [
        two(iqm(scores)),
        span(interval(played, iqm)),
        two(float(np.mean(scores))),
        span(interval(played)),
        two(worst_task(scores)),
    ]


def cost(work: Work) -> str:
    """What the stages took: core-hours by kind, training operations by seed."""
    rows: dict[str, float] = {}
    flops = []
    for record in work.stages.used.values():
        rows[record["stage"]] = rows.get(record["stage"], 0.0) + record["cpu_seconds"] / 3600
        if record["stage"] == "trained":
            flops.append(record["result"]["flops"])
    hours = ", ".join(f"{name} {hours:.2f}" for name, hours in rows.items())
    return f"core-hours: {hours}; training operations of each run: {', '.join(f'{f:.3g}' for f in flops)}"
