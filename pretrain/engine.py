"""The engine: DeepSpeed behind one `train_step`, with the same loss on every layout.

The loss of a step is Σ weight · loss over the targets of the *global* batch ÷ their number. A rank has only some rows, so the
number of targets is summed over the ranks before the forward pass (one step ahead, when the trainer announces a batch), and
the model divides by this sum. DeepSpeed then averages gradients over data-parallel ranks and accumulation steps; to
compensate, the divisor that the model gets is smaller by the product of both. Auxiliary gradients enter at the routers, after
DeepSpeed's division by the accumulation steps, so their scale is the number of data-parallel ranks only.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from tiphys.pretrain.action_error import COLUMNS, NativeErrors, action_errors
from tiphys.pretrain.distributed.deepspeed_config import derive
from tiphys.pretrain.distributed.deepspeed_state import (
    Address,
    advance_average,
    forget_groups,
    fragments,
    gradient_norm,
    keep_average,
    learning_rate,
    refresh,
)
from tiphys.pretrain.distributed.layout_errors import expert_errors, zero_stage
from tiphys.pretrain.distributed.spans import Spans, peak_memory
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.model.heads import SUMS
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.layers import Source, copy_buffers, declared, initial_range, initialise
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.parallel import LayoutError, ParallelDims, Sum, refuse
from tiphys.pretrain.phases import mark
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.balance import Balance
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.recipes.schema import Recipe


@dataclass
class StepResult:
    """Result of one step over the global batch.

    loss             weighted sum over targets ÷ number of targets, without auxiliary terms
    auxiliary        balance loss plus z-loss of the routers
    gradient_norm    norm of the whole gradient, before clipping
    loss_by_task     number of a task -> (sum of the losses, without their weights; number of targets)
    gradient_by_line name of a mixture line -> its share of Σ weight · loss
    loss_weights     name of a mixture line whose weight is chosen -> its weight at the next step
    task_counts      [MoE layers, tasks, experts]: tokens routed to each expert
    memory           peak memory so far on the rank that needed most, in bytes (of its device, or resident on a CPU)
    all_to_all       seconds for sending tokens to experts and back, including waits; mean over the ranks; None without
                     expert parallelism
    bubble           share of the time from the step's start to the last pass that the pipeline's stages spent outside
                     passes: the schedule's bubble, uneven stages and transfers; None without a pipeline
    bubble_bound     the same share if stages were even and transfers took no time
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
    gradient_by_line: dict[str, float] = field(default_factory=dict)
    loss_weights: dict[str, float] = field(default_factory=dict)
    task_counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    memory: int = 0
    all_to_all: float | None = None
    bubble: float | None = None
    bubble_bound: float | None = None


@dataclass(frozen=True)
class Counts:
    """Sums over a global batch: targets, real tokens, real rows, floating-point operations."""

    targets: float
    tokens: float
    rows: float
    flops: float


class Totals:
    """Named float64 arrays in one flat tensor, so that one all-reduce sums all of a step's numbers over the ranks."""

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


def divides_weights(recipe: Recipe, world: ParallelDims) -> bool:
    """Whether no rank holds all weights on this layout: there are pipeline stages, divided experts or partitions of ZeRO-3."""
    return world.pipeline > 1 or world.expert > 1 or zero_stage(recipe.deepspeed) == 3


def build_engine(recipe: Recipe, model: DecisionModel, world: ParallelDims) -> Engine:
    """Put a model under DeepSpeed, as the recipe's `deepspeed:` and `parallel:` sections say.

    Parameters
    ----------
    recipe : Recipe
    model : DecisionModel
        The whole model. With pipeline stages, or experts divided among ranks, a rank keeps only its part of the weights.
        If the model is on the meta device, each rank draws the weights that it needs, or reads them from its `source`.
    world : ParallelDims
        The grid of this launch.

    Returns
    -------
    Engine

    Raises
    ------
    LayoutError
        If the section and the layout do not fit, before anything is built.
    """
    if world.pipeline > 1:
        from tiphys.pretrain.distributed.pipeline_engine import PipelineEngine

        return PipelineEngine(recipe, model, world)
    return Engine(recipe, model, world)


class Engine:
    """A model under DeepSpeed on one layout. `build_engine` makes it.

    Parameters
    ----------
    recipe : Recipe
    model : DecisionModel
        The whole model, which may be on the meta device.
    world : ParallelDims
        The grid of this launch.

    Attributes
    ----------
    step : int
        Number of steps done.
    learning_rate : float
        Learning rate of the next step.
    module : torch.nn.Module
        This rank's part of the model.
    rows : int
        Real rows of a global batch.
    rows_per_rank : int
        Rows that this rank computes in each step, filler rows included: micro_batch × accumulation.
    derived : dict of str to object
        Key path of `deepspeed:` -> the value that was derived for it.

    Raises
    ------
    LayoutError
        If the recipe cannot run on this layout, or `model.freeze` names no parameter.
    """

    def __init__(self, recipe: Recipe, model: DecisionModel, world: ParallelDims) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator().device_name()
        sizes = derive(recipe, world, accelerator=accelerator)
        self.world, self.seed = world, recipe.train.seed
        self.balance: Balance | None = None  # of the mixture's lines
        self.native: NativeErrors | None = None  # what `evaluate` also measures
        self.text_sizes = np.zeros(0, np.int64)  # bytes of each id of the text tokenizer, which `evaluate` counts
        self.config = cast("DecisionConfig", model.config)
        self.derived, self.zero_stage, self.bf16 = sizes.values, sizes.stage, sizes.bf16
        self.rows, self.rows_per_rank = sizes.rows, sizes.rows_per_rank
        self.micro_batch, self.accumulation = sizes.micro_batch, sizes.accumulation
        freeze(model, recipe.model.freeze)
        undrawn = any(p.is_meta for p in model.parameters())
        module = self._build(model)
        if world.expert > 1:
            _shard_experts(module, self.config, world)
        if undrawn and sizes.stage < 3:
            initialise(module, self.seed, self.canonical, model.source)
        trained = [p for p in module.parameters() if p.requires_grad]
        sized = derive(recipe, world, accelerator=accelerator, elements=sum(p.numel() for p in trained))
        self.derived |= sized.values
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            config=sized.config,
            dist_init_required=False,
        )
        if recipe.train.compile:
            self.deepspeed.compile()
        self.module: torch.nn.Module = self.deepspeed.module
        self._expert_layers = [i for i in range(self.config.num_hidden_layers) if self.config.has_experts(i)]
        self._first_expert = _first_experts(self.module)
        if undrawn and sizes.stage == 3:
            self._fill_partitions(model.source)
        self._decay = recipe.train.ema.decay
        if self._decay:
            keep_average(self.deepspeed)
        self._announced: dict[int, Sum] = {}
        self._exchanges = Spans(world.device)
        if world.expert > 1 and not recipe.train.compile:
            _time_exchanges(self.module, self._exchanges)

    @property
    def step(self) -> int:
        return int(self.deepspeed.global_steps)

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.deepspeed)

    def announce(self, batch: TokenBatch) -> None:
        """Start to count the targets and tokens of the global batch that `batch` is a part of.

        All ranks must announce the same steps in the same order. `train_step` announces a batch that was not announced, and
        then has to wait for the other ranks.
        """
        self._announced[batch.step] = self.world.sum(
            [batch.targets, batch.real_tokens, int((batch.row >= 0).sum()), flops_per_batch(self.config, batch)]
        )

    def train_step(self, batch: TokenBatch) -> StepResult:
        """One optimizer step. Collective.

        Parameters
        ----------
        batch : TokenBatch
            This rank's rows of the global batch, at most `rows_per_rank`.

        Returns
        -------
        StepResult
            Numbers of the global batch, the same on every rank.
        """
        counts, rate = self._counts(batch), self.learning_rate
        totals = self._totals()
        self.module.train()
        self._exchanges.take()  # drop what an evaluation measured
        before = self.step
        norm = self._train(batch if self.balance is None else self.balance.weighted(batch), counts, totals)
        if self._decay:
            advance_average(self.deepspeed, min(self._decay, (1 + before) / (10 + before)))
        measured = [*self._passes(), self._exchanges.take()[0], float(peak_memory(self.world.device))]
        totals["ranks"][self.world.rank] = torch.tensor(measured, dtype=torch.float64)
        self._finish_experts(totals)
        return self._result(counts, totals.numpy(), float(norm), rate)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> dict[str, np.ndarray]:
        """Evaluate the model, without training, on the rows of all ranks. Collective.

        Ranks with fewer rows compute filler rows, because all ranks must call the model equally often.

        Parameters
        ----------
        batch : TokenBatch
            Rows of this rank, of any number.

        Returns
        -------
        dict of str to ndarray
            `by_task` [tasks, SUMS]: see `heads.add_by_task`. `text_bytes` [tasks]: bytes of the texts among the targets.
            `errors` [tasks, 4] and `by_field` [fields of `native`, 2]: see `action_error`; zeros with a pipeline, whose last
            stage returns only the loss.
        """
        mark("validate")
        self.module.eval()
        totals = self._totals()
        times = math.ceil(max(self.world.gather(batch.rows)) / self.micro_batch)
        self._evaluate(list(self.micro_batches(batch, times)), totals)
        totals.add("text_bytes", torch.from_numpy(self._text_bytes(batch)).to(self.world.device))
        totals.all_reduce()
        sums = totals.numpy()
        return {name: sums[name] for name in ("by_task", "text_bytes", "errors", "by_field")}

    def canonical(self, local: str) -> str:
        """Name in the whole model of a parameter or buffer of this rank's module."""
        return local

    def address(self, local: str, parameter: torch.nn.Parameter, shape: tuple[int, ...]) -> Address:
        """Where a parameter of this rank's module is in the whole model."""
        first = self._first_expert.get(id(parameter))
        if first is None:
            return Address(self.canonical(local), 0, shape)
        return Address(self.canonical(local), first * math.prod(shape[1:]), (self.config.num_experts, *shape[1:]))

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Canonical name and live tensor of each saved buffer: the counts and biases of the routers."""
        saved = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in saved:
                yield self.canonical(name), buffer

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers. The engine cannot be used afterwards."""
        self.deepspeed.destroy()
        forget_groups()

    # --- what PipelineEngine overrides ---------------------------------------------------------------------------------

    def _build(self, model: DecisionModel) -> torch.nn.Module:
        """This rank's part of the model, with the choice of frozen parameters, and with its weights if `model` has them."""
        if not any(p.is_meta for p in model.parameters()):
            return model
        made = type(model)(self.config, drawn=False)
        for ours, theirs in zip(made.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return made

    def _fill_partitions(self, source: Source | None) -> None:
        """Fill the part of each parameter that ZeRO-3 has given this rank. Collective."""
        starts = {id(parameter): start for _, parameter, start in declared(self.module)}
        by_name = {self.canonical(name): starts[id(p)] for name, p in self.module.named_parameters() if id(p) in starts}
        for part in fragments(self.deepspeed, self.address):
            start = by_name[part.name]
            values = initial_range(part.name, part.shape, start, self.seed, source, part.start, part.numel)
            for view in (part.views.get("master"), part.views.get("frozen")):
                if view is not None:
                    # masters begin with what the weights can say, as on other layouts
                    view.copy_(values if part.weight is None else values.to(part.weight.dtype))
        copy_buffers(self.module, self.canonical, source)
        refresh(self.deepspeed)

    def _train(self, batch: TokenBatch, counts: Counts, totals: Totals) -> Any:
        """Forward, backward and step. Adds the losses to `totals` and returns the gradient norm."""
        scale = self.world.data * self.accumulation
        norm = None
        for micro in self.micro_batches(batch, self.accumulation):
            mark("forward")
            output = self.deepspeed(self.inputs(micro, training=True), **self._divisors(counts))
            mark("backward")
            self.deepspeed.backward(output.loss)
            totals.add("loss", output.loss.detach() / scale)
            totals.add("by_task", output.loss_by_task.detach())
            if self.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm = gradient_norm(self.deepspeed)
            mark("step")
            self.deepspeed.step()
        return gradient_norm(self.deepspeed) if norm is None else norm

    def _passes(self) -> tuple[float, float]:
        """Seconds inside this stage's passes in this step, and seconds from the step's start to the end of the last pass."""
        return 0.0, 0.0

    def _evaluate(self, micros: list[TokenBatch], totals: Totals) -> None:
        import deepspeed

        for micro in micros:
            inputs = self.inputs(micro, training=False)
            output = self.module(inputs)
            totals.add("by_task", output.loss_by_task)
            ends = [*self.module.output.parameters(), *self.module.head.parameters()]  # type: ignore[union-attr]
            with deepspeed.zero.GatheredParameters(ends, enabled=self.zero_stage == 3):
                errors, by_field = action_errors(self.module, output, inputs, self.native)  # type: ignore[arg-type]
                totals.add("errors", errors)
                totals.add("by_field", by_field)

    # -----------------------------------------------------------------------------------------------------------------

    def _text_bytes(self, batch: TokenBatch) -> np.ndarray:
        """float64 [tasks]: bytes of the tokens of texts that a batch predicts."""
        sizes = self.text_sizes
        said = (batch.target >= 0) & (batch.target < len(sizes))
        tasks = max(1, len(self.config.tasks))
        return np.bincount(batch.task[said], sizes[batch.target[said]], tasks).astype(np.float64)

    def _counts(self, batch: TokenBatch) -> Counts:
        if batch.step not in self._announced:
            self.announce(batch)
        return Counts(*self._announced.pop(batch.step).result())

    def _divisors(self, counts: Counts) -> dict[str, float]:
        """The divisors that the model gets; see the docstring of this file."""
        return {
            "normaliser": max(counts.targets, 1.0) / (self.world.data * self.accumulation),
            "tokens_global": max(counts.tokens, 1.0),
            "auxiliary_scale": float(self.world.data),
        }

    def micro_batches(self, batch: TokenBatch, times: int) -> Iterator[TokenBatch]:
        """The batch in `times` micro-batches; the last ones are filled up with filler rows."""
        filled = batch.fill(times * self.micro_batch)
        for i in range(times):
            yield filled.select(slice(i * self.micro_batch, (i + 1) * self.micro_batch))

    def inputs(self, batch: TokenBatch, *, training: bool) -> dict[str, torch.Tensor]:
        """The model's inputs on this rank's device; training hides tasks from the router (`task_dropout`)."""
        dropout = self.config.task_dropout if training else 0.0
        return to_tensors(batch, self.world.device, task_dropout=dropout, seed=self.seed)

    def _totals(self) -> Totals:
        tasks, experts = max(1, len(self.config.tasks)), self.config.num_experts
        layers = len(self._expert_layers)
        shapes = {
            "loss": (),
            "by_task": (tasks, SUMS),
            "text_bytes": (tasks,),
            "auxiliary": (2,),
            "experts": (layers, tasks, experts),
        }
        fields = len(self.native.fields) if self.native is not None else 0
        shapes |= {"errors": (tasks, COLUMNS), "by_field": (fields, 2), "ranks": (self.world.world, 4)}
        return Totals(shapes, self.world.device)

    def _finish_experts(self, totals: Totals) -> None:
        """Sum all of the step's numbers over the ranks, and give the routers the global counts for their next balance loss."""
        here = [self._expert_layers.index(layer.number) for layer in mixtures(self.module)]
        if here:
            counts, losses = step_counts(self.module, self.world.device)
            totals["experts"].index_add_(0, torch.tensor(here, device=self.world.device), counts.double())
            totals.add("auxiliary", losses.sum(0))
        totals.all_reduce()
        for place, layer in zip(here, mixtures(self.module), strict=True):
            layer.finish_step(totals["experts"][place].to(torch.int64))

    def _result(self, counts: Counts, totals: dict[str, np.ndarray], norm: float, rate: float) -> StepResult:
        passes, whole, exchanges, memory = totals["ranks"].T
        stages, more = self.world.pipeline, dict[str, Any]()
        if self.balance is not None:
            more["gradient_by_line"] = self.balance.observe(self.step, totals["by_task"][:, 0])
            more["loss_weights"] = self.balance.chosen()
        if stages > 1:
            more["bubble"] = float(1 - passes.mean() / max(whole.max(), 1e-9))
            more["bubble_bound"] = (stages - 1) / (self.accumulation + stages - 1)
        if self.world.expert > 1:
            more["all_to_all"] = float(exchanges.mean())
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
            loss_by_task={t: (float(s), int(n)) for t, (_, s, n) in enumerate(totals["by_task"][:, :3]) if n},
            task_counts=totals["experts"],
            memory=int(memory.max()),
            **more,
        )


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that `model.freeze` names. Raises LayoutError if a pattern matches none, or all are frozen."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise LayoutError(
                f"model.freeze: {pattern!r} matches no parameter; the names of parameters look like {names[0]!r}"
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LayoutError("model.freeze: all parameters are frozen, so there is nothing to train")


def _shard_experts(module: torch.nn.Module, config: Any, world: ParallelDims) -> None:
    from tiphys.pretrain.model.expert_parallel import shard_experts

    refuse(expert_errors(world.expert, config.num_experts))
    shard_experts(module, config, world.expert_rank, world.expert)


def _time_exchanges(module: torch.nn.Module, spans: Spans) -> None:
    from tiphys.pretrain.model.expert_parallel import ShardedExperts

    for layer in module.modules():
        if isinstance(layer, ShardedExperts):
            layer.spans = spans


def _first_experts(module: torch.nn.Module) -> dict[int, int]:
    """For parameters that are a slice of a stack of experts: id of the parameter -> number of its first expert."""
    return {
        id(p): int(layer.experts.first)  # type: ignore[arg-type]
        for layer in mixtures(module)
        if hasattr(layer.experts, "first")
        for p in layer.experts.parameters()
    }
