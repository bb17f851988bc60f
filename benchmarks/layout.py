"""Predicted memory or time of a step against what was measured.

    python -m benchmarks.layout --device cuda --hidden 1024 --layers 8
    python -m benchmarks.layout --device cpu --hidden 256 --layers 4 --rows 4 --length 256

Each line is one ZeRO stage on one process. CUDA: predicted bytes, `torch.cuda.max_memory_allocated`, and their ratio. The
reserve of the prediction (CUDA context, fragments) is left out, because the allocator does not see it. CPU: predicted seconds
of a step, by the rates of `tiphys layout --calibrate`, the fastest and the median of the measured steps, and the load of the
machine; the tests measure its memory (`tests/pretrain/distributed/test_memory.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time

import torch

from tiphys.launch.layout import predict
from tiphys.launch.layout_calibration import calibrate
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.engine import build_engine
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import ParallelDims
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe


def recipe(stage: int, rows: int, length: int, bf16: bool) -> Recipe:
    return from_dict(
        {
            "name": "layout",
            "data": {"mixture": [{"dataset": "file:///nowhere"}]},
            "objectives": {"gato": {"context": length}},
            "deepspeed": {
                "train_batch_size": rows,
                "bf16": {"enabled": bf16},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                "zero_optimization": {"stage": stage},
            },
            "run": {"dir": "unused"},
        }
    )


def seconds(config: DecisionConfig, batch: TokenBatch, steps: int = 7) -> None:
    """Predicted and measured time of a step in float32."""
    rates = calibrate(config, batch, 4, 1)
    for stage in (0, 1, 2, 3):
        made = recipe(stage, batch.rows, batch.length, False)
        predicted = predict(made, config, [batch], 1, device="cpu", rates=rates, counted=False).seconds or 0.0
        engine = build_engine(made, DecisionModel(config), ParallelDims(made.parallel))
        engine.train_step(batch)
        times = []
        for step in range(1, steps + 1):
            start = time.perf_counter()
            engine.train_step(dataclasses.replace(batch, step=step))
            times.append(time.perf_counter() - start)
        fastest, median = min(times), statistics.median(times)
        print(
            f"ZeRO-{stage}: predicted {predicted:.3f} s, fastest {fastest:.3f}, median {median:.3f}, "
            f"predicted ÷ fastest {predicted / fastest:.3f}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        engine.destroy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    for name, default in (("hidden", 1024), ("layers", 8), ("rows", 8), ("length", 1024), ("experts", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; use --device cpu", file=sys.stderr)
        return 3
    config = DecisionConfig(
        vocab_size=32000,
        tasks=["task"],
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_experts=args.experts,
    )
    batch = typical_batch(config, args.rows, args.length)
    if args.device == "cpu":
        seconds(config, batch)
        return 0
    for stage in (1, 2, 3):
        made = recipe(stage, args.rows, args.length, True)
        found = predict(made, config, [batch], 1, device="cuda").stages[0].peak
        engine = build_engine(made, DecisionModel(config), ParallelDims(made.parallel))
        engine.train_step(batch)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(dataclasses.replace(batch, step=1))
        recorded, predicted = torch.cuda.max_memory_allocated(), found.total - found.reserve
        print(f"ZeRO-{stage}: predicted {predicted}, recorded {recorded}, ratio {predicted / recorded:.4f}", flush=True)
        engine.destroy()
        del engine
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
