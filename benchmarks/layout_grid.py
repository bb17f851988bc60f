"""Whether the chosen layout is the fastest: all layouts of a small model on two processes, predicted and measured.

    python -m benchmarks.layout_grid --hidden 256 --layers 4
    python -m benchmarks.layout_grid --hidden 128 --layers 4 --experts 4

One line for each layout that the engine does not refuse: predicted seconds of a step, the fastest and the median of the measured
ones, and predicted ÷ fastest. The last lines: the layout that would be chosen against the fastest one that was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tiphys.launch.layout import changed, predict
from tiphys.launch.layout_auto import layouts
from tiphys.launch.layout_calibration import calibrate
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.parallel import Grid
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.automatic import KEYS
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe

WORLD = 2


def recipe(rows: int, length: int) -> Recipe:
    """ZeRO-1, one micro-batch, float32."""
    return from_dict(
        {
            "name": "layout",
            "data": {"mixture": [{"dataset": "file:///nowhere"}]},
            "objectives": {"gato": {"context": length}},
            "deepspeed": {
                "train_batch_size": rows,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                "zero_optimization": {"stage": 1},
                "gradient_clipping": 1.0,
            },
            "run": {"dir": "unused"},
        }
    )


def config_of(hidden: int, layers: int, experts: int, vocabulary: int) -> DecisionConfig:
    return DecisionConfig(
        vocab_size=vocabulary,
        tasks=["task"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_experts=experts,
    )


def measured(made: Recipe, config: DecisionConfig, batch: TokenBatch, steps: int) -> list[float]:
    """Seconds of each step on this rank, after one more to begin with. Collective."""
    from tiphys.pretrain.engine import build_engine
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.parallel import ParallelDims

    world = ParallelDims(made.parallel)
    torch.manual_seed(0)
    engine = build_engine(made, DecisionModel(config), world)
    rows = -(-batch.rows // world.data)
    first = world.replica * rows if world.is_first_stage else batch.rows  # later stages get no rows
    share = batch.select(slice(first, first + rows))
    seconds = []
    for step in range(steps + 1):
        world.barrier()
        began = time.perf_counter()
        engine.train_step(dataclasses.replace(share, step=step))
        seconds.append(time.perf_counter() - began)
    seconds = [max(all_ranks) for all_ranks in zip(*world.gather(seconds), strict=True)]
    engine.destroy()
    return seconds[1:]


def _rank(rank: int, port: int, sizes: Sequence[int], found: Sequence[dict[str, Any]], steps: int, to: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    hidden, layers, experts, vocabulary, rows, length = sizes
    config = config_of(hidden, layers, experts, vocabulary)
    batch = typical_batch(config, rows, length)
    with Path(to).open("a", encoding="utf-8") as out:
        for values in found:
            made, own = changed(recipe(rows, length), config, values)
            seconds = measured(made, own, batch, steps)
            if rank == 0:
                out.write(json.dumps([values, min(seconds), statistics.median(seconds)]) + "\n")
                out.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("experts", 0), ("vocabulary", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rows", 16), ("length", 128), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--to", default="", help="file of the measured steps, which is read if it is there")
    args = parser.parse_args()
    sizes = (args.hidden, args.layers, args.experts, args.vocabulary, args.rows, args.length)
    config = config_of(*sizes[:4])
    batch, given = typical_batch(config, args.rows, args.length), recipe(args.rows, args.length)
    names = [name for name in KEYS if name != "expert" or args.experts]
    found = list(layouts(given, config, WORLD, names))
    rates = calibrate(config, batch, 4, WORLD)
    print(rates, flush=True)
    to = Path(args.to or f"layout-grid-{'-'.join(map(str, sizes))}.jsonl")
    if not to.exists():
        _measure(sizes, found, args.steps, to)
    rows = []
    for values, fastest, median in map(json.loads, to.read_text().splitlines()):
        made, own = changed(given, config, values)
        grid = Grid(0, WORLD, made.parallel.pipeline, made.parallel.expert)
        predicted = predict(made, own, [batch], grid.world, device="cpu", rates=rates, counted=False).seconds or 0.0
        rows.append((predicted, fastest, median, values))
        print(
            f"predicted {predicted:.3f}, fastest {fastest:.3f}, median {median:.3f}, ÷ {predicted / fastest:.2f}: {values}"
        )
    ratios = sorted(predicted / fastest for predicted, fastest, _, _ in rows)
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(
        f"\n{len(rows)} layouts: predicted ÷ fastest {ratios[0]:.2f} … {ratios[-1]:.2f}, median "
        f"{statistics.median(ratios):.2f}; {within} within 15 %"
    )
    chosen, best = min(rows, key=lambda row: row[0]), min(rows, key=lambda row: row[1])
    print(f"chosen  {chosen[1]:.3f} s: {chosen[3]}")
    print(f"fastest {best[1]:.3f} s: {best[3]}; chosen ÷ fastest {chosen[1] / best[1]:.3f}")
    return 0


def _measure(sizes: Sequence[int], found: Sequence[dict[str, Any]], steps: int, to: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(r, port, sizes, found, steps, str(to))) for r in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        if rank.exitcode:
            sys.exit(f"a rank ended with status {rank.exitcode}")


if __name__ == "__main__":
    sys.exit(main())
