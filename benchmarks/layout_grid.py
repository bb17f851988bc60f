"""Whether the chosen layout is the fastest: all layouts of a small model on two processes, predicted and measured.

    python -m benchmarks.layout_grid --hidden 256 --layers 4
    python -m benchmarks.layout_grid --hidden 128 --layers 4 --experts 4

One line for each layout that the engine does not refuse: predicted seconds of a step, the fastest and the median of the measured
ones, predicted ÷ fastest, and for each rank predicted ÷ recorded bytes at the peak. The last lines: the layout that would be
chosen against the fastest one that was measured. A rank with divided experts is predicted for twice as many tokens as it
gets here.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.layout import recipe
from tiphys.launch.layout import changed, predict
from tiphys.launch.layout_auto import layouts
from tiphys.launch.layout_calibration import calibrate
from tiphys.launch.layout_rates import Rates
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.automatic import KEYS
from tiphys.recipes.schema import Recipe

WORLD = 2


@dataclass(frozen=True)
class Sizes:
    """Of the model and its steps."""

    hidden: int
    layers: int
    experts: int
    vocabulary: int
    rows: int
    length: int

    @property
    def config(self) -> DecisionConfig:
        return DecisionConfig(
            vocab_size=self.vocabulary,
            tasks=["task"],
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            num_experts=self.experts,
        )

    @property
    def batch(self) -> TokenBatch:
        return typical_batch(self.config, self.rows, self.length)

    @property
    def recipe(self) -> Recipe:
        return recipe(1, self.rows, self.length, False)


def measured(made: Recipe, config: DecisionConfig, batch: TokenBatch, steps: int) -> dict[str, Any]:
    """`seconds` of each step, of the slowest rank, and `bytes` of each rank at the peak of another step. Collective."""
    from tests.pretrain.model.allocator import peak_bytes, tensor_bytes
    from tiphys.pretrain.engine import build_engine
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.parallel import ParallelDims

    world = ParallelDims(made.parallel)
    torch.manual_seed(0)
    before = tensor_bytes()
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
    steady = tensor_bytes() - before
    with _collectives_in_this_thread():
        most = steady + peak_bytes(lambda: engine.train_step(dataclasses.replace(share, step=engine.step)))
    slowest = [max(ranks) for ranks in zip(*world.gather(seconds), strict=True)]
    engine.destroy()
    return {"seconds": slowest[1:], "bytes": world.gather(most)}


@contextmanager
def _collectives_in_this_thread() -> Iterator[None]:
    """Inside, this thread holds the tensors of a collective longest: the records do not see what Gloo's thread frees."""
    from deepspeed.comm import comm

    class Done:
        def wait(self, *_: Any) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    def waits(real: Any) -> Any:
        def collective(*arguments: Any, **options: Any) -> Any:
            wanted = options.pop("async_op", False)
            real(*arguments, **options, async_op=True).wait()
            time.sleep(0.003)
            return Done() if wanted else None

        return collective

    names = (
        "all_reduce",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_to_all_single",
        "broadcast",
        "reduce",
    )
    backend: Any = comm.cdb
    places = [(torch.distributed, n) for n in names]
    places += [(backend, n) for n in ("all_gather_function", "reduce_scatter_function")]
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), real in zip(places, before, strict=True):
        setattr(owner, name, waits(real))
    try:
        yield
    finally:
        for (owner, name), real in zip(places, before, strict=True):
            setattr(owner, name, real)


def _rank(rank: int, port: int, sizes: Sizes, found: Sequence[dict[str, Any]], steps: int, to: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with Path(to).open("a", encoding="utf-8") as out:
        for values in found:
            line = measured(*changed(sizes.recipe, sizes.config, values), sizes.batch, steps)
            if rank == 0:
                out.write(json.dumps({"layout": values, **line}) + "\n")
                out.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("experts", 0), ("vocabulary", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rows", 16), ("length", 128), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--to", default="", help="file of the measured steps, which is read if it is there")
    args = parser.parse_args()
    sizes = Sizes(args.hidden, args.layers, args.experts, args.vocabulary, args.rows, args.length)
    names = [name for name in KEYS if name != "expert" or args.experts]
    found = list(layouts(sizes.recipe, sizes.config, WORLD, names))
    rates = calibrate(sizes.config, sizes.batch, 4, WORLD)
    print(rates, flush=True)
    to = Path(args.to or f"layout-grid-{'-'.join(map(str, dataclasses.astuple(sizes)))}.jsonl")
    if not to.exists():
        _measure(sizes, found, args.steps, to)
    report(sizes, rates, [json.loads(line) for line in to.read_text().splitlines()])
    return 0


def report(sizes: Sizes, rates: Rates, lines: Sequence[dict[str, Any]]) -> None:
    rows, bytes_ = [], list[float]()
    for line in lines:
        values, fastest, median = line["layout"], min(line["seconds"]), statistics.median(line["seconds"])
        made, own = changed(sizes.recipe, sizes.config, values)
        needs = predict(made, own, [sizes.batch], WORLD, device="cpu", rates=rates)
        predicted = needs.seconds or 0.0
        rows.append((predicted, fastest, values))
        data = WORLD // made.parallel.pipeline
        memory = [needs.stages[rank // data].peak.total / found for rank, found in enumerate(line["bytes"])]
        bytes_ += memory
        print(
            f"predicted {predicted:.3f}, fastest {fastest:.3f}, median {median:.3f}, ÷ {predicted / fastest:.2f}; "
            f"bytes ÷ {', '.join(f'{ratio:.4f}' for ratio in memory)}: {values}"
        )
    ratios = sorted(predicted / fastest for predicted, fastest, _ in rows)
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(
        f"\n{len(rows)} layouts: predicted ÷ fastest {ratios[0]:.2f} … {ratios[-1]:.2f}, median "
        f"{statistics.median(ratios):.2f}; {within} within 15 %"
    )
    print(
        f"predicted ÷ recorded bytes of a rank: {min(bytes_):.4f} … {max(bytes_):.4f}, median {statistics.median(bytes_):.4f}"
    )
    chosen, best = min(rows, key=lambda row: row[0]), min(rows, key=lambda row: row[1])
    print(f"chosen  {chosen[1]:.3f} s: {chosen[2]}")
    print(f"fastest {best[1]:.3f} s: {best[2]}; chosen ÷ fastest {chosen[1] / best[1]:.3f}")


def _measure(sizes: Sizes, found: Sequence[dict[str, Any]], steps: int, to: Path) -> None:
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
