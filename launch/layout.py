"""What a recipe will need on a number of devices: memory by part and stage, traffic, and the time of a step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiphys.launch.layout_batches import first_rows
from tiphys.launch.layout_time import Work, step_seconds, traffic
from tiphys.pretrain.distributed.deepspeed_config import Derived, derive
from tiphys.pretrain.distributed.memory import Memory, Settings, Share, rank_memory
from tiphys.pretrain.parallel import Grid, LayoutError
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.launch.layout_rates import Rates
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.counting import Part, Pass
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.schema import Recipe

# First layer of each pipeline stage of a recipe, and the number of layers; empty: they are cut by operations
Cut = Callable[["Recipe", "DecisionConfig"], Sequence[int]]


def by_operations(recipe: Recipe, config: DecisionConfig) -> Sequence[int]:
    return ()


UNEVEN = 2.0  # times as many rows as are sent may arrive at a rank that holds popular experts
COPIES = 8  # of the hidden states of a micro-batch that a later pipeline stage holds beside its activations, measured
PROCESS = 330_000_000  # bytes of Python, torch and DeepSpeed in each process


@dataclass(frozen=True)
class Stage:
    """The ranks of one pipeline stage.

    peak, between   bytes in a step at most, and between two steps; `peak` with experts that are used unevenly
    even            the peak if all experts are used alike
    saved           bytes that the rank copies to the host's memory for a checkpoint
    """

    name: str
    layers: tuple[int, int]
    parameters: int
    peak: Memory
    even: Memory
    between: int
    saved: int
    in_flight: int


@dataclass(frozen=True)
class Needs:
    """What one layout of a recipe needs.

    traffic     bytes that a rank sends in a step, by purpose
    seconds     of a step; None if no rates are known
    bubble      share of the time that pipeline stages wait by the schedule
    cut         the stages are those of the run; False: a run measures its layers and may cut elsewhere (`parallel.measure`)
    """

    grid: Grid
    derived: Derived
    width: int
    parameters: int
    stages: tuple[Stage, ...]
    host: dict[str, int]
    loader: float
    traffic: dict[str, int]
    bubble: float
    seconds: float | None
    basis: str
    tokens: float
    checkpointing: bool
    cut: bool

    @property
    def peak(self) -> int:
        return max(stage.peak.total for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        found = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("grid", "derived", "stages")
        }
        stages = [dataclasses.asdict(s) | {"peak_bytes": s.peak.total, "even_bytes": s.even.total} for s in self.stages]
        layout = {"world": self.grid.world, "pipeline": self.grid.pipeline, "data": self.grid.data}
        layout |= {
            "expert": self.grid.expert,
            "zero_stage": self.derived.stage,
            "micro_batch": self.derived.micro_batch,
        }
        layout |= {"accumulation": self.derived.accumulation}
        return {"layout": layout, **found, "peak_bytes": self.peak, "stages": stages}


def predict(
    recipe: Recipe,
    config: DecisionConfig,
    worst: Sequence[TokenBatch],
    world: int,
    *,
    device: str = "cuda",
    rates: Rates | None = None,
    step_tokens: float = 0.0,
    step_bytes: float = 0.0,
    counted: bool = True,
    bounds: Sequence[int] = (),
) -> Needs:
    """What a recipe needs on `world` devices.

    Parameters
    ----------
    recipe : Recipe
    config : DecisionConfig
        Of its model.
    worst : sequence of TokenBatch
        Batches with the largest rows first; the first micro-batch of each is counted.
    world : int
        Number of processes.
    device : str
        `cuda` or `cpu`.
    rates : Rates, optional
        For the time of a step.
    step_tokens, step_bytes : float
        Mean tokens and bytes of a global batch.
    counted : bool
        False: leave out the activations, which takes much less time.
    bounds : sequence of int, optional
        First layer of each pipeline stage, and the number of layers. By default stages are cut by operations.

    Returns
    -------
    Needs

    Raises
    ------
    LayoutError
        If the engine would refuse the layout.
    """
    from tiphys.pretrain.distributed.layout_errors import expert_errors, stage_errors
    from tiphys.pretrain.model.counting import Part
    from tiphys.pretrain.model.pipeline import partition
    from tiphys.pretrain.parallel import refuse

    layout = recipe.parallel
    grid = Grid(0, world, layout.pipeline, layout.expert)
    refuse(
        [*stage_errors(layout.pipeline, config.num_hidden_layers), *expert_errors(layout.expert, config.num_experts)]
    )
    sizes = derive(recipe, grid, accelerator=device)
    cut = bool(bounds) or layout.pipeline == 1 or not layout.measure
    bounds = bounds or partition(config, layout.pipeline)
    stages = tuple(_stages(recipe, config, worst if counted else (), grid, sizes, bounds, device))
    parameters = sum(p.numel() for p in Part(config).parameters())
    bubble = (layout.pipeline - 1) / (sizes.accumulation + layout.pipeline - 1)
    width = 2 if sizes.bf16 else 4
    sent = traffic(config, worst, grid, sizes, max(stage.parameters for stage in stages), width)
    work = Work(config, worst[0], grid, sizes, stages, bounds, sent, step_tokens)
    seconds = None if rates is None else step_seconds(work, rates)
    return Needs(
        grid=grid,
        derived=sizes,
        width=width,
        parameters=parameters,
        stages=stages,
        host=_host(recipe, grid, stages),
        loader=0.0 if not seconds else step_bytes / grid.data / seconds,
        traffic=sent,
        bubble=bubble,
        seconds=seconds,
        basis=rates.basis if rates else "",
        tokens=step_tokens,
        checkpointing=config.checkpointing,
        cut=cut,
    )


def _stages(
    recipe: Recipe,
    config: DecisionConfig,
    worst: Sequence[TokenBatch],
    grid: Grid,
    sizes: Derived,
    bounds: Sequence[int],
    device: str,
) -> Iterator[Stage]:
    """The first and the last stage, and those between them that have the most layers or the most activations."""
    import torch

    from tiphys.pretrain.model.counting import NOTHING, Part
    from tiphys.pretrain.model.inputs import to_tensors

    inputs = [to_tensors(first_rows(batch, sizes.micro_batch)) for batch in worst]
    state = sizes.micro_batch * max((batch.length for batch in worst), default=0) * config.hidden_size
    count = grid.pipeline
    middle = range(1, count - 1)

    def layers(stage: int) -> int:
        return bounds[stage + 1] - bounds[stage]

    def activations(stage: int) -> int:
        return layers(stage) * min(count - stage, sizes.accumulation)

    largest = {max(middle, key=key) for key in (layers, activations)} if middle else set()
    for stage in sorted({0, *largest, count - 1}):
        first, last = bounds[stage], bounds[stage + 1]
        in_flight = min(count - stage, sizes.accumulation)
        found = []
        for uneven in (1.0, UNEVEN):
            part = Part(config, first, last, ranks=grid.expert, imbalance=uneven)
            part.to(torch.bfloat16 if sizes.bf16 else torch.float32)
            _freeze(part, recipe.model.freeze)
            share = _share(part, grid)
            settings = _settings(recipe, sizes, share, device)
            passes = max((_count(part, micro, settings) for micro in inputs), key=lambda p: p.peak, default=NOTHING)
            peak, steady = rank_memory(share, settings, passes, in_flight)
            more = _of_neighbours(stage, grid, share, state) * settings.width
            peak = dataclasses.replace(peak, communication=peak.communication + more)
            found.append((peak, steady))
            if grid.expert == 1:
                break
        name = "all" if count == 1 else "first" if stage == 0 else "last" if stage == count - 1 else "middle"
        yield Stage(
            name=name,
            layers=(first, last),
            parameters=share.trained + share.frozen,
            peak=found[-1][0],
            even=found[0][0],
            between=found[0][1],
            saved=12 * (share.own if sizes.stage else share.trained),
            in_flight=in_flight,
        )


def _of_neighbours(stage: int, grid: Grid, share: Share, state: int) -> int:
    """Elements that a pipeline stage holds for its neighbours, beside its activations: measured, not read from a source.

    state  elements of a micro-batch's hidden states
    """
    return share.largest + (COPIES * state if stage else 0) if grid.pipeline > 1 else 0


def _count(part: Part, inputs: dict[str, Any], settings: Settings) -> Pass:
    from tiphys.pretrain.model.counting import count_pass

    bucket = settings.bucket * settings.width * (settings.stage in (1, 2))
    again = settings.stage < 2 and settings.accumulation > 1  # nothing else asks for it
    return count_pass(part, inputs, device=settings.device, stay=settings.stage < 2, bucket=bucket, again=again)


def _freeze(part: Part, patterns: Sequence[str]) -> None:
    import fnmatch

    for name, parameter in part.named_parameters():
        whole = part.canonical_name(name)
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(whole, pattern) for pattern in patterns))


def _share(part: Part, grid: Grid) -> Share:
    from tiphys.pretrain.model.counting import RankExperts

    divided = {id(p) for m in part.modules() if isinstance(m, RankExperts) for p in m.parameters()}
    trained = [p for p in part.parameters() if p.requires_grad]
    return Share(
        dense=sum(p.numel() for p in trained if id(p) not in divided),
        expert=sum(p.numel() for p in trained if id(p) in divided),
        frozen=sum(p.numel() for p in part.parameters() if not p.requires_grad),
        largest=max((p.numel() for p in part.parameters()), default=0),
        data=grid.data,
        groups=grid.data // grid.expert,
    )


def _settings(recipe: Recipe, sizes: Derived, share: Share, device: str) -> Settings:
    zero: Any = sizes.config.get("zero_optimization") or {}
    overlap = zero.get("overlap_comm")
    overlap = sizes.stage == 3 if overlap is None else bool(overlap)
    bucket = int(zero.get("reduce_bucket_size") or min(500_000_000, share.trained))
    return Settings(
        stage=sizes.stage,
        width=2 if sizes.bf16 else 4,
        bucket=bucket,
        overlap=overlap and recipe.parallel.pipeline == 1,
        offload=_offloaded(zero, "offload_optimizer"),
        offload_weights=_offloaded(zero, "offload_param"),
        accumulation=sizes.accumulation,
        device=device,
    )


def _offloaded(zero: Any, name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") == "cpu"


def _host(recipe: Recipe, grid: Grid, stages: Sequence[Stage]) -> dict[str, int]:
    """Bytes of the host's memory for each rank of the first stage."""
    zero: Any = recipe.deepspeed.get("zero_optimization") or {}
    saved = max(stage.saved for stage in stages)
    return {
        "processes": 2 * PROCESS,
        "loader cache of a node": parse_size(recipe.data.cache.memory),
        "finished batches": parse_size(recipe.data.prefetch),
        "snapshot of a save": saved,
        "offloaded optimizer": saved if _offloaded(zero, "offload_optimizer") else 0,
    }


def changed(recipe: Recipe, config: DecisionConfig, values: Mapping[str, Any]) -> tuple[Recipe, DecisionConfig]:
    """The recipe and its model's config with other values of the keys in `recipes/automatic.py`, by their short names."""
    section = copy.deepcopy(dict(recipe.deepspeed))
    if "micro_batch" in values:
        section["train_micro_batch_size_per_gpu"] = values["micro_batch"]
        section.pop("gradient_accumulation_steps", None)
    if "zero_stage" in values:
        section["zero_optimization"] = {**(section.get("zero_optimization") or {}), "stage": values["zero_stage"]}
    grid = {name: values[name] for name in ("pipeline", "expert") if name in values}
    again = values.get("checkpointing", recipe.model.checkpointing)
    made = copy.copy(config)
    made.checkpointing = again
    return (
        dataclasses.replace(
            recipe,
            deepspeed=section,
            parallel=dataclasses.replace(recipe.parallel, **grid),
            model=dataclasses.replace(recipe.model, checkpointing=again),
        ),
        made,
    )


def remedies(
    recipe: Recipe,
    config: DecisionConfig,
    worst: Sequence[TokenBatch],
    world: int,
    memory: int,
    *,
    device: str,
    cut: Cut = by_operations,
) -> list[str]:
    """Single changes of the recipe with which it fits, in the order in which they cost time."""
    sizes = derive(recipe, Grid(0, world, recipe.parallel.pipeline, recipe.parallel.expert), accelerator=device)
    micros = [m for m in (1 << i for i in range(22, -1, -1)) if m < sizes.micro_batch]
    tries: list[tuple[str, dict[str, Any]]] = [(f"micro-batch {m}", {"micro_batch": m}) for m in micros]
    tries += [] if recipe.model.checkpointing else [("model.checkpointing: true", {"checkpointing": True})]
    tries += [(f"ZeRO stage {s}", {"zero_stage": s}) for s in (1, 2, 3) if s > sizes.stage]
    both = (
        [] if recipe.model.checkpointing else [("model.checkpointing: true", {"checkpointing": True, "micro_batch": 1})]
    )
    out, seen = list[str](), set[str]()
    for name, change in tries:
        kind = name.split()[0]
        if kind not in seen and _fits(*changed(recipe, config, change), worst, world, memory, device, cut):
            seen.add(kind)
            out.append(name)
    for name, change in both:
        if not out and _fits(*changed(recipe, config, change), worst, world, memory, device, cut):
            out.append(f"{name} and micro-batch 1")
    return out


def _fits(
    recipe: Recipe, config: DecisionConfig, worst: Sequence[TokenBatch], world: int, memory: int, device: str, cut: Cut
) -> bool:
    try:
        bounds = cut(recipe, config)
        if predict(recipe, config, worst, world, device=device, counted=False, bounds=bounds).peak > memory:
            return False  # without activations already
        return predict(recipe, config, worst, world, device=device, bounds=bounds).peak <= memory
    except LayoutError:
        return False
