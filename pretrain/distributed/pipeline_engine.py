"""The engine with pipeline stages: the same steps, but this rank computes only the layers of its stage.

Only the first stage gets rows. Targets and the divisors of the loss are sent on with the activations; the last stage computes
the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tiphys.pretrain.distributed.deepspeed_state import gradient_norm, time_passes
from tiphys.pretrain.distributed.layer_costs import layer_seconds
from tiphys.pretrain.distributed.spans import Spans
from tiphys.pretrain.engine import Counts, Engine, Totals
from tiphys.pretrain.model.pipeline import OutputStage, partition, pipeline_inputs
from tiphys.pretrain.model.pipeline_module import DecisionPipeline
from tiphys.pretrain.parallel import LayoutError, ParallelDims
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.sections.objective import Objective

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.recipes.schema import Recipe

MicroBatch = tuple[Any, None]


class PipelineEngine(Engine):
    """As `Engine`. On every stage except the first, `train_step` and `evaluate` take a batch without rows."""

    module: DecisionPipeline

    def __init__(self, recipe: Recipe, model: DecisionModel, world: ParallelDims) -> None:
        self._recipe = recipe
        super().__init__(recipe, model, world)
        self._clock = Spans(world.device)
        self._began: Any = None
        time_passes(self.deepspeed, self._clock.span)

    def canonical(self, local: str) -> str:
        return self._stage.canonical_name(local)

    def _build(self, model: DecisionModel) -> torch.nn.Module:
        self.bounds = self._bounds()
        self._stage = DecisionPipeline(self.config, self.bounds)
        whole = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for name, part in [*self._stage.named_parameters(), *self._stage.named_buffers()]:
            source = whole[self._stage.canonical_name(name)]
            part.requires_grad_(source.requires_grad)
            if not source.is_meta:
                part.data.copy_(source.data)
        return self._stage

    def _bounds(self) -> list[int]:
        """First layer of each stage. Only rank 0 measures, so that all ranks agree. Checkpoints do not depend on the stages."""
        try:
            bounds = partition(self.config, self.world.pipeline)
        except ValueError as error:
            raise LayoutError(f"parallel.pipeline: {error}") from error
        if not self._recipe.parallel.measure:
            return bounds
        seconds: list[float] = self.world.gather(self._layer_seconds() if self.world.rank == 0 else None)[0]
        bounds = partition(self.config, self.world.pipeline, costs=seconds)
        stages = [f"{sum(seconds[i:j]) * 1000:.1f} ms for layers {i}–{j - 1}" for i, j in itertools.pairwise(bounds)]
        self.derived["pipeline stages"] = f"{', '.join(stages)} (measured, a micro-batch)"
        return bounds

    def _layer_seconds(self) -> list[float]:
        length = max((o.context for o in self._recipe.objectives.values()), default=Objective.context)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        world = self.world
        return layer_seconds(self.config, self.micro_batch, length, world.device, dtype, expert=world.expert)

    def _train(self, batch: TokenBatch, counts: Counts, totals: Totals) -> Any:
        self._began = self._clock.mark()
        micros = self.micro_batches(batch, self.accumulation) if self.world.is_first_stage else ()
        loss = self.deepspeed.train_batch(self._feed(micros, training=True, **self._divisors(counts)))
        if self.world.rank == 0:  # every rank has the loss, but it must count once
            totals.add("loss", loss.detach())
        self._take(totals)
        return gradient_norm(self.deepspeed)

    def _passes(self) -> tuple[float, float]:
        return self._clock.take(self._began)

    def _evaluate(self, micros: list[TokenBatch], totals: Totals) -> None:
        if micros:
            feed = self._feed(micros if self.world.is_first_stage else (), training=False)
            self.deepspeed.eval_batch(feed, bcast_loss=False, num_micro_batches=len(micros))
            self._clock.take()
            self._take(totals)

    def _feed(self, micros: Any, *, training: bool, **divisors: float) -> Iterator[MicroBatch]:
        """Micro-batches for the first stage. DeepSpeed also asks the last stage, for labels; it gets None, the cargo has them."""
        for micro in micros:
            yield pipeline_inputs(self.inputs(micro, training=training), self.config, **divisors), None
        while not self.world.is_first_stage:
            yield None, None

    def _take(self, totals: Totals) -> None:
        for layer in self.module.modules():
            if isinstance(layer, OutputStage):
                sums = layer.take_loss_by_task()
                if sums is not None:
                    totals.add("by_task", sums.detach())
