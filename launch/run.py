"""One rank of a run, from a recipe to a policy: what `launch/train.py` does once the recipe is right."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_text
from tiphys.launch.finish import finish, start_evaluation
from tiphys.launch.mixture import follow
from tiphys.launch.plan import held_out_batches, loader_arguments, make_plan, open_datasets
from tiphys.recipes.load import to_yaml
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.callbacks import Callback
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims


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
    cache = NodeCache(world, sizes.dir, parse_size(sizes.memory), parse_size(sizes.disk), fingerprints)
    loader = None
    if world.is_first_stage:
        arguments = loader_arguments(recipe, objectives, cache=cache.budget)
        loader = TrajectoryLoader(plan, world.home, **arguments, peers=cache.peers, stop=recipe.train.steps)
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
    write_text(Path(recipe.run.dir) / "recipe.yaml", to_yaml(recipe))
