"""A whole training run for tests, in this process or as a script that each rank runs.

training.py RUN STEPS [--kill-at STEP] [--pause SECONDS] [--pipeline STAGES]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.pretrain import layouts, synthetic
from tiphys.pretrain.callbacks import Callback, Checkpointer, MetricsWriter, Progress
from tiphys.pretrain.checkpoint import Checkpoint
from tiphys.pretrain.engine import build_engine
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import ParallelDims
from tiphys.pretrain.trainer import Trainer
from tiphys.recipes.sections.training import Parallel


class KillAt(Callback):
    """Kills its own process with SIGKILL after a step, possibly while a checkpoint is being written."""

    def __init__(self, step: int, pause: float) -> None:
        self.step, self.pause = step, pause

    def on_step(self, trainer: Trainer, metrics: Any) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)


def train(
    run: Path,
    steps: int,
    *,
    kill_at: int = -1,
    pause: float = 0.0,
    every: int = 3,
    loader: Any = None,
    more: Sequence[Callback] = (),
    **job: Any,
) -> tuple[bool, Trainer]:
    """`more`: callbacks after the usual ones."""
    world = ParallelDims(Parallel(job.get("pipeline", 1)))
    like = layouts.recipe_of(job)
    sections = {"deepspeed": like.deepspeed, "parallel": {"pipeline": like.parallel.pipeline, "measure": False}}
    recipe = synthetic.recipe(str(run), train={"steps": steps, "seed": 7, "rollbacks": 0}, **sections)
    engine = build_engine(recipe, DecisionModel(layouts.config_of(job), seed=3), world)
    if loader is None and world.is_first_stage:
        loader = synthetic.SyntheticLoader(layouts.BATCH, world.replica, world.data)
    callbacks: list[Callback] = [MetricsWriter(run, tensorboard=False), Checkpointer(run, every, keep=2)]
    callbacks += [Progress(terminal=False, seconds=0.0), KillAt(kill_at, pause), *more]
    trainer = Trainer(recipe, engine, loader, callbacks, ["data"])
    try:
        return trainer.fit(Checkpoint.newest_whole(run)), trainer
    finally:
        engine.destroy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--pipeline", type=int, default=1)
    a = parser.parse_args()
    done, trained = train(a.run, a.steps, kill_at=a.kill_at, pause=a.pause, pipeline=a.pipeline)
    sys.exit(0 if done else 128 + trained.stop_signal)
