"""`Recipe`: its sections, as frozen structured configs (OmegaConf).

`deepspeed:` is DeepSpeed's own section, passed on as it is. Batch sizes, optimizer, schedule, clipping, precision and ZeRO are
set only there. Everything else that a run needs is in `sections/`, each value in one place. `load.py` reads a file into these
classes; `launch/check.py` reports every error of a recipe at once; docs/recipes.md shows the keys as tables (`reference.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from tiphys.recipes.keys import key
from tiphys.recipes.sections.data import Data
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Objective
from tiphys.recipes.sections.results import Evaluation, Publish, Track, Validation
from tiphys.recipes.sections.training import Checkpoints, Parallel, Restart, Train


@dataclass(frozen=True)
class Run:
    """The run's folder."""

    dir: str = key(MISSING, "Where checkpoints, metrics, policy and report go", text="folder", path=True, resume=True)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    name: str = key(MISSING, "Name of the run, for people", text="name", resume=True)
    data: Data = key(Data, "What is trained on, and how it is drawn and loaded")
    objectives: dict[str, Objective] = key(dict, "What is learned, by a name that entries of the mixture refer to")
    model: Model = key(Model, "The size of the model and its text tokenizer")
    parallel: Parallel = key(Parallel, "How the processes are divided")
    deepspeed: dict[str, Any] = key(dict, "DeepSpeed's own section, passed on as it is")
    train: Train = key(Train, "How long to train")
    checkpoint: Checkpoints = key(Checkpoints, "When checkpoints are saved")
    restart: Restart = key(Restart, "What happens when a process of the run is lost")
    validate: Validation = key(Validation, "The loss on held-out episodes")
    evaluate: Evaluation = key(Evaluation, "How well the policy acts in its environments")
    publish: Publish = key(Publish, "Where the policy goes")
    track: Track = key(Track, "Experiment trackers that metrics are sent to")
    run: Run = key(Run, "The run's folder")
