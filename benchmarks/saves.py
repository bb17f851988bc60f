"""What checkpoints and evaluations beside training cost the training thread, and whether memory grows with the number of saves.

python -m benchmarks.saves [--saves 50] [--hidden 384]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from tests.launch.small_recipe import small_recipe
from tests.pretrain import synthetic
from tests.processes import alone
from tiphys.launch.aside import Aside
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.callbacks import Checkpointer, Every, MetricsWriter
from tiphys.pretrain.checkpoint_writer import Writer
from tiphys.pretrain.engine import Engine
from tiphys.pretrain.model.transformer import DecisionModel

ROWS = 13


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=384)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args.saves, args.hidden)


def measure(folder: Path, saves: int, hidden: int) -> None:
    config = synthetic.config(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4)
    engine = Engine(synthetic.recipe(str(folder)), DecisionModel(config, seed=3), alone())
    writer = Writer(folder, "bench")
    writer.allocate(engine)
    resident: dict[int, float] = {}
    stalls, steps = [], []
    for number in range(1, saves + 1):
        batch = synthetic.rows_of(number - 1, list(range(ROWS)))
        began = time.perf_counter()
        engine.announce(batch)
        engine.train_step(batch)
        steps.append(time.perf_counter() - began)
        writer.wait()  # so that the stall is the copy alone
        writer.save(engine, {"step": engine.step})
        stalls.append(writer.stall)
        files.prune(folder, 2)
        resident[number] = psutil.Process().memory_info().rss / 2**20
    writer.wait()
    parameters = sum(p.numel() for p in engine.module.parameters())
    print(f"parameters              {parameters / 1e6:.1f}M, state {12 * parameters / 2**20:.0f} MiB")
    print(f"step                    {1000 * statistics.median(steps):.0f} ms")
    print(f"copy of a checkpoint    {1000 * statistics.median(stalls):.0f} ms, at most {1000 * max(stalls):.0f} ms")
    print(f"resident after 3 saves  {resident[3]:.0f} MiB; after {saves}: {resident[saves]:.0f} MiB")
    _beside(folder, engine)
    writer.close()


def _beside(folder: Path, engine: Engine) -> None:
    """How long the training thread is held when an evaluation and a publication start."""
    (folder / "recipe.yaml").write_text(small_recipe())
    trainer: Any = SimpleNamespace(world=SimpleNamespace(rank=0), step=0, steps=10**6, stopped=True)
    keeper, metrics = Checkpointer(folder, 1, keep=2), MetricsWriter(folder, tensorboard=False)
    metrics.on_start(trainer)
    beside = Aside(folder, Every(1), Every(1), dict, keeper, metrics)
    began = time.perf_counter()
    beside.on_start(trainer)
    started = time.perf_counter() - began
    held = []
    for path, _ in list(files.whole(folder)):
        began = time.perf_counter()
        beside._checkpointed(trainer, path, files.step_of(path))
        beside.attend()
        held.append(time.perf_counter() - began)
    for _ in range(100):
        time.sleep(0.01)
        began = time.perf_counter()
        beside.attend()
        held.append(time.perf_counter() - began)
    print(f"side process            {1000 * started:.0f} ms to start it, once")
    print(f"evaluate and publish    hold training {1000 * max(held):.1f} ms")
    beside.end()
    metrics.close(trainer)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
