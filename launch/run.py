"""One rank of a run, from a checked recipe to a policy. `launch/train.py` calls `run`."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_text
from tiphys.dataio.messages import counted, printable, redacted, say
from tiphys.launch.account import Account
from tiphys.launch.aside import Aside
from tiphys.launch.attendance import Attendance
from tiphys.launch.changed_data import settle
from tiphys.launch.checks.data import bad_fields
from tiphys.launch.finish import finish, write_report_of
from tiphys.launch.launches import RankReport
from tiphys.launch.lease import FolderInUse
from tiphys.launch.mixture import follow
from tiphys.launch.plan import (
    Joining,
    balance_of,
    held_out_batches,
    held_out_lines,
    loader_arguments,
    make_plan,
    open_datasets,
    step_rate_lines,
    text_lines,
    validation_every,
    window_lines,
)
from tiphys.launch.refusals import OF_A_RANK, outside, show, status_of
from tiphys.launch.rollback import Guard, complete
from tiphys.launch.statuses import Status, stopped_by
from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.callbacks.track import Tracked, send_rest
from tiphys.pretrain.checkpoint_files import StorageFull
from tiphys.pretrain.parallel import ParallelDims, PeerLost, lost_peer
from tiphys.pretrain.phases import mark
from tiphys.pretrain.trainer import Diverged, Spiked
from tiphys.recipes.load import to_dict, to_yaml
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.trainer import Trainer

# The line of a long error text that says what happened to a connection. It only chooses words.
_ADVICE = re.compile(r"^\[[^\s\]]*\.cc:\d+\] |\.? This is typically caused by .*")  # Gloo's, of no help here
_CONNECTION = re.compile(r"[Cc]onnection|[Tt]imed out|[Tt]imeout|[Bb]roken pipe|[Rr]emote")


class Attending(Callback):
    """Tells the rank's attendance how many training steps are done, and prints where the time until the first one went."""

    def __init__(self, attendance: Attendance) -> None:
        self.attendance, self._first = attendance, True

    def on_start(self, trainer: Trainer) -> None:
        self.attendance.step = trainer.step
        self.attendance.times.add("load")

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.attendance.step = trainer.step
        if self._first:
            self._first = False
            self.attendance.times.add("first step")
            if trainer.world.rank == 0:
                say(self.attendance.times.line())


def run(
    recipe: Recipe, attendance: Attendance, *, with_traceback: bool = False, accept_changed_data: bool = False
) -> Status:
    """Train, evaluate, report, publish. How this rank ended is left as a `RankReport`; an error is printed as well.

    with_traceback        print the traceback of every error, not only of a defect of Tiphys
    accept_changed_data   continue the run although values of its datasets were corrected (`launch/changed_data.py`)
    """
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.pretrained import pinned

    attendance.times.add("import")
    world = ParallelDims(recipe.parallel)
    try:
        attendance.begin(recipe, world)
        attendance.times.add("meet")
        recipe = pinned(recipe, Checkpoint.newest_whole(recipe.run.dir), world)
        objectives, stop, aside = _train_past_spikes(recipe, world, attendance, accept_changed_data)
        world.close()  # nothing collective follows: the other ranks end and leave their cores to the evaluation
        status = Status.DONE
        if stop:
            status = stopped_by(stop)
        elif world.rank == 0:
            if aside is not None:
                aside.drain()
                send_rest(recipe.track, tracked(recipe))
            status = finish(recipe, objectives, with_traceback=with_traceback, command=attendance.token)
        attendance.report(status)
        return status
    except Diverged as error:
        return _diverged(recipe.run.dir, error, world, attendance, with_traceback)
    except Exception as error:
        if lost_peer(error):
            return _lost(recipe.run.dir, error, attendance)
        status = status_of(error, OF_A_RANK)
        attendance.report(status, redacted(printable(f"{type(error).__name__}: {error}")), outside=outside(error))
        if world.rank == 0 or not _same_on_all_ranks(error):
            show(error, status, with_traceback=with_traceback)
        return status


def _same_on_all_ranks(error: Exception) -> bool:
    return isinstance(error, FolderInUse | StorageFull)


def _diverged(
    run_dir: str, error: Exception, world: ParallelDims, attendance: Attendance, with_traceback: bool
) -> Status:
    """All ranks have the same loss: one says so, and writes the report, before the launcher ends the others."""
    attendance.report(Status.DIVERGED, str(error))
    if world.rank == 0:
        show(error, Status.DIVERGED, with_traceback=with_traceback)
        write_report_of(run_dir)
    with suppress(PeerLost):
        world.barrier()
    return Status.DIVERGED


def _train_past_spikes(
    recipe: Recipe, world: ParallelDims, attendance: Attendance, accept: bool
) -> tuple[Objectives, int, Aside | None]:
    """Train. After a rollback make everything again, as a command that resumes the run would do."""
    while True:
        with suppress(Spiked):
            return _train(recipe, world, attendance, accept)
        mark("start")
        gc.collect()  # the engine's memory, before the next one is built


def _train(
    recipe: Recipe, world: ParallelDims, attendance: Attendance, accept: bool
) -> tuple[Objectives, int, Aside | None]:
    """Train on every rank. Returns the signal that stopped the run early, or 0, and what goes on beside training."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.launch.node_cache import NodeCache
    from tiphys.pretrain.checkpoint_choice import newest_sound
    from tiphys.pretrain.engine import build_engine, divides_weights
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.pretrained import begin, start_lines
    from tiphys.pretrain.trainer import Trainer

    indexes = open_datasets(recipe, world)
    objectives = Objectives(recipe, indexes)
    events = _rollback_events(recipe, world)
    resume = newest_sound(recipe.run.dir, world)
    earlier = settle(recipe, indexes, objectives, resume=resume, accept=accept, world=world)
    joining = Joining(recipe, objectives)
    plan = make_plan(recipe, indexes, objectives, joining=joining, known_as=earlier[0] if earlier else ())
    attendance.times.add("data")
    model = begin(recipe, objectives.vocabulary, fresh=resume is None, divided=divides_weights(recipe, world))
    engine = build_engine(recipe, model, world)
    engine.balance = balance_of(recipe, objectives)
    attendance.times.add("engine")
    if world.rank == 0:
        write_recipe(recipe)
        announce(recipe, objectives, plan, engine)
        say("".join(f"begins with  {line}\n" for line in start_lines(model)), end="")
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
        made = callbacks(recipe, objectives, indexes, world, plan, attendance.permit)
        stages = [cache, Attending(attendance), *made]
        known = [*(resume.state()["loader"].get("log", []) if resume else ()), *events]
        requests = follow(recipe.run.dir, plan, known) if world.rank == 0 else list
        trainer = Trainer(recipe, engine, loader, stages, fingerprints, requests, earlier, events)
        try:
            trainer.fit(resume=resume)
        except Spiked:
            engine.destroy()
            raise
    return objectives, trainer.stop_signal, next((stage for stage in stages if isinstance(stage, Aside)), None)


def _rollback_events(recipe: Recipe, world: ParallelDims) -> list[dict[str, Any]]:
    """Rank 0 finishes a rollback that a crash cut off. Returns the events that the plan's log has since the last rollback."""
    events = complete(recipe.run.dir) if world.rank == 0 else []
    return list(world.gather(events)[0])


def _lost(run_dir: str, error: Exception, attendance: Attendance) -> Status:
    """Say that another rank is gone, and why if it left a report. Its status if it did, else GAVE_UP."""
    from tiphys.pretrain.checkpoint import Checkpoint

    saved = Checkpoint.newest_whole(run_dir)
    reports = [report for report in attendance.others() if not report.lost]
    said = lost(error, attendance.step, saved.step if saved else 0, reports)
    status = reports[0].status if reports else Status.GAVE_UP
    attendance.report(status, said, lost=True)
    say(said, error=True)
    return status


def lost(error: Exception, step: int, saved: int, reports: list[RankReport]) -> str:
    """What a rank says if another one is gone: which connection broke, what the other reported, how to go on.

    step   training steps done
    saved  step of the newest whole checkpoint; 0: there is none
    """
    how = next((line for line in str(error).splitlines() if _CONNECTION.search(line)), str(error)).strip()
    how = _ADVICE.sub("", how)
    known = " ".join(f"Rank {r.rank} reported after step {r.step}: {r.cause}." for r in reports)
    return (
        f"tiphys: after step {step}: another process of this run is gone or cannot be reached ({how}). "
        + (
            known
            or "It left no report: it was killed (also by a second Ctrl-C), its machine failed, or it ran out of memory."
        )
        + (" Once that is fixed, the" if reports else " The")
        + " same command resumes from "
        + (f"step {saved}" if saved else "the beginning: no checkpoint has been written yet")
    )


def callbacks(
    recipe: Recipe,
    objectives: Objectives,
    indexes: list[EpisodeIndex],
    world: ParallelDims,
    plan: SamplingPlan,
    permit: Callable[[], None] = lambda: None,
) -> list[Callback]:
    """The callbacks of a run, in the order in which they act. `permit` raises if this run may not save (any more)."""
    from tiphys.pretrain.callbacks import Checkpointer, Every, MetricsWriter, Progress, TrackRun, Validator

    names = [task.name for task in objectives.tasks]
    writer = MetricsWriter(recipe.run.dir, recipe.train.log_every, names)
    evaluate = Every(recipe.evaluate.every if recipe.evaluate.tasks else 0)
    publish = Every(recipe.publish.every if recipe.publish.to else 0)
    checkpointer = Checkpointer(
        recipe.run.dir,
        recipe.checkpoint.every,
        recipe.checkpoint.keep,
        asynchronous=recipe.checkpoint.asynchronous,
        also=[evaluate, publish],
        minutes=recipe.checkpoint.minutes,
        patience=recipe.checkpoint.patience,
        permit=permit,
    )
    guard = Guard(recipe.run.dir, recipe.train.rollbacks, checkpointer, plan, names)
    # a checkpoint is written before the last validation
    stages: list[Callback] = [writer, Account(writer, plan.describe), Progress(), checkpointer, guard]
    if recipe.data.validation > 0 and any(index.held_out(recipe.data.validation).any() for index in indexes):
        from tiphys.pretrain.action_error import NativeErrors

        held_out = partial(held_out_batches, recipe, indexes, objectives, world)
        every = validation_every(recipe)
        stages.append(Validator(every, held_out, writer, NativeErrors(objectives.layouts), objectives.text.sizes()))
    if evaluate.steps or publish.steps:
        policy = partial(policy_parts, recipe, objectives)
        best = recipe.publish.keep == "best"
        stages.append(Aside(recipe.run.dir, evaluate, publish, policy, checkpointer, writer, evaluates_published=best))
    if recipe.track.to:
        stages.append(
            TrackRun(recipe.track, tracked(recipe))
        )  # last, so that nothing waits for a slow tracker at the end
    return stages


def tracked(recipe: Recipe) -> Tracked:
    """What trackers are told about a run."""
    return Tracked(recipe.name, recipe.run.dir, to_dict(recipe))


def policy_parts(recipe: Recipe, objectives: Objectives) -> dict[str, Any]:
    """What the side process needs to make policies of checkpoints, beside the recipe."""
    from tiphys.pretrain.model.config import DecisionConfig

    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    return {"config": config.to_dict(), "processor": objectives.processor()}


def announce(recipe: Recipe, objectives: Objectives, plan: SamplingPlan, engine: Any) -> None:
    """Print what is about to run: layout, model, batch, data, and the values that were derived for DeepSpeed."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())  # ZeRO-3 leaves empty ones
    episodes = sum({entry.index.fingerprint: entry.index.episodes for entry in plan.entries}.values())
    world = engine.world
    lines = [
        f"run          {recipe.run.dir}  (recipe {recipe.name})",
        f"layout       {counted(world.world, 'process', 'processes')} = {world.pipeline} pipeline × {world.data} data, "
        f"{world.expert} expert; "
        f"ZeRO-{engine.zero_stage}, {'bf16' if engine.bf16 else 'fp32'}",
        f"model        {parameters / 1e6:.2f}M parameters on this rank, "
        f"{_in_vocabulary(engine) / 1e6:.2f}M of them for the vocabulary of {engine.config.vocab_size} ids; "
        f"{recipe.model.layers} layers of width {recipe.model.hidden}",
        f"batch        {engine.rows} rows × {objectives.length} positions; "
        f"{engine.accumulation} × {engine.micro_batch} rows a rank",
        f"data         {counted(len(objectives.tasks), 'task')}, {counted(episodes, 'episode')}, "
        f"{counted(plan.buckets, 'bucket')}",
    ]
    indexes = [entry.index for entry in plan.entries[: len(recipe.data.mixture)]]
    if recipe.data.on_bad_value == "quarantine":
        lines += [f"bad values   {found}; left out" for found in bad_fields(recipe, indexes, objectives)]
    lines += [f"steps        {line.removeprefix('sampling: ')}" for line in step_rate_lines(plan)]
    lines += [f"held out     {line}" for line in held_out_lines(recipe, indexes)]
    lines += [f"windows      {line}" for line in window_lines(recipe, objectives)]
    lines += [f"texts        {line}" for line in text_lines(objectives)]
    lines.append(f"memory       {_memory_line(recipe, plan, engine)}")
    lines += [f"derived      {key} = {value}" for key, value in engine.derived.items()]
    say("\n".join(lines))


def _in_vocabulary(engine: Any) -> int:
    """Parameters of this rank with a row for each id: the embeddings, and the outputs if they are not the same."""
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters()]
    return sum(math.prod(shape) for shape in shapes if shape[:1] == (engine.config.vocab_size,))


def _memory_line(recipe: Recipe, plan: SamplingPlan, engine: Any) -> str:
    from tiphys.launch.layout import predict
    from tiphys.launch.layout_batches import largest_rows
    from tiphys.launch.layout_lines import line
    from tiphys.pretrain.distributed.layer_costs import typical_batch

    length, steps = largest_rows(recipe, plan, engine.micro_batch)
    full = typical_batch(engine.config, engine.micro_batch, length)
    world, bounds = engine.world, getattr(engine, "bounds", ())  # a pipeline's stages, as they were cut
    return line(predict(recipe, engine.config, [full], world.world, device=world.device.type, bounds=bounds), steps)


def write_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe, with all defaults and overrides, to `<run.dir>/recipe.yaml`."""
    write_text(Path(recipe.run.dir) / "recipe.yaml", to_yaml(recipe))
