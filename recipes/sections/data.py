"""Section `data`: what is trained on, and how it is drawn and loaded."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from tiphys.recipes.keys import key
from tiphys.recipes.sections.limits import POSITIONS


@dataclass(frozen=True)
class Entry:
    """One entry of the mixture: a dataset, how often it is drawn, and what is learned from it."""

    dataset: str = key(
        MISSING,
        "Dataset to train on",
        text="folder or URL that holds dataset.json, index.parquet and shards/",
        path=True,
    )
    weight: float = key(
        1.0, "Relative share of the training data, counted in `data.weight_unit`; 0: not drawn", low=0, high=1e9
    )
    objective: str = key("gato", "What is learned from it", text="key of `objectives`, or name of a paradigm")
    tasks: list[str] = key(
        list, "Train on these tasks only; empty: on all tasks of the dataset", text="task names or globs"
    )
    prefer: str = key(
        "uniform",
        "Which episodes are drawn: all alike, more often the higher their return, only the best (`top`), only successful ones",
        choices=("uniform", "return", "top", "success"),
    )
    top: float = key(1.0, "With `prefer: top`, the share of each task's data that counts as best", above=0, high=1)
    top_of: str = key(
        "episodes", "What `top` is a share of; %BC counts steps (Chen et al. 2021)", choices=("episodes", "steps")
    )
    loss_weight: float | str = key(
        1.0,
        "Factor on the loss of this entry's target tokens; `auto`: so that its share of the gradient is that of its `weight`",
        low=0,
        high=1e6,
        words=("auto",),
    )


@dataclass(frozen=True)
class Cache:
    """The loaders' cache on one node, divided among the node's loaders."""

    dir: str = key("", "Folder of the disk cache; empty: memory only", text="folder", path=True, resume=True)
    memory: str = key("1GiB", "Memory for cached data on each node", size=True, resume=True)
    disk: str = key("0GiB", "Disk space for cached data on each node", size=True, resume=True)


@dataclass(frozen=True)
class Data:
    """What is trained on, and how it is drawn and loaded."""

    mixture: list[Entry] = key(list, "Datasets to train on, one entry each; at least one is needed")
    validation: float = key(
        0.01, "Share of episodes held out for validation, by a hash of the episode's id", low=0, below=1
    )
    weight_unit: str = key("windows", "What `weight` counts", choices=("windows", "tokens"))
    starts: str = key(
        "steps",
        "What is equally likely: each step of a task, or each full window (then first and last steps are rare)",
        choices=("steps", "windows"),
    )
    replacement: bool = key(
        True, "Draw windows independently; false: epochs that cut the episodes into disjoint windows"
    )
    buckets: int = key(
        0,
        "Groups into which the episodes are placed; 0: chosen from the number of episodes and of rows",
        low=0,
        high=2**20,
    )
    cache: Cache = key(Cache, "The loaders' cache on one node, divided among the node's loaders")
    requests: int = key(64, "Range requests in flight, for each loader", unit="requests", low=1, high=4096, resume=True)
    timeout: float = key(
        10.0,
        "Time without a byte after which a request is made again",
        unit="seconds",
        above=0,
        high=86400,
        resume=True,
    )
    attempts: int = key(
        8, "How often a request is tried before it fails", unit="attempts", low=1, high=1000, resume=True
    )
    unit_rows: int = key(
        0,
        "Steps of an episode that are fetched and cached as one unit; 0: chosen from what bytes and requests cost",
        unit="steps",
        low=0,
        high=POSITIONS,
        resume=True,
    )
    on_bad_value: str = key(
        "refuse",
        "What is done about values that cannot be learned from (NaN, infinite rewards, integers beyond the declared range): "
        "refuse them in `check` and end the training, so that no episode is left out without your consent; or quarantine "
        "their episodes, so that `check` only counts them and training draws other windows instead",
        choices=("refuse", "quarantine"),
        resume=True,
    )
    prefetch: str = key(
        "256MiB", "Memory for finished batches that wait for the trainer, for each loader", size=True, resume=True
    )
