"""One rank of a run, from a checked recipe to a policy. `launch/train.py` calls `run`."""

from __future__ import annotations

import re
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_text
from tiphys.dataio.messages import printable, redacted, say
from tiphys.launch import rank_reports
from tiphys.launch.changed_data import settle
from tiphys.launch.checks.data import bad_fields
from tiphys.launch.finish import finish, start_evaluation, write_report_of
from tiphys.launch.mixture import follow
from tiphys.launch.plan import (
    Joining,
    held_out_batches,
    loader_arguments,
    make_plan,
    open_datasets,
    step_rate_lines,
    text_lines,
)
from tiphys.launch.rank_reports import RankReport
from tiphys.launch.refusals import OF_A_RANK, show, status_of
from tiphys.launch.statuses import Status, stopped_by
from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.parallel import ParallelDims, PeerLost, lost_peer
from tiphys.pretrain.trainer import Diverged
from tiphys.recipes.load import to_yaml
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.trainer import Trainer

# The line of a long error text that says what happened to a connection. It only chooses words.
_CONNECTION = re.compile(r"[Cc]onnection|[Tt]imed out|[Tt]imeout|[Bb]roken pipe|[Rr]emote")


class LastStep(Callback):
    """Remembers how many training steps are done, for the report of an error."""

    def __init__(self) -> None:
        self.step = 0

    def on_start(self, trainer: Trainer) -> None:
        self.step = trainer.step

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.step = trainer.step


def run(recipe: Recipe, *, with_traceback: bool = False, accept_changed_data: bool = False) -> Status:
    """Train, evaluate, report, publish. An error of a rank is printed and left as a `RankReport`.

    with_traceback        print the traceback of every error, not only of a defect of Tiphys
    accept_changed_data   continue the run although values of its datasets were corrected (`launch/changed_data.py`)
    """
    world = ParallelDims(recipe.parallel)
    last = LastStep()
    try:
        if world.rank == 0:
            rank_reports.remove(recipe.run.dir)
        world.barrier()  # no rank leaves a report before the old ones are removed
        objectives, stop = _train(recipe, world, last, accept_changed_data)
        world.close()  # nothing collective follows: the other ranks end and leave their cores to the evaluation
        if stop:
            return stopped_by(stop)
        return finish(recipe, objectives, with_traceback=with_traceback) if world.rank == 0 else Status.DONE
    except Diverged as error:
        return _diverged(recipe.run.dir, error, world, with_traceback)
    except Exception as error:
        if lost_peer(error):
            return _lost(recipe.run.dir, error, last.step)
        status = status_of(error, OF_A_RANK)
        cause = redacted(printable(f"{type(error).__name__}: {error}"))
        rank_reports.write(recipe.run.dir, RankReport(world.rank, last.step, cause, status))
        show(error, status, with_traceback=with_traceback)
        return status


def _diverged(run_dir: str, error: Exception, world: ParallelDims, with_traceback: bool) -> Status:
    """All ranks have the same loss: one says so, and writes the report, before the launcher ends the others."""
    if world.rank == 0:
        show(error, Status.DIVERGED, with_traceback=with_traceback)
        write_report_of(run_dir)
    with suppress(PeerLost):
        world.barrier()
    return Status.DIVERGED


def _train(recipe: Recipe, world: ParallelDims, last: LastStep, accept: bool) -> tuple[Objectives, int]:
    """Train on every rank. Returns the signal that stopped the run early, or 0."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.launch.node_cache import NodeCache
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.engine import build_engine
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.trainer import Trainer

    indexes = open_datasets(recipe, world)
    objectives = Objectives(recipe, indexes)
    resume = Checkpoint.newest_whole(recipe.run.dir)
    earlier = settle(recipe, indexes, objectives, resume=resume, accept=accept, world=world)
    joining = Joining(recipe, objectives)
    plan = make_plan(recipe, indexes, objectives, joining=joining, known_as=earlier[0] if earlier else ())
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
        loader = TrajectoryLoader(
            plan, world.home, **arguments, join=joining.loader, peers=cache.peers, stop=recipe.train.steps
        )
    with loader or nullcontext():
        stages = [cache, last, *callbacks(recipe, objectives, indexes, world)]
        requests = follow(recipe.run.dir, plan) if world.rank == 0 else list
        trainer = Trainer(recipe, engine, loader, stages, fingerprints, requests, earlier)
        trainer.fit(resume=resume)
    return objectives, trainer.stop_signal


def _lost(run_dir: str, error: Exception, step: int) -> Status:
    """Say that another rank is gone, and why if it left a report. Its status if it did, else TRY_AGAIN."""
    from tiphys.pretrain.checkpoint import Checkpoint

    saved = Checkpoint.newest_whole(run_dir)
    reports = rank_reports.read(run_dir)
    say(lost(error, step, saved.step if saved else 0, reports), error=True)
    return reports[0].status if reports else Status.TRY_AGAIN


def lost(error: Exception, step: int, saved: int, reports: list[RankReport]) -> str:
    """What a rank says if another one is gone: which connection broke, what the other reported, how to go on.

    step   training steps done
    saved  step of the newest whole checkpoint; 0: there is none
    """
    how = next((line for line in str(error).splitlines() if _CONNECTION.search(line)), str(error)).strip()
    known = " ".join(f"Rank {r.rank} reported after step {r.step}: {r.cause}." for r in reports)
    return (
        f"tiphys: after step {step}: another process of this run is gone or cannot be reached ({how}). "
        + (known or "It left no report: it was killed, its machine failed, or it ran out of memory.")
        + (" Once that is fixed, the" if reports else " The")
        + " same command resumes from "
        + (f"step {saved}" if saved else "the beginning: no checkpoint has been written yet")
    )


def callbacks(
    recipe: Recipe, objectives: Objectives, indexes: list[EpisodeIndex], world: ParallelDims
) -> list[Callback]:
    """The callbacks of a run, in the order in which they act."""
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
    stages: list[Callback] = [writer, Progress(), checkpointer]  # a checkpoint is written before the last validation
    if recipe.data.validation > 0 and any(index.held_out(recipe.data.validation).any() for index in indexes):
        held_out = partial(held_out_batches, recipe, indexes, objectives, world)
        stages.append(Validator(recipe.validate.every, held_out, writer))
    if recipe.evaluate.every and recipe.evaluate.tasks:
        stages.append(Evaluator(recipe.evaluate.every, partial(start_evaluation, recipe, objectives), checkpointer))
    if recipe.publish.every and recipe.publish.to:
        from tiphys.launch.finish import publish_checkpoint

        stages.append(Publisher(recipe.publish.every, partial(publish_checkpoint, recipe, objectives), checkpointer))
    return stages


def announce(recipe: Recipe, objectives: Objectives, plan: SamplingPlan, engine: Any) -> None:
    """Print what is about to run: layout, model, batch, data, and the values that were derived for DeepSpeed."""
    parameters = sum(p.numel() for p in engine.module.parameters())
    episodes = sum({entry.index.fingerprint: entry.index.episodes for entry in plan.entries}.values())
    world = engine.world
    lines = [
        f"run          {recipe.run.dir}  (recipe {recipe.name})",
        f"layout       {world.world} processes = {world.pipeline} pipeline × {world.data} data, {world.expert} expert; "
        f"ZeRO-{engine.zero_stage}, {'bf16' if engine.bf16 else 'fp32'}",
        f"model        {parameters / 1e6:.2f}M parameters on this rank, "
        f"{recipe.model.layers} layers of width {recipe.model.hidden}",
        f"batch        {engine.rows} rows × {objectives.length} positions; "
        f"{engine.accumulation} × {engine.micro_batch} rows a rank",
        f"data         {len(objectives.tasks)} tasks, {episodes} episodes, {plan.buckets} buckets",
    ]
    indexes = [entry.index for entry in plan.entries[: len(recipe.data.mixture)]]
    if recipe.data.on_bad_value == "quarantine":
        lines += [f"bad values   {found}; left out" for found in bad_fields(recipe, indexes, objectives)]
    lines += [f"steps        {line}" for line in step_rate_lines(plan)]
    lines += [f"texts        {line}" for line in text_lines(objectives)]
    lines += [f"derived      {key} = {value}" for key, value in engine.derived.items()]
    say("\n".join(lines))


def write_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe, with all defaults and overrides, to `<run.dir>/recipe.yaml`."""
    write_text(Path(recipe.run.dir) / "recipe.yaml", to_yaml(recipe))
