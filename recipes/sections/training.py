"""Sections `parallel`, `train`, `checkpoint` and `restart`: how long a run trains, on what, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass

from tiphys.recipes.keys import key
from tiphys.recipes.sections.limits import SEEDS, STEPS


@dataclass(frozen=True)
class Parallel:
    """How the processes are divided. Those that `pipeline` and `expert` leave are data-parallel."""

    pipeline: int = key(1, "Pipeline stages", unit="stages", low=1, high=4096, resume=True)
    expert: int = key(
        1,
        "Data-parallel processes among which the experts of a layer are divided",
        unit="processes",
        low=1,
        high=2**14,
        resume=True,
    )
    measure: bool = key(
        True, "Cut the pipeline by the measured time of each layer; false: by its number of operations", resume=True
    )
    auto: bool = key(
        False,
        "Choose the keys that are set to `auto`: `parallel.pipeline`, `parallel.expert`, `model.checkpointing`, the micro-batch "
        "and the ZeRO stage of `deepspeed` (docs/layout.md)",
        resume=True,
    )


@dataclass(frozen=True)
class Average:
    """A moving average of the weights, beside those that are trained."""

    decay: float = key(
        0.0,
        "Share of the average that each step keeps, at most (1 + step) / (10 + step); 0: no average",
        low=0,
        below=1,
    )


@dataclass(frozen=True)
class Train:
    """How long to train."""

    steps: int = key(1000, "Training steps", unit="steps", low=1, high=STEPS, resume=True)
    seed: int = key(0, "Seed of the weights, the sampling plan and the random draws of a batch", low=0, high=SEEDS)
    log_every: int = key(
        1,
        "Training steps between two lines of metrics; 0: only at the last step",
        unit="steps",
        low=0,
        high=STEPS,
        resume=True,
    )
    rollbacks: int = key(
        3,
        "Times that a run goes back to a checkpoint from before a spike of the loss, until it is past it; 0: never",
        unit="times",
        low=0,
        high=1000,
        resume=True,
    )
    ema: Average = key(Average, "A moving average of the weights, in fp32, that policies are made from")
    compile: bool = key(False, "Compile the model with torch.compile", resume=True)


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are saved. The last step is always saved."""

    every: int = key(
        1000, "Training steps between two checkpoints; 0: only at the end", unit="steps", low=0, high=STEPS, resume=True
    )
    minutes: float = key(
        10.0,
        "Minutes between two checkpoints, beside `every`: what comes first; 0: only `every`",
        unit="minutes",
        low=0,
        high=10**6,
        resume=True,
    )
    keep: int = key(3, "Newest checkpoints that are kept", unit="checkpoints", low=1, high=10**6, resume=True)
    asynchronous: bool = key(True, "Write checkpoints in the background while training goes on", resume=True)
    patience: float = key(
        30.0,
        "Minutes that training goes on while no checkpoint can be written, for example because the disk is full",
        unit="minutes",
        low=0,
        high=10**6,
        resume=True,
    )
    deadline: float = key(
        25.0,
        "Time from SIGTERM or Ctrl-C until the run must be saved; it is killed a little later",
        unit="seconds",
        above=0,
        high=86400,
        resume=True,
    )


@dataclass(frozen=True)
class Restart:
    """What happens when a process of the run is lost."""

    attempts: int = key(
        5,
        "How often the run is started again without a newer whole checkpoint; 0: never",
        unit="restarts",
        low=0,
        high=10**6,
        resume=True,
    )
    shrink: bool = key(
        False,
        "With a hostfile: if the same host fails twice without a newer checkpoint, go on without it, on a layout that fits and "
        "has the same batches",
        resume=True,
    )
