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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiphys.launch.layout_rates import MOVED, Rates, keep

if TYPE_CHECKING:
    import torch

    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.schema import Recipe

ROUNDS = 4  # the fastest one counts; one more goes before to warm up
MOST_PROCESSES = 8
MOST_PARAMETERS = 200_000_000  # of the model that is measured; a larger one is measured with fewer layers
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
    from tiphys.launch.devices import devices

    processes = max(1, min(world, devices() or len(os.sched_getaffinity(0)), MOST_PROCESSES))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    probe = Probe(_measurable(config).to_dict(), batch, width, processes, port)
    with ProcessPool(processes, _quietly) as pool:
        ranks = [pool.submit(_rank, rank, probe) for rank in range(processes)]
        numbers, *_ = [rank.result() for rank in ranks]
    with_them = "alone" if processes == 1 else f"by {processes} processes at once"
    found = Rates(**numbers, basis=f"measured on this machine {with_them} ({time.strftime('%Y-%m-%d')})")
    keep(width, found)
    return found


def _measurable(config: DecisionConfig) -> DecisionConfig:
    """The config with so few layers that every machine that trains the model can hold it whole."""
    import copy

    import torch

    from tiphys.pretrain.model.transformer import DecisionModel

    made = copy.deepcopy(config)
    made.checkpointing = False
    while made.num_hidden_layers > 1:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DecisionModel(made).parameters())
        if parameters <= MOST_PARAMETERS:
            break
        made.num_hidden_layers = max(1, made.num_hidden_layers // 2)
    return made


def _quietly() -> None:
    """DeepSpeed logs how it is set up, for every engine."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def _rank(rank: int, probe: Probe) -> dict[str, Any]:
    """The numbers of `Rates`, without its basis."""
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
        rows = max(1, probe.batch.rows)
        self._few = _repeated(probe.batch, max(1, rows // 4))
        self._many = _repeated(probe.batch, max(rows, self._few.rows + 1))

    def rates(self) -> dict[str, Any]:
        from tiphys.pretrain.model.flops import flops_per_batch

        few, many = self._passes(self._few), self._passes(self._many)
        more = flops_per_batch(self._config, self._many) - flops_per_batch(self._config, self._few)
        flops = more / (many - few) if many > few else flops_per_batch(self._config, self._many) / many
        start = max(0.0, few - flops_per_batch(self._config, self._few) / flops)
        memory, link = self._optimizer(), self._link()
        handling = {str(stage): self._handling(stage, few, memory, link) for stage in self._stages()}
        layers = self._config.num_hidden_layers
        return {"flops": flops, "memory": memory, "link": link, "start": start / layers, "handling": handling}

    def _passes(self, batch: TokenBatch) -> float:
        """Seconds of a forward and a backward pass."""
        from tiphys.pretrain.model.inputs import to_tensors

        model, inputs = self._model().train().to(self._world.device, self._dtype), to_tensors(batch, self._world.device)
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

    def _handling(self, stage: int, passes: float, memory: float, link: float) -> tuple[float, float]:
        """Seconds a parameter of a step beside passes, optimizer and traffic: with one micro-batch, and for each more."""
        from tiphys.pretrain.distributed.deepspeed_config import derive

        parameters, beside = self._parameters(), []
        for accumulation in (1, 2):
            recipe = self._recipe(stage, accumulation)
            sizes = derive(recipe, self._world)
            own = parameters / (self._world.world if stage else 1)
            known = accumulation * passes + own * MOVED / memory
            known += sum(self._traffic(sizes).values()) / link if self._world.world > 1 else 0.0
            beside.append(self._engine_step(recipe, accumulation) - known)
        return max(0.0, beside[0]) / parameters, max(0.0, beside[1] - beside[0]) / parameters

    def _traffic(self, sizes: Any) -> Mapping[str, int]:
        from tiphys.launch.layout_time import traffic

        return traffic(self._config, [self._few], self._world, sizes, self._parameters(), self._width)

    def _engine_step(self, recipe: Recipe, accumulation: int) -> float:
        from tiphys.pretrain.engine import build_engine

        engine = build_engine(recipe, self._model(), self._world)
        batch = _repeated(self._few, self._few.rows * accumulation)
        try:
            return self._fastest(lambda: engine.train_step(dataclasses.replace(batch, step=engine.step)))
        finally:
            engine.destroy()

    def _recipe(self, stage: int, accumulation: int) -> Recipe:
        from tiphys.recipes.load import from_dict

        rows = self._few.rows
        section = {
            "train_batch_size": rows * accumulation * self._world.world,
            "train_micro_batch_size_per_gpu": rows,
            "bf16": {"enabled": self._width == 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage},
        }
        about = {"data": {"mixture": [{"dataset": "file:///unused"}]}, "objectives": {"gato": {}}}
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
        """Seconds of the slowest process in the fastest round."""
        times = []
        for _ in range(ROUNDS + 1):
            self._world.barrier()
            began = time.perf_counter()
            work()
            _wait(self._world.device)
            times.append(time.perf_counter() - began)
        return min(max(ranks) for ranks in list(zip(*self._world.gather(times), strict=True))[1:])


def _repeated(batch: TokenBatch, rows: int) -> TokenBatch:
    """The first `rows` rows; all of them again and again if there are fewer."""
    times = -(-rows // max(1, batch.rows))
    return type(batch).concatenate([batch] * times).select(slice(0, rows))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
