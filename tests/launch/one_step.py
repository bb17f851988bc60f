"""A tiny dataset with a recipe, and the first step of its training in this process, with loader, checkpoint and callbacks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.dataio.making import random_episode
from tiphys.dataio.episode import FieldSpec, TaskSpec
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import run
from tiphys.launch.attendance import Attendance
from tiphys.pretrain import engine
from tiphys.pretrain.parallel import ParallelDims
from tiphys.recipes.schema import Recipe

TASK = TaskSpec(
    "reach",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (3,)),
        FieldSpec("observation.image", "observation", "image", "uint8", (16, 16, 3)),
        FieldSpec("mission", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "continuous", "float32", (2,), (-4.0, -4.0), (4.0, 4.0)),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


def make(folder: Path) -> dict[str, Any]:
    """Write 12 episodes, and return a recipe that trains on them, as plain values."""
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "data"), [TASK]) as writer:
        for i in range(12):
            writer.write(random_episode(TASK, f"e{i}", 6, rng))
    return {
        "name": "tiny",
        "data": {"mixture": [{"dataset": str(folder / "data"), "objective": "bc"}], "validation": 0.3},
        "objectives": {"bc": {"context": 128, "window": 2}},
        "model": {
            "layers": 2,
            "hidden": 32,
            "heads": 2,
            "text_vocabulary": 300,
            "moe": {"experts": 2, "experts_per_token": 1, "every": 2},
        },
        "deepspeed": {
            "train_batch_size": 3,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000},
        },
        "train": {"steps": 1},
        "validate": {"rows": 2},
        "run": {"dir": str(folder / "run")},
    }


def write(folder: Path, values: dict[str, Any]) -> Path:
    """The recipe as a file. JSON is YAML."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(values))
    return file


def train(recipe: Recipe, world: ParallelDims) -> float:
    """Train one step in an empty run folder, whatever `train.steps` says; returns the loss."""
    run_dir = Path(recipe.run.dir)
    shutil.rmtree(run_dir, ignore_errors=True)
    made: list[engine.Engine] = []
    build = engine.build_engine

    def remember(*arguments: Any) -> engine.Engine:
        made.append(build(*arguments))
        return made[-1]

    try:
        quiet = contextlib.redirect_stdout(io.StringIO())
        # closed, because it would end this process some seconds after a signal
        with mock.patch.object(engine, "build_engine", remember), quiet, contextlib.closing(Attendance()) as attendance:
            run._train(recipe, world, attendance, False)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return float(next(line["loss"] for line in lines if "kind" not in line))
    finally:
        for one in made:
            one.destroy()
