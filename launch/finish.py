"""What rank 0 does after training: export a checkpoint as a policy, evaluate it, publish it, write the report."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_json
from tiphys.dataio.messages import say
from tiphys.dataio.python_path import python
from tiphys.launch.refusals import show, status_of
from tiphys.launch.statuses import Status
from tiphys.pretrain.acting.ask import Asking
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.recipes.load import digest, to_dict
from tiphys.recipes.schema import Recipe

if TYPE_CHECKING:
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.objectives import Objectives

EVALUATION = "evaluation.json"
PLAYED = "aside/played"  # in the run's folder: episodes of an evaluation that is not done
BASE = "aside/base"  # in the run's folder: the weights that were published last
PUBLISHED = "published.json"  # in the run's folder: its identity as a publisher, and what it published last


def finish(recipe: Recipe, objectives: Objectives, *, with_traceback: bool = False, command: str = "") -> Status:
    """Export the newest checkpoint to `<run.dir>/policy`, evaluate it, write the report, publish the policy, as the recipe says.

    A step that fails does not keep the others from being done. Returns the status of the first that failed, or DONE.

    command   what the launches of one command have in common: an evaluation that was killed goes on in the next of them
    Raises CheckpointError if no training step was done.
    """
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.model.config import DecisionConfig

    run = Path(recipe.run.dir)
    checkpoint = Checkpoint.newest_whole(run)
    if checkpoint is None or checkpoint.step < 1:
        raise CheckpointError(f"{run}: no training step was done, so there is no policy to publish")
    (run / EVALUATION).unlink(missing_ok=True)  # of an earlier policy
    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    folder = export_policy(recipe, config, objectives.processor(), checkpoint, run / "policy")
    say(f"policy       {folder}{averaged(folder)}")
    write_report_of(run, announce=not recipe.evaluate.tasks)
    status, found = Status.DONE, None
    if recipe.evaluate.tasks:
        try:
            found = _evaluate(recipe, run, folder, command)
        except Exception as error:
            status = Status.NOT_EVALUATED
            _show_step("not evaluated: ", error, with_traceback)
        write_report_of(run)
    if recipe.publish.to:
        try:
            publish_policy(recipe, folder, found)
        except Exception as error:
            status = status or Status.NOT_PUBLISHED
            _show_step("not published: ", error, with_traceback)
    return status


def _evaluate(recipe: Recipe, run: Path, folder: Path, command: str) -> dict[str, Any]:
    from tiphys.launch.display import scores
    from tiphys.pretrain.evaluate import evaluate
    from tiphys.pretrain.publish import add_evaluation

    options: dict[str, Any] = evaluation_options(recipe) | {"out": run / EVALUATION, "pictures": run / "pictures"}
    played = run / PLAYED
    try:
        found = evaluate(folder, recipe.evaluate.tasks, **options, resume=played / command if command else "")
    finally:  # after an error the environment may be mended, and then nothing may be left of it
        shutil.rmtree(played, ignore_errors=True)
    add_evaluation(folder, found)
    say(scores(found))
    return found


def _show_step(what: str, error: Exception, with_traceback: bool) -> None:
    show(error, status_of(error), with_traceback=with_traceback, what=what)


def write_report_of(run: str | Path, *, announce: bool = True) -> None:
    """Write the report of a run. If that fails, say so: it never keeps anything else from being done."""
    from tiphys.launch.report import write_report

    try:
        file = write_report(run)
    except Exception as error:
        _show_step("no report: ", error, False)
    else:
        if announce:
            say(f"report       {file}")


def export_policy(
    recipe: Recipe, config: DecisionConfig, processor: Mapping[str, Any], source: Checkpoint, to: Path
) -> Path:
    """Write a checkpoint as a policy in the Hugging Face format. Returns the folder.

    processor   `Objectives.processor()`
    """
    import torch

    from tiphys.pretrain.checkpoint_weights import RangeReader, SavedWeights
    from tiphys.pretrain.publish import save_policy

    dtype = torch.bfloat16 if recipe.publish.dtype == "bf16" else torch.float32
    with RangeReader(source) as reader:
        weights = SavedWeights(source, reader, dtype, recipe.publish.weights)
        return save_policy(
            to,
            weights,
            config,
            processor,
            recipe=to_dict(recipe),
            step=source.step,
            recipe_digest=digest(recipe),
            license=recipe.publish.license,
            averaged=weights.averaged,
        )


def averaged(folder: Path) -> str:
    """What is said of a policy whose weights are a moving average."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return " (moving average of the weights)" if config.get("tiphys", {}).get("weights") == "average" else ""


def evaluation_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's options of `tiphys.pretrain.evaluate.evaluate`."""
    e = recipe.evaluate
    return {
        "episodes": e.episodes,
        "seed": e.seed,
        "processes": e.processes,
        "sample": e.sample,
        "videos": e.videos,
        "modules": e.modules,
        "asking": Asking.from_recipe(e),
        "demonstrations": sorted({entry.dataset for entry in recipe.data.mixture}),
    }


def evaluation_command(folder: str | Path, tasks: Sequence[str] = (), *, out: str | Path, **options: Any) -> list[str]:
    """The command line of `tiphys evaluate`.

    folder   a policy
    tasks    empty: every task of the policy that has an environment
    out      file for the result
    options  those of `tiphys.pretrain.evaluate.evaluate`
    """
    command = python("-m", "tiphys", "evaluate", str(folder), "--out", str(out))
    for name, value in options.items():
        if isinstance(value, Asking):
            command += value.words()
        elif value is True:
            command.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            command += [f"--{name}", *map(str, value)] if value else []
        elif value is not None and value is not False and value != "":
            command += [f"--{name}", str(value)]
    return [*command, "--tasks", *tasks] if tasks else command


def publish_policy(recipe: Recipe, folder: Path, found: Mapping[str, Any] | None, *, final: bool = True) -> None:
    """Publish a policy. With `publish.keep: best`, only if it scores higher than the one that this run published before.

    final   the run has ended
    """
    from tiphys.pretrain.publish import How, publish, say_final
    from tiphys.recipes.sizes import parse_size

    keys, score, record = recipe.publish, mean_score(found), published(recipe.run.dir)
    if not record.run:
        record = replace(record, run=secrets.token_hex(8))
        write_json(Path(recipe.run.dir) / PUBLISHED, asdict(record))  # first, so that a crash does not lose it
    if keys.keep == "best" and record.score is not None and (score is None or score <= record.score):
        say(f"not published: it scores {score}; the policy at {keys.to} scores {record.score}")
        if final:
            say_final(keys.to, record.run)
        return
    base = Path(recipe.run.dir) / BASE
    how = How(
        base=base,
        rate=parse_size(keys.rate),
        grace=60 * keys.grace,
        score=score,
        final=final,
        run=record.run,
        name=recipe.name,
        take_over=takes_over(recipe, record),
    )
    say(f"published    {publish(folder, keys.to, private=keys.private, how=how)}")
    _keep_weights(folder, base)
    write_json(Path(recipe.run.dir) / PUBLISHED, asdict(replace(record, to=keys.to, score=score)))


@dataclass(frozen=True)
class Published:
    """What a run published last.

    run     its identity, which no other run has; empty: it has not published yet
    to      where; empty: nowhere
    score   mean expert-normalised score of the policy; None: unknown
    """

    run: str = ""
    to: str = ""
    score: float | None = None


def takes_over(recipe: Recipe, record: Published) -> bool:
    """Whether the run may publish to a place of another run: once, or two runs would take it from each other again and again."""
    return recipe.publish.take_over and record.to != recipe.publish.to


def published(run_dir: str | Path) -> Published:
    """The record of a run's folder. An empty one if there is none."""
    try:
        found = json.loads((Path(run_dir) / PUBLISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Published()
    return Published(found.get("run", ""), found.get("to", ""), found.get("score"))


def _keep_weights(folder: Path, base: Path) -> None:
    """Keep published weights: the next ones are published as what has changed. Without them all is published again."""
    from tiphys.pretrain.follow.weights import weight_files

    try:
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        for file in weight_files(folder):
            try:
                os.link(file, base / file.name)
            except OSError:  # the file system has no links
                shutil.copyfile(file, base / file.name)
    except OSError as error:
        shutil.rmtree(base, ignore_errors=True)
        say(f"{base}: the weights were not kept ({error}); the next ones will be published whole")


def mean_score(found: Mapping[str, Any] | None) -> float | None:
    """Mean expert-normalised score of an evaluation; None if no task has one."""
    scores = [t["expert_normalized"] for t in (found or {"tasks": {}})["tasks"].values()]
    known = [s for s in scores if s is not None]
    return sum(known) / len(known) if known else None
