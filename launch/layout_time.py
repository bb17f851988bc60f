"""How long a step of a layout will take, and what its ranks send: arithmetic on rates that were measured or are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tiphys.launch.layout_rates import MOVED

if TYPE_CHECKING:
    from tiphys.launch.layout_rates import Rates
    from tiphys.pretrain.distributed.deepspeed_config import Derived
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.parallel import Grid
    from tiphys.pretrain.tokens.batch import TokenBatch


class Held(Protocol):
    """What a stage's ranks hold: parameters, and the bytes of a save, which are 12 for each parameter that a rank updates."""

    @property
    def parameters(self) -> int: ...
    @property
    def saved(self) -> int: ...


@dataclass(frozen=True)
class Work:
    """A step of a layout.

    batch        of which the operations are counted
    bounds       first layer of each pipeline stage, and the number of layers
    traffic      bytes that a rank sends, by purpose
    step_tokens  mean tokens of a global batch; 0: those of `batch`
    """

    config: DecisionConfig
    batch: TokenBatch
    grid: Grid
    sizes: Derived
    stages: Sequence[Held]
    bounds: Sequence[int]
    traffic: dict[str, int]
    step_tokens: float = 0.0


def step_seconds(work: Work, rates: Rates) -> float:
    """Passes of the slowest stage, optimizer, what DeepSpeed does with gradients, and all traffic, one after another."""
    own = max(stage.saved for stage in work.stages) / 12
    most = max(stage.parameters for stage in work.stages)
    handled = rates.handled(work.sizes.stage, most, work.sizes.accumulation)
    return _passes(work, rates) + own * MOVED / rates.memory + handled + sum(work.traffic.values()) / rates.link


def _passes(work: Work, rates: Rates) -> float:
    """Micro-batches follow one another through the stages. The slowest one sets the pace."""
    from tiphys.pretrain.model.flops import flops_per_batch
    from tiphys.pretrain.model.pipeline import ENDS, layer_operations

    config, sizes, grid, tokens = work.config, work.sizes, work.grid, max(1, work.batch.real_tokens)
    operations = flops_per_batch(config, work.batch) * (work.step_tokens or tokens) / tokens
    filled = sizes.rows_per_rank * grid.data / sizes.rows  # the slowest rank has ⌈B / ranks⌉ rows
    micro_batch = operations * filled / grid.data / sizes.accumulation
    flops, start = rates.passes(config.checkpointing)
    exchange = rates.exchange * (1.5 if config.checkpointing else 1.0) if grid.expert > 1 else 0.0
    costs, slowest = layer_operations(config), 0.0
    for first, last in itertools.pairwise(work.bounds):
        share = sum(costs[first:last]) / sum(costs)
        blocks = range(max(first - ENDS, 0), min(last - ENDS, config.num_hidden_layers))
        sparse = sum(config.has_experts(block) for block in blocks)
        slowest = max(slowest, share * micro_batch / flops + (last - first) * start + sparse * exchange)
    hop = rates.hop if grid.pipeline > 1 else 0.0
    return (slowest + hop) * (sizes.accumulation + grid.pipeline - 1)


def traffic(
    config: DecisionConfig, worst: Sequence[TokenBatch], grid: Grid, sizes: Derived, parameters: int, width: int
) -> dict[str, int]:
    """Bytes that a rank sends in a step, by purpose.

    A ring of n ranks sends (n − 1) / n of the bytes for each reduction or gathering.

    parameters  of the stage that has most
    width       bytes of a weight
    """
    part = (grid.data - 1) / grid.data * parameters * width
    times = {0: 2, 1: 3, 2: 1 + sizes.accumulation, 3: 3 * sizes.accumulation}[sizes.stage]
    tokens = max(int((batch.segment[: sizes.micro_batch] > 0).sum()) for batch in worst) * sizes.accumulation
    sparse = sum(config.has_experts(i) for i in range(config.num_hidden_layers)) / grid.pipeline
    rows = tokens * config.hidden_size * width
    away = (grid.expert - 1) / grid.expert
    return {
        "gradients and weights": int(part * times),
        "tokens to experts": int(4 * rows * config.num_experts_per_tok * sparse * away) if config.num_experts else 0,
        "between stages": int(2 * rows) if grid.pipeline > 1 else 0,
    }
