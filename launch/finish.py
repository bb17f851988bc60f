"""After training, and beside it: a checkpoint as a policy, its evaluation, its publication, the report. Rank 0 alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.recipes.load import digest, to_dict
from tiphys.recipes.schema import Recipe

if TYPE_CHECKING:
    from tiphys.pretrain.objectives import Objectives


def finish(recipe: Recipe, objectives: Objectives) -> int:
    """The newest checkpoint as `<run.dir>/policy`, its evaluation, the publication that the recipe asks for, the report."""
    from tiphys.launch.display import scores
    from tiphys.launch.report import write_report
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.evaluate import evaluate
    from tiphys.pretrain.publish import add_evaluation

    run = Path(recipe.run.dir)
    checkpoint = Checkpoint.newest_whole(run)
    assert checkpoint is not None, "the trainer has just saved one"
    folder = export_policy(recipe, objectives, checkpoint.path, run / "policy")
    print(f"policy       {folder}", flush=True)
    found: dict[str, Any] | None = None
    if recipe.evaluate.tasks:
        options = evaluation_options(recipe)
        found = evaluate(
            folder, recipe.evaluate.tasks, **options, out=run / "evaluation.json", pictures=run / "pictures"
        )
        add_evaluation(folder, found)
        print(scores(found), flush=True)
    if recipe.publish.to:
        publish_policy(recipe, folder, found)
    print(f"report       {write_report(run)}", flush=True)
    return 0


def export_policy(recipe: Recipe, objectives: Objectives, checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as a policy in the Hugging Face form."""
    from tiphys.pretrain.checkpoint import Checkpoint, export_weights
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.publish import save_policy

    source = Checkpoint.open(checkpoint)
    save_policy(
        folder,
        export_weights(source),
        DecisionConfig.from_recipe(recipe.model, objectives.vocabulary),
        objectives.processor(),
        recipe=to_dict(recipe),
        step=source.step,
        recipe_digest=digest(recipe),
        license=recipe.publish.license,
    )
    return folder


def evaluation_options(recipe: Recipe) -> dict[str, Any]:
    e = recipe.evaluate
    return {
        "episodes": e.episodes,
        "seed": e.seed,
        "processes": e.processes,
        "sample": e.sample,
        "videos": e.videos,
        "demonstrations": sorted({entry.dataset for entry in recipe.data.mixture}),
    }


def start_evaluation(recipe: Recipe, objectives: Objectives, checkpoint: Path, step: int) -> subprocess.Popen[bytes]:
    """Evaluate a checkpoint in a process of its own, while training goes on: `<run.dir>/evaluations/step-…json`."""
    from tiphys.pretrain.evaluate import start

    folder = Path(recipe.run.dir) / "evaluations" / f"step-{step:08d}"
    export_policy(recipe, objectives, checkpoint, folder)
    options = evaluation_options(recipe) | {"videos": 0}
    return start(folder, recipe.evaluate.tasks, out=folder / "evaluation.json", **options)


def publish_checkpoint(recipe: Recipe, objectives: Objectives, checkpoint: Path, step: int) -> None:
    """Publish a checkpoint's policy while training goes on; with `publish.keep: best` after an evaluation of its own."""
    from tiphys.pretrain.evaluate import start
    from tiphys.pretrain.publish import add_evaluation

    folder = Path(recipe.run.dir) / "publishing"
    try:
        export_policy(recipe, objectives, checkpoint, folder)
        found = None
        if recipe.publish.keep == "best":
            out = folder / "evaluation.json"
            options = evaluation_options(recipe) | {"videos": 0}
            if start(folder, recipe.evaluate.tasks, out=out, **options).wait():
                raise RuntimeError("its evaluation failed, see above")
            found = json.loads(out.read_text(encoding="utf-8"))
            add_evaluation(folder, found)
        publish_policy(recipe, folder, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_policy(recipe: Recipe, folder: Path, found: Mapping[str, Any] | None) -> None:
    """Publish; with `publish.keep: best` only what scores higher than what this run has published before."""
    from tiphys.pretrain.publish import publish

    record = Path(recipe.run.dir) / "published.json"
    score = mean_score(found)
    if recipe.publish.keep == "best" and record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))["score"]
        if before is not None and (score is None or score <= before):
            print(f"not published: it scores {score}, what is at {recipe.publish.to} scores {before}", flush=True)
            return
    print(f"published    {publish(folder, recipe.publish.to, private=recipe.publish.private)}", flush=True)
    record.write_text(json.dumps({"to": recipe.publish.to, "score": score}), encoding="utf-8")


def mean_score(found: Mapping[str, Any] | None) -> float | None:
    """Mean expert-normalised score of an evaluation; None where no task has one."""
    scores = [t["expert_normalized"] for t in (found or {"tasks": {}})["tasks"].values()]
    known = [s for s in scores if s is not None]
    return sum(known) / len(known) if known else None
