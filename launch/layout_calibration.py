"""`tiphys layout --calibrate`: how fast this machine computes, copies and sends, measured with a recipe's own model.

As many processes as the layout has, but at most one for each device or core, measure at the same time, as they would train. So
what they share (memory, cores that are halves of one) is part of the result. Each time is that of the slowest process, in the
fastest of some rounds. What DeepSpeed does with gradients beside its passes and its optimizer (copies into buckets, sums over
micro-batches, conversions) is measured with its own engine, for each ZeRO stage.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiphys.launch.layout_batches import first_rows
from tiphys.launch.layout_rates import MOVED, Rates, keep

if TYPE_CHECKING:
    import torch

    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.schema import Recipe

ROUNDS = 4, 20  # the fastest one counts; so many at least and at most
ENOUGH = 1.0  # seconds of rounds
MOST_PROCESSES = 8
MOST_PARAMETERS = 200_000_000  # of the model that is measured; a larger one is measured with fewer layers
BYTES = 64  # that a process may need for a parameter: ZeRO-3 in float32 took 45
ELEMENTS = 1 << 16, 1 << 24  # of what is sent and updated, at least and at most


@dataclass(frozen=True)
class Probe:
    """What each process measures with. `width`: bytes of a weight."""

    config: dict[str, Any]
    batch: TokenBatch
    width: int
    processes: int
    port: int


def calibrate(config: DecisionConfig, batch: TokenBatch, width: int, world: int) -> Rates:
    """Measure this machine, and keep the result for later commands.

    Parameters
    ----------
    config : DecisionConfig
    batch : TokenBatch
        A micro-batch.
    width : int
        Bytes of a weight: 2 (bfloat16) or 4.
    world : int
        Processes of the layout.

    Returns
    -------
    Rates
    """
    from tiphys.dataio.process_pool import ProcessPool
    from tiphys.launch.devices import device_memory, devices

    processes = max(1, min(world, devices() or len(os.sched_getaffinity(0)), MOST_PROCESSES))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    most = min(MOST_PARAMETERS, device_memory(processes) // BYTES)
    probe = Probe(_measurable(config, most).to_dict(), batch, width, processes, port)
    with ProcessPool(processes, _quietly) as pool:
        ranks = [pool.submit(_rank, rank, probe) for rank in range(processes)]
        for rank in as_completed(ranks):  # if one fails, its own error counts, not that of those who miss it
            found = rank.result()
    with_them = "alone" if processes == 1 else f"by {processes} processes at once"
    found = dataclasses.replace(found, basis=f"measured on this machine {with_them} ({time.strftime('%Y-%m-%d')})")
    keep(width, found)
    return found


def _measurable(config: DecisionConfig, most: int) -> DecisionConfig:
    """The config with so few layers that the model has at most so many parameters, if one layer does not have more."""
    import copy

    import torch

    from tiphys.pretrain.model.transformer import DecisionModel

    made = copy.deepcopy(config)
    made.checkpointing = False
    while made.num_hidden_layers > 1:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DecisionModel(made).parameters())
        if parameters <= most:
            break
        made.num_hidden_layers = max(1, made.num_hidden_layers // 2)
    return made


def _quietly() -> None:
    """DeepSpeed logs and prints how it is set up, for every engine. The output belongs to the command."""
    import logging

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def _rank(rank: int, probe: Probe) -> Rates:
    """What one rank measures: the same on all."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(probe.processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.port))
    import torch

    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.recipes.sections.training import Parallel

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = ParallelDims(Parallel())
    try:
        return _Measurement(probe, DecisionConfig.from_dict(probe.config), world).rates()
    finally:
        world.close()


class _Measurement:
    """All measurements of one rank. Every method that measures is collective."""

    def __init__(self, probe: Probe, config: DecisionConfig, world: ParallelDims) -> None:
        import torch

        self._config, self._world, self._width = config, world, probe.width
        self._dtype = torch.bfloat16 if probe.width == 2 else torch.float32
        self._few = first_rows(probe.batch, 1)
        self._many = first_rows(probe.batch, max(probe.batch.rows, 2))

    def rates(self) -> Rates:
        """All but the basis. Each later number is the rest of a step that the numbers before it leave."""
        flops, start = self._passes(False)
        found = Rates(flops, self._optimizer(), self._link(), "", start, self._passes(True))
        found = dataclasses.replace(
            found, handling={str(stage): self._handling(stage, found) for stage in self._stages()}
        )
        ranks, sparse = self._world.world, sum(map(self._config.has_experts, range(self._config.num_hidden_layers)))
        if sparse and ranks % 2 == 0 and self._config.num_experts % 2 == 0:
            rest = self._rest(found, 1, expert=2)
            found = dataclasses.replace(found, exchange=rest / sparse)
        if ranks % 2 == 0 and self._config.num_hidden_layers > 1:
            rest = self._rest(found, 4, pipeline=2)
            found = dataclasses.replace(found, hop=rest / 5)  # 4 micro-batches and the bubble
        return found

    def _passes(self, checkpointing: bool) -> tuple[float, float]:
        """`flops` and `start`, from passes of two sizes."""
        from tiphys.pretrain.model.flops import flops_per_batch
        from tiphys.pretrain.model.pipeline import ENDS

        few, many = (self._pass(batch, checkpointing) for batch in (self._few, self._many))
        less, more = (flops_per_batch(self._config, batch) for batch in (self._few, self._many))
        flops = (more - less) / (many - few) if many > few else more / many
        return flops, max(0.0, few - less / flops) / (self._config.num_hidden_layers + 2 * ENDS)

    def _pass(self, batch: TokenBatch, checkpointing: bool) -> float:
        """Seconds of a forward and a backward pass."""
        from tiphys.pretrain.model.inputs import to_tensors

        model, inputs = self._model().train().to(self._world.device, self._dtype), to_tensors(batch, self._world.device)
        model.config.checkpointing = checkpointing
        return self._fastest(lambda: model(inputs).loss.backward())

    def _model(self) -> Any:
        import torch

        from tiphys.pretrain.model.transformer import DecisionModel

        torch.manual_seed(0)
        return DecisionModel(self._config)

    def _optimizer(self) -> float:
        """Bytes a second that AdamW moves, with as many parameters as a rank updates."""
        import torch

        elements = self._elements(self._parameters() // self._world.world)
        weights = torch.nn.Parameter(torch.zeros(elements, device=self._world.device))
        weights.grad = torch.zeros_like(weights)
        return MOVED * elements / self._fastest(torch.optim.AdamW([weights]).step)

    def _link(self) -> float:
        """Bytes a second that a rank sends; with one process half the speed of a copy, for want of anything better."""
        import torch
        import torch.distributed as dist

        source = torch.zeros(self._elements(self._parameters()), dtype=self._dtype, device=self._world.device)
        size, others = source.numel() * source.element_size(), self._world.world - 1
        if not others:
            target = torch.empty_like(source)
            return size / self._fastest(lambda: target.copy_(source)) / 2
        return 2 * others / self._world.world * size / self._fastest(lambda: dist.all_reduce(source))

    def _handling(self, stage: int, known: Rates) -> tuple[float, float]:
        """Seconds a parameter of a step beside passes, optimizer and traffic: with one micro-batch, and for each more."""
        one, two = (self._rest(known, micro_batches, stage=stage) for micro_batches in (1, 2))
        parameters = self._parameters()
        return one / parameters, max(0.0, two - one) / parameters

    def _rest(self, known: Rates, micro_batches: int, *, stage: int = 1, pipeline: int = 1, expert: int = 1) -> float:
        """Seconds of an engine's step that the known rates do not explain; at least 0."""
        from tiphys.launch.layout import predict
        from tiphys.pretrain.engine import build_engine
        from tiphys.pretrain.parallel import ParallelDims

        world = self._world
        data = world.world // pipeline
        recipe = self._recipe(stage, micro_batches * data, {"pipeline": pipeline, "expert": expert, "measure": False})
        if pipeline > 1 or expert > 1:
            world = ParallelDims(recipe.parallel)
        engine = build_engine(recipe, self._model(), world)
        whole = first_rows(self._few, self._few.rows * micro_batches * data)
        mine = whole.select(slice(0, whole.rows // data if world.is_first_stage else 0))  # later stages get no rows
        try:
            took = self._fastest(lambda: engine.train_step(dataclasses.replace(mine, step=engine.step)))
        finally:
            engine.destroy()
        kind = world.device.type
        said = predict(recipe, self._config, [whole], world.world, device=kind, rates=known, counted=False).seconds
        return max(0.0, took - (said or 0.0))

    def _recipe(self, stage: int, micro_batches: int, parallel: dict[str, Any]) -> Recipe:
        """A recipe whose steps have so many micro-batches in all."""
        from tiphys.recipes.load import from_dict

        section = {
            "train_batch_size": self._few.rows * micro_batches,
            "train_micro_batch_size_per_gpu": self._few.rows,
            "bf16": {"enabled": self._width == 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage},
        }
        about = {"data": {"mixture": [{"dataset": "file:///unused"}]}, "objectives": {"gato": {}}, "parallel": parallel}
        return from_dict({"name": "calibration", **about, "deepspeed": section, "run": {"dir": "unused"}})

    def _stages(self) -> tuple[int, ...]:
        """ZeRO-0 in bfloat16 loses precision, so it is not trained with."""
        return (1, 2, 3) if self._width == 2 else (0, 1, 2, 3)

    def _parameters(self) -> int:
        import torch

        with torch.device("meta"):
            return sum(p.numel() for p in self._model().parameters())

    def _elements(self, count: int) -> int:
        low, high = ELEMENTS
        return min(max(count, low), high)

    def _fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the slowest process in the fastest round, after one to warm up. Short work has more rounds."""

        def once() -> float:
            self._world.barrier()
            began = time.perf_counter()
            work()
            _wait(self._world.device)
            return time.perf_counter() - began

        least, most = ROUNDS
        rounds = min(max(round(ENOUGH / max(self._world.gather(once()))), least), most)
        times = self._world.gather([once() for _ in range(rounds)])
        return min(max(ranks) for ranks in zip(*times, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
