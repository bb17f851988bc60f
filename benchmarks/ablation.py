"""What a BabyAI policy learns by each encoding of its grid, window, amount of data and size, at equal training FLOPs.

python -m benchmarks.ablation --data FOLDER [--flops 1e13] [--only NAME …] [--out results.jsonl]

FOLDER is what `tiphys collect BabyAI-GoToLocal-v0 --episodes 24000` wrote. Each variant is the recipe `babyai` with some keys
changed, trained through the launcher in one process for as many steps as the FLOPs allow. A line of JSON is added for each run;
variants that have a line are skipped, so the command can be given again. `--table` prints the lines as a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiphys.launch.layout_batches import find_batches
from tiphys.launch.plan import make_plan, open_datasets
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.load import load_recipe

TASK = "BabyAI-GoToLocal-v0"
EPISODES = 24_000  # of the dataset


def grid(encoding: str, window: int, context: int) -> list[str]:
    return [
        f"objectives.bc.fields={{observation.image: {{encoding: {encoding}}}}}",
        f"objectives.bc.window={window}",
        f"objectives.bc.context={context}",
    ]


def data(episodes: int) -> list[str]:
    """Train on so many episodes only; the others are held out."""
    return [f"data.validation={1 - episodes / EPISODES:.4f}"]


# Equal FLOPs, so a smaller batch makes more steps.
VARIANTS = {
    "grid, window 1": grid("grid", 1, 128),
    "grid, window 4": grid("grid", 4, 128),
    "grid, window 12": grid("grid", 12, 128),
    "grid, window 32": grid("grid", 32, 256),
    "grid, window 12, without film": [*grid("grid", 12, 128), "model.film=false"],
    "rows, window 4": grid("rows", 4, 256),
    "rows, window 12": grid("rows", 12, 256),
    "cells, window 4": grid("cells", 4, 256),
    "gato, window 1": [*grid("gato", 1, 256), "objectives.bc.scheme=gato"],
    "grid, window 12, 4,000 episodes": grid("grid", 12, 128) + data(4000),
    "grid, window 12, batch 32": [*grid("grid", 12, 128), "deepspeed.train_batch_size=32"],
    "grid, window 12, init_std .02": [*grid("grid", 12, 128), "model.init_std=0.02"],
    "grid, window 12, dropout .1": [*grid("grid", 12, 128), "model.dropout=0.1"],
    "grid, window 12, hidden 256": [*grid("grid", 12, 128), "model.hidden=256"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="datasets/gotolocal")
    parser.add_argument("--flops", type=float, default=1e13)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="ablation.jsonl")
    parser.add_argument("--runs", default="", help="folder that keeps the runs, with their policies")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    file = Path(args.out)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if args.table:
        print(table(lines))
        return
    done = {(line["variant"], line["seed"], line["asked"]) for line in lines}
    for name in args.only or VARIANTS:
        if (name, args.seed, args.flops) in done:
            continue
        found = {"variant": name, "seed": args.seed, "asked": args.flops}
        with tempfile.TemporaryDirectory() as folder:
            run = Path(args.runs or folder) / f"{name}, seed {args.seed}".replace(" ", "-").replace(",", "")
            found |= measure(VARIANTS[name], args.data, args.flops, args.seed, run)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def measure(changes: list[str], folder: str, flops: float, seed: int, run: Path) -> dict[str, Any]:
    """Train a variant, and score it on levels by seeds that no demonstration used."""
    changes = [*changes, f"data.mixture[0].dataset={folder}", f"run.dir={run}", f"train.seed={seed}"]
    each = flops_per_step(changes)
    changes += [f"train.steps={round(flops / each)}", "evaluate.processes=1", "evaluate.sample=false"]
    before = cpu_seconds()
    command = [sys.executable, "-m", "tiphys", "train", "babyai", "--processes", "1", *changes]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    trained = cpu_seconds() - before
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run / "evaluation.json").read_text())["tasks"][TASK]
    drawn = evaluate(run / "policy", [TASK], episodes=100, processes=1, sample=True)["tasks"][TASK]
    steps = [line for line in lines if "learning_rate" in line]
    held_out = [line for line in lines if line.get("kind") == "validation"]
    return {
        "steps": steps[-1]["step"],
        "flops": each * steps[-1]["step"],
        "tokens": round(statistics.mean(line["tokens"] for line in steps) * steps[-1]["step"]),
        "targets": round(statistics.mean(line["targets"] for line in steps) * steps[-1]["step"]),
        "loss": statistics.mean(line["loss"] for line in steps[-max(1, len(steps) // 20) :]),
        "held_out": held_out[-1]["loss"],
        "wrong": held_out[-1]["wrong_by_task"][TASK],
        "cpu_seconds": round(trained),
        "success": scores["success_rate"],
        "sampled": drawn["success_rate"],
    }


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def flops_per_step(changes: list[str]) -> float:
    """Forward and backward FLOPs of a training step, the mean over the first steps of the plan."""
    recipe = load_recipe("babyai", changes)
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    batches = find_batches(recipe, plan, objectives)
    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    largest = batches.worst[0]
    return flops_per_batch(config, largest) * batches.tokens / largest.real_tokens


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        f"| {line['variant']} | {line['seed']} | {line['flops']:.1e} | {line['targets']:,} "
        f"| {line['loss']:.2f} / {line['held_out']:.2f} "
        f"| {line['success']:.2f} | {line['sampled']:.2f} | {line['cpu_seconds']} |"
        for line in lines
    ]
    head = "| variant | seed | FLOPs | targets | training / held-out loss | success, most probable action | drawn | CPU s |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    main()
