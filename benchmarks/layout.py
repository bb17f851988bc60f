"""Predicted memory of a step against what the device's allocator recorded.

    python -m benchmarks.layout --device cuda --hidden 1024 --layers 8

Each line is one ZeRO stage on one process: predicted bytes, `torch.cuda.max_memory_allocated`, and their ratio. The reserve of
the prediction (CUDA context, fragments) is left out, because the allocator does not see it. On a CPU the tests measure the same
(`tests/pretrain/distributed/test_memory.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from tiphys.launch.layout import predict
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.engine import build_engine
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import ParallelDims
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe


def recipe(stage: int, rows: int, length: int) -> Recipe:
    return from_dict(
        {
            "name": "layout",
            "data": {"mixture": [{"dataset": "file:///nowhere"}]},
            "objectives": {"gato": {"context": length}},
            "deepspeed": {
                "train_batch_size": rows,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                "zero_optimization": {"stage": stage},
            },
            "run": {"dir": "unused"},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    for name, default in (("hidden", 1024), ("layers", 8), ("rows", 8), ("length", 1024), ("experts", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; the tests measure the CPU", file=sys.stderr)
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
    for stage in (1, 2, 3):
        made = recipe(stage, args.rows, args.length)
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
