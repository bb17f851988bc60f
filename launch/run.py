"""One rank of a run, from a recipe to a policy: what `launch/train.py` does once the recipe is right."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.launch.finish import finish, start_evaluation
from tiphys.launch.mixture import follow, names
from tiphys.recipes.load import to_yaml
from tiphys.recipes.schema import Recipe

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.callbacks import Callback
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.tokens.batch import TokenBatch


MAPPED = 200_000  # episodes
# What gloo and NCCL say when the process at the other end of a connection is gone
_LOST = re.compile(
    r"onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|ncclRemoteError|[Rr]emote process exit"
)


def run(recipe: Recipe) -> int:
    """Train, evaluate, publish, report. 0 when all is done; 130 when a signal stopped it (saved, to be resumed); 1 when another
    rank is gone."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.launch.node_cache import NodeCache
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.engine import build_engine
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.trainer import Trainer

    world = ParallelDims(recipe.parallel)
    indexes = open_datasets(recipe, world)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    model = DecisionModel(DecisionConfig.from_recipe(recipe.model, objectives.vocabulary), seed=recipe.train.seed)
    engine = build_engine(recipe, model, world)
    if world.rank == 0:
        write_recipe(recipe)
        announce(recipe, objectives, plan, engine)
    fingerprints = [index.fingerprint for index in indexes]
    sizes = recipe.data.cache
    cache = NodeCache(world, sizes.dir, size(sizes.memory), size(sizes.disk), fingerprints)
    loader = None
    if world.is_first_stage:
        arguments = loader_arguments(recipe, objectives)
        loader = TrajectoryLoader(
            plan, world.home, **arguments, cache=cache.budget, peers=cache.peers, stop=recipe.train.steps
        )
    with loader or nullcontext():
        stages = [cache, *callbacks(recipe, objectives, indexes, world)]
        requests = follow(recipe.run.dir) if world.rank == 0 else list
        trainer = Trainer(recipe, engine, loader, stages, fingerprints, requests)
        try:
            done = trainer.fit(resume=Checkpoint.newest_whole(recipe.run.dir))
        except RuntimeError as error:
            if not _LOST.search(str(error)):
                raise
            saved = Checkpoint.newest_whole(recipe.run.dir)
            print(lost(error, trainer.step, saved.step if saved else 0), file=sys.stderr, flush=True)
            return 1
    rank = world.rank
    world.close()  # nothing collective from here on: the other ranks' cores are free for the evaluation
    if not done:
        return 130
    return finish(recipe, objectives) if rank == 0 else 0


def lost(error: Exception, step: int, saved: int) -> str:
    """What to say where another process of the run is gone: which connection, and how to go on."""
    how = next((line for line in str(error).splitlines() if _LOST.search(line)), str(error)).strip()
    return (
        f"tiphys: after step {step}: another process of this run is gone or cannot be reached ({how}). "
        "If it wrote an error, that is the cause; if not, its machine failed or ran out of memory. The same command resumes "
        + (f"from step {saved}" if saved else "from the beginning: nothing was saved yet")
    )


def open_datasets(recipe: Recipe, world: ParallelDims | None = None) -> list[EpisodeIndex]:
    """One index a line of the mixture. The first rank of a machine decodes a new one; the others find it decoded."""
    from tiphys.dataio.index import EpisodeIndex

    opened: dict[str, EpisodeIndex] = {}

    def open_all() -> None:
        for entry in recipe.data.mixture:
            if entry.dataset not in opened:
                opened[entry.dataset] = EpisodeIndex.open(entry.dataset)

    if world is None or world.local == 0:
        open_all()
    if world is not None:
        world.barrier()
        open_all()
    return [opened[entry.dataset] for entry in recipe.data.mixture]


def make_plan(
    recipe: Recipe, indexes: list[EpisodeIndex], objectives: Objectives, *, held_out: bool = False, rows: int = 0
) -> SamplingPlan:
    """The plan of a recipe; `held_out`: over the held-out episodes, `rows` a step."""
    from tiphys.dataio.format.document import cache_folder
    from tiphys.dataio.plan.preferences import preference
    from tiphys.dataio.sampling import PlanEntry, SamplingPlan

    entries = []
    for i, (line, index) in enumerate(zip(recipe.data.mixture, indexes, strict=True)):
        numbers = objectives.task_numbers(i)
        entries.append(
            PlanEntry(
                index=index,
                lengths=objectives.lengths(i),
                weight=line.weight,
                name=names(recipe)[i],
                tasks=[int(t) for t in range(len(index.tasks)) if numbers[t] >= 0],
                priority=None if held_out else preference(index, line.prefer, line.top),
            )
        )
    return SamplingPlan(
        entries,
        rows=rows or int(recipe.deepspeed["train_batch_size"]),
        budget=objectives.length,
        seed=recipe.train.seed,
        weight_unit=recipe.data.weight_unit,
        replacement=recipe.data.replacement or held_out,
        buckets=recipe.data.buckets,
        validation=recipe.data.validation,
        held_out=held_out,
        # A large plan is sorted once a machine and mapped into memory by every process; a small one is sorted sooner than read.
        cache_dir=str(cache_folder() / "plans") if sum(index.episodes for index in indexes) > MAPPED else "",
    )


def loader_arguments(recipe: Recipe, objectives: Objectives, *, training: bool = True) -> dict[str, Any]:
    """What every loader of this recipe is told, whoever reads from it."""
    lines = range(len(recipe.data.mixture))
    return {
        "make_batch": partial(objectives.make_batch, seed=recipe.train.seed, training=training),
        "needs": [objectives.needs(i) for i in lines],
        "tasks": [objectives.task_numbers(i) for i in lines],
        "requests": recipe.data.requests,
        "prefetch": size(recipe.data.prefetch),
    }


def size(text: str) -> int:
    """`8GiB`, `500MB`, `4096` -> bytes."""
    units = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    units |= {f"{k}i": 1024 ** (i + 1) for i, k in enumerate("kmgt")}
    number = text.strip().lower().removesuffix("b").strip()
    unit = number.lstrip("0123456789.")
    try:
        return int(float(number.removesuffix(unit)) * units[unit.strip()])
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is no size; write 512MiB, 8GiB, 2TB") from None


def callbacks(
    recipe: Recipe, objectives: Objectives, indexes: list[EpisodeIndex], world: ParallelDims
) -> list[Callback]:
    """The stages beside the loop, in the order in which they act."""
    from tiphys.pretrain.callbacks import Checkpointer, Evaluator, Every, MetricsWriter, Progress, Publisher, Validator

    names = [task.name for task in objectives.tasks]
    writer = MetricsWriter(recipe.run.dir, recipe.train.log_every, names)
    also = [Every(recipe.evaluate.every), Every(recipe.publish.every if recipe.publish.to else 0)]
    checkpointer = Checkpointer(
        recipe.run.dir,
        recipe.checkpoint.every,
        recipe.checkpoint.keep,
        asynchronous=recipe.checkpoint.asynchronous,
        also=also,
    )
    stages: list[Callback] = [writer, Progress()]
    if recipe.data.validation > 0 and any(index.held_out(recipe.data.validation).any() for index in indexes):
        held_out = partial(held_out_batches, recipe, indexes, objectives, world)
        stages.append(Validator(recipe.validate.every, held_out, writer))
    stages.append(checkpointer)
    if recipe.evaluate.every and recipe.evaluate.tasks:
        stages.append(Evaluator(recipe.evaluate.every, partial(start_evaluation, recipe, objectives), checkpointer))
    if recipe.publish.every and recipe.publish.to:
        from tiphys.launch.finish import publish_checkpoint

        stages.append(Publisher(recipe.publish.every, partial(publish_checkpoint, recipe, objectives), checkpointer))
    return stages


def held_out_batches(
    recipe: Recipe, indexes: list[EpisodeIndex], objectives: Objectives, world: ParallelDims
) -> Iterator[TokenBatch]:
    """This rank's share of `validate.rows` held-out rows, the same rows at every validation."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.pretrain.tokens.batch import TokenBatch

    if not world.is_first_stage:
        return
    plan = make_plan(recipe, indexes, objectives, held_out=True, rows=recipe.validate.rows)
    with TrajectoryLoader(plan, world.home, **loader_arguments(recipe, objectives, training=False), stop=1) as loader:
        for loaded in loader:
            copies = {name: array.copy() for name, array in loaded.arrays.items()}
            loaded.release()
            yield TokenBatch.from_arrays(copies)


def announce(recipe: Recipe, objectives: Objectives, plan: SamplingPlan, engine: Any) -> None:
    """What is about to run, before it does: layout, model, derived values, data."""
    parameters = sum(p.numel() for p in engine.module.parameters())
    episodes = sum(entry.index.episodes for entry in plan.entries)
    world = engine.world
    lines = [
        f"run          {recipe.run.dir}  (recipe {recipe.name})",
        f"layout       {world.world} processes = {world.pipeline} pipeline × {world.data} data, {world.expert} expert; "
        f"ZeRO-{engine.zero_stage}, {'bf16' if engine.bf16 else 'fp32'}",
        f"model        {parameters / 1e6:.2f}M parameters on this rank, {recipe.model.layers} layers of {recipe.model.hidden}",
        f"batch        {engine.rows} rows × {objectives.length} positions; "
        f"{engine.accumulation} × {engine.micro_batch} rows a rank",
        f"data         {len(objectives.tasks)} tasks, {episodes} episodes, {plan.buckets} buckets",
    ]
    lines += [f"derived      {key} = {value}" for key, value in engine.derived.items()]
    print("\n".join(lines), flush=True)


def write_recipe(recipe: Recipe) -> None:
    """The resolved recipe beside the run, whole or not at all."""
    folder = Path(recipe.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "recipe.yaml.tmp"
    temporary.write_text(to_yaml(recipe), encoding="utf-8")
    os.replace(temporary, folder / "recipe.yaml")
