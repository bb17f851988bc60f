"""Sections `validate`, `evaluate`, `publish` and `track`: what is measured, and where results go."""

from __future__ import annotations

from dataclasses import dataclass

from tiphys.recipes.keys import key
from tiphys.recipes.sections.limits import SEEDS, STEPS

TRACKERS = ("wandb", "trackio", "mlflow")  # also the names of their packages


@dataclass(frozen=True)
class Validation:
    """The loss and the errors of actions on held-out episodes."""

    every: int = key(
        0,
        "Training steps between two validations, if episodes are held out; 0: ten times a run; -1: only at the end",
        unit="steps",
        low=-1,
        high=STEPS,
        resume=True,
    )
    rows: int = key(
        0,
        "Held-out rows of one validation; 0: 64, but no more than 5 % of the rows that are trained between two",
        unit="rows",
        low=0,
        high=2**22,
        resume=True,
    )


@dataclass(frozen=True)
class Evaluation:
    """How well the policy acts in its environments."""

    every: int = key(
        0,
        "Training steps between two evaluations; 0: only at the end, if there are tasks",
        unit="steps",
        low=0,
        high=STEPS,
        resume=True,
    )
    tasks: list[str] = key(list, "Tasks to act in; empty: no evaluation", text="task names", resume=True)
    objectives: list[str] = key(
        list,
        "Objectives to act with, each in the tasks that it is learned from; empty: the first objective of each task",
        text="keys of `objectives`, or names of paradigms",
        resume=True,
    )
    target_return: dict[str, str] = key(
        dict,
        "By name of the task, or glob, the return to ask for; `*` stands for every task; otherwise "
        "`objectives.*.target_return` is asked for",
        target=True,
        resume=True,
    )
    target_returns: list[str] = key(
        list,
        "Further returns to ask for in turn, with as many episodes for each; the report draws the achieved returns over them",
        target=True,
        resume=True,
    )
    prompt: dict[str, str] = key(
        dict,
        "By name of the task, or glob, a demonstration that stands before each history; without an episode: the best one of "
        "the task",
        text="dataset, or dataset:episode",
        resume=True,
    )
    goal: dict[str, str] = key(
        dict,
        "By name of the task, or glob, the observation to reach, for objectives that act towards a goal",
        text="JSON, or dataset:episode (its last observation)",
        resume=True,
    )
    query: dict[str, str] = key(
        dict,
        "By name of the task, or glob, what objectives that fill in hidden parts are asked; otherwise their option `query`",
        text="bc, rc or goal",
        resume=True,
    )
    future: dict[str, str] = key(
        dict,
        "By name of the task, or glob, an episode whose histogram is to be matched, for objectives that show one (gdt)",
        text="dataset, or dataset:episode",
        resume=True,
    )
    modules: list[str] = key(
        list,
        "Python modules that environments named `module:EnvId` may import, beside those named in `tasks`",
        text="module names",
        resume=True,
    )
    episodes: int = key(20, "Episodes of each task", unit="episodes", low=1, high=10**7, resume=True)
    processes: int = key(0, "Processes that play; 0: as many as cores", unit="processes", low=0, high=4096, resume=True)
    seed: int = key(
        1_000_000, "First seed of the environments; demonstrations use seeds below it", low=0, high=SEEDS, resume=True
    )
    minutes: float = key(
        60.0,
        "Longest time of an evaluation, or of a publication, beside training; it is then ended",
        unit="minutes",
        above=0,
        high=1e6,
        resume=True,
    )
    devices: str = key(
        "",
        "GPUs for evaluations beside training; empty: none, because training needs them",
        text="GPU numbers, such as 6,7",
        resume=True,
    )
    sample: bool = key(
        False,
        "Draw actions instead of taking the most probable one; the policy that is made does so by default, too",
        resume=True,
    )
    videos: int = key(
        1, "Episodes of each task whose pictures go into the report", unit="episodes", low=0, high=10**7, resume=True
    )


@dataclass(frozen=True)
class Publish:
    """Where the policy goes."""

    to: str = key(
        "",
        "Where to publish; empty: only the folder `policy` of the run",
        text="folder, s3://bucket/path or hf://org/name",
        path=True,
        resume=True,
    )
    every: int = key(
        0, "Training steps between two publications; 0: only at the end", unit="steps", low=0, high=STEPS, resume=True
    )
    dtype: str = key(
        "bf16",
        "Type of the policy's weights; training keeps fp32 masters beside them",
        choices=("bf16", "fp32"),
        resume=True,
    )
    weights: str = key(
        "auto",
        "Weights of the policy: their moving average (`train.ema`), or those of the last step; auto: the average if there is one",
        choices=("auto", "ema", "raw"),
        resume=True,
    )
    keep: str = key(
        "last",
        "Publish every new policy, or only one that scores higher than the published one",
        choices=("last", "best"),
        resume=True,
    )
    rate: str = key(
        "0MiB",
        "Most bytes a second that are sent to a folder or a bucket; 0MiB: no limit",
        size=True,
        resume=True,
    )
    take_over: bool = key(
        False, "Publish to the place for the first time although another run publishes there", resume=True
    )
    grace: float = key(
        60.0,
        "How long a published step stays after a newer one does not need it, for those who still read it",
        unit="minutes",
        low=1,
        high=525600,
        resume=True,
    )
    private: bool = key(True, "Hubs: the repository is private; one that is public already is refused", resume=True)
    license: str = key("", "Licence of the policy; empty: none is stated", text="SPDX identifier", resume=True)


@dataclass(frozen=True)
class Track:
    """Experiment trackers that the lines of `metrics.jsonl` are sent to."""

    to: list[str] = key(
        list, "Trackers; each must be installed, and takes its key from its usual place", choices=TRACKERS, resume=True
    )
    project: str = key("", "Name of the project, in MLflow of the experiment; empty: `name`", text="name", resume=True)
    name: str = key("", "Name of the run; empty: the last part of `run.dir`", text="name", resume=True)
