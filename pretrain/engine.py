"""build_engine: DeepSpeed behind one train_step, the same loss on every layout.

The loss of a step is Σ weight · loss over the targets of the *global* batch ÷ their number. A rank sees only its rows, so the
number of targets is summed over the ranks before the forward pass (one step ahead, where the trainer announces batches), and
the model divides by it. DeepSpeed then averages gradients over data-parallel ranks and accumulation steps: the divisor given
to the model is smaller by just that factor. Auxiliary gradients enter at the routers, past DeepSpeed's division by the
accumulation steps, so theirs is smaller by the number of data-parallel ranks alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain.batch import TokenBatch
from pretrain.deepspeed_config import derive
from pretrain.deepspeed_state import Address, gradient_norm, learning_rate
from pretrain.model.inputs import to_tensors
from pretrain.model.moe import mixtures, step_counts
from pretrain.parallel import LayoutError, ParallelDims, Sum

if TYPE_CHECKING:
    from pretrain.model.transformer import DecisionModel
    from recipes.schema import Recipe


@dataclass
class StepResult:
    """What one step did, summed over the global batch.

    loss             weighted sum over targets ÷ number of targets, without auxiliary terms
    auxiliary        balance and z-loss of the routers
    gradient_norm    of the whole gradient, before clipping
    loss_by_task     task's number -> (weighted loss sum, number of targets)
    task_counts      [MoE layers, tasks, experts]: tokens routed to each expert
    """

    step: int
    loss: float
    auxiliary: float
    gradient_norm: float
    learning_rate: float
    rows: int
    tokens: int
    targets: int
    flops: float
    loss_by_task: dict[int, tuple[float, int]] = field(default_factory=dict)
    task_counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))


@dataclass(frozen=True)
class Counts:
    """Numbers of a global batch that its loss is divided by."""

    targets: float
    tokens: float
    rows: float
    flops: float


class Totals:
    """Named float64 arrays in one flat tensor, so that a step is summed over the ranks by one all-reduce."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = self.flat.split(sizes)
        self._parts = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parts[name]

    def add(self, name: str, value: torch.Tensor) -> None:
        self._parts[name].add_(value)

    def all_reduce(self) -> None:
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self.flat)

    def numpy(self) -> dict[str, np.ndarray]:
        host = self.flat.cpu()
        at, out = 0, {}
        for name, part in self._parts.items():
            out[name] = host[at : at + part.numel()].view(part.shape).numpy()
            at += part.numel()
        return out


def build_engine(recipe: Recipe, model: DecisionModel, world: ParallelDims) -> Engine:
    """DeepSpeed around a DecisionModel, as the recipe's `deepspeed:` and `parallel:` sections say.

    Raises LayoutError where the section and the layout do not fit, before anything is built.
    """
    return Engine(recipe, model, world)


class Engine:
    """A model under DeepSpeed on one layout.

    rows_per_rank    rows this rank computes a step, after filling up: micro_batch × accumulation
    derived          key path of `deepspeed:` -> what was derived for it, for printing
    module           the model as this rank holds it
    step             number of steps done
    """

    def __init__(self, recipe: Recipe, model: DecisionModel, world: ParallelDims) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        sizes = derive(recipe, world, accelerator=get_accelerator().device_name())
        self.world, self.config = world, model.config
        self.derived, self.zero_stage, self.bf16 = sizes.values, sizes.stage, sizes.bf16
        self.rows, self.rows_per_rank = sizes.rows, sizes.rows_per_rank
        self.micro_batch, self.accumulation = sizes.micro_batch, sizes.accumulation
        _freeze(model, recipe.model.freeze)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, model_parameters=trainable, config=sizes.config, dist_init_required=False
        )
        if recipe.train.compile:
            self.deepspeed.compile()
        self.module: torch.nn.Module = self.deepspeed.module
        self.seed = recipe.train.seed
        self._expert_layers = [i for i in range(self.config.num_hidden_layers) if self.config.has_experts(i)]
        self._announced: dict[int, Sum] = {}

    @property
    def step(self) -> int:
        return int(self.deepspeed.global_steps)

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.deepspeed)

    def announce(self, batch: TokenBatch) -> None:
        """Start counting the global batch that this one is a part of. Every rank announces the same steps in order.

        A step that was not announced is counted, and waited for, when it is trained on.
        """
        self._announced[batch.step] = self.world.sum(
            [batch.targets, batch.real_tokens, int((batch.row >= 0).sum()), 0.0]
        )

    def train_step(self, batch: TokenBatch) -> StepResult:
        """One optimizer step on this rank's rows of the global batch."""
        counts, rate = self._counts(batch), self.learning_rate
        totals = self._totals()
        scale = self.world.data * self.accumulation
        self.module.train()
        norm: Any = 0.0
        for micro in self._micro_batches(batch):
            output = self.deepspeed(
                self._inputs(micro, training=True),
                normaliser=max(counts.targets, 1.0) / scale,
                tokens_global=max(counts.tokens, 1.0),
                auxiliary_scale=self.world.data,
            )
            self.deepspeed.backward(output.loss)
            totals.add("loss", output.loss.detach() / scale)
            totals.add("by_task", output.loss_by_task.detach())
            if self.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm = gradient_norm(self.deepspeed)
            self.deepspeed.step()
        if self.zero_stage:
            norm = gradient_norm(self.deepspeed)
        self._finish_experts(totals)
        return self._result(counts, totals.numpy(), float(norm), rate)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> np.ndarray:
        """Σ weight · loss, Σ loss and number of targets of each task, [tasks, 3], summed over this batch on all ranks.

        Collective. Ranks with fewer rows compute filler rows, because under ZeRO-3 all must go through the model as often.
        """
        self.module.eval()
        totals = self._totals()
        rows = self.micro_batch
        most = max(self.world.gather(batch.rows))
        for start in range(0, most, rows):
            micro = batch.select(slice(start, start + rows)).fill(rows)
            totals.add("by_task", self.module(self._inputs(micro, training=False)).loss_by_task)
        totals.all_reduce()
        return totals.numpy()["by_task"]

    def address(self, local: str, parameter: torch.nn.Parameter, shape: tuple[int, ...]) -> Address:
        """Where a parameter of this rank's module lies in the whole model."""
        return Address(local, 0, shape)

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Canonical name and live tensor of everything that is saved and is not a parameter: the routers' shares."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        saved = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in saved and name not in parameters:
                yield name, buffer

    def destroy(self) -> None:
        """Give back DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self.deepspeed.destroy()

    # -----------------------------------------------------------------------------------------------------------------

    def _counts(self, batch: TokenBatch) -> Counts:
        if batch.step not in self._announced:
            self.announce(batch)
        return Counts(*self._announced.pop(batch.step).result())

    def _micro_batches(self, batch: TokenBatch) -> Iterator[TokenBatch]:
        filled = batch.fill(self.rows_per_rank)
        for i in range(self.accumulation):
            yield filled.select(slice(i * self.micro_batch, (i + 1) * self.micro_batch))

    def _inputs(self, batch: TokenBatch, *, training: bool) -> dict[str, torch.Tensor]:
        dropout = self.config.task_dropout if training else 0.0
        return to_tensors(batch, self.world.device, task_dropout=dropout, seed=self.seed)

    def _totals(self) -> Totals:
        tasks, experts = max(1, len(self.config.tasks)), self.config.num_experts
        layers = len(self._expert_layers)
        shapes = {"loss": (), "by_task": (tasks, 3), "auxiliary": (2,), "experts": (layers, tasks, experts)}
        return Totals(shapes, self.world.device)

    def _finish_experts(self, totals: Totals) -> None:
        """Sum what this step counted over the ranks; the routers' shares of the step become those of the next one's loss."""
        here = [self._expert_layers.index(layer.number) for layer in mixtures(self.module)]
        if here:
            counts, losses = step_counts(self.module, self.world.device)
            totals["experts"].index_add_(0, torch.tensor(here, device=self.world.device), counts.double())
            totals.add("auxiliary", losses.sum(0))
        totals.all_reduce()
        for place, layer in zip(here, mixtures(self.module), strict=True):
            layer.finish_step(totals["experts"][place].to(torch.int64))

    def _result(self, counts: Counts, totals: dict[str, np.ndarray], norm: float, rate: float) -> StepResult:
        return StepResult(
            step=self.step,
            loss=float(totals["loss"]),
            auxiliary=float(totals["auxiliary"].sum()),
            gradient_norm=norm,
            learning_rate=rate,
            rows=int(counts.rows),
            tokens=int(counts.tokens),
            targets=int(counts.targets),
            flops=counts.flops,
            loss_by_task={t: (float(s), int(n)) for t, (s, _, n) in enumerate(totals["by_task"]) if n},
            task_counts=totals["experts"],
        )


def _freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """`model.freeze`. Raises LayoutError for a glob that names no parameter."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise LayoutError(f"model.freeze: {pattern!r} matches no parameter; they are named like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
