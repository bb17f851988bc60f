"""The work of each rank in tests of layouts: load, train, save, and report the results. Each rank also runs it as a script.

layouts.py OUT JOBS     JOBS: file with a JSON list of jobs, done one after another in one process group. OUT: results
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.pretrain import paradigm_rows, synthetic
from tiphys.pretrain.adopt.families import family_config
from tiphys.pretrain.adopt.weights import ZEROS, AdoptedWeights
from tiphys.pretrain.balance import Balance, Line
from tiphys.pretrain.checkpoint import Checkpoint
from tiphys.pretrain.checkpoint_writer import Writer
from tiphys.pretrain.engine import Engine, build_engine
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import ParallelDims
from tiphys.pretrain.pretrained import PolicyWeights, Pretrained
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.vocabulary import Vocabulary
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.training import Parallel

BATCH, STEPS = 13, 20


def recipe_of(job: dict[str, Any]) -> Recipe:
    zero = {"stage": job.get("stage", 1), **job.get("zero", {})}
    sizes = {"train_micro_batch_size_per_gpu": job.get("micro", 4), "train_batch_size": job.get("batch", BATCH)}
    deepspeed = {**synthetic.recipe().deepspeed, **sizes, "zero_optimization": zero, **job.get("deepspeed", {})}
    parallel = {"pipeline": job.get("pipeline", 1), "expert": job.get("expert", 1)}
    parallel["measure"] = job.get("measure", False)
    return synthetic.recipe(job.get("run", ""), deepspeed=deepspeed, parallel=parallel, train=job.get("train", {}))


def config_of(job: dict[str, Any]) -> DecisionConfig:
    if "paradigm" in job:
        return paradigm_rows.config(job["paradigm"], **job.get("config", {}))
    return synthetic.config(**job.get("config", {}))


def rows_of(job: dict[str, Any], step: int, rows: list[int]) -> TokenBatch:
    if "paradigm" in job and rows:
        return paradigm_rows.rows_of(job["paradigm"], step, rows)
    return synthetic.rows_of(step, rows)


def source_of(job: dict[str, Any]) -> Pretrained | None:
    """The weights that a job begins with.

    `init`: a folder with model.safetensors of a model of the same config. `adopt`: that of a dense model of `transformers` with
    32 tokens, whose MLPs become experts.
    """
    words = Vocabulary((n := 48), (("text", 0, 32), ("action", 32, n)), 32, 33, 34, 35)
    same = (config_of(job), words)
    if "adopt" in job:
        old, texts = family_config(folder := Path(job["adopt"])), Vocabulary(32, (("text", 0, 32),), 0, 0, 0, 0)
        options: dict[str, Any] = {"zeros": ZEROS, "resemble": True, "seed": seed_of(job), "fresh": 0.25}
        return Pretrained(AdoptedWeights(folder, old), (old, texts), same, **options)
    return Pretrained(PolicyWeights(Path(job["init"])), same, same) if "init" in job else None


def seed_of(job: dict[str, Any]) -> int:
    """The seed of the weights. The engine draws with the recipe's what a job begins with lacks."""
    return recipe_of(job).train.seed if "adopt" in job else 3


def model_of(job: dict[str, Any]) -> DecisionModel:
    """The model before training. `favourite` of a job: an expert that every router prefers for every token."""
    source = source_of(job)
    divided = source is not None and (job.get("pipeline", 1) > 1 or job.get("expert", 1) > 1 or job.get("stage") == 3)
    with torch.device("meta") if divided else nullcontext():
        model = DecisionModel(config_of(job), seed=seed_of(job), source=source)
    if "favourite" in job:
        with torch.no_grad():
            for layer in mixtures(model):
                layer.router.modality[:, job["favourite"]] = 40.0
    return model


def balance_of(job: dict[str, Any]) -> Balance | None:
    """With `balance`: each task is a mixture line, and the loss weights of two of the three are chosen."""
    if not job.get("balance"):
        return None
    lines = [Line(str(task), (str(task),), (task,), task > 0) for task in range(3)]
    return Balance(lines, {"0": 0.2, "1": 0.7, "2": 0.1}, 3)


def rows_for(world: ParallelDims, step: int, job: dict[str, Any], batch: int = BATCH) -> TokenBatch:
    """This rank's rows of a step. `order` of a job distributes the same global batch in another way."""
    order = job.get("order", "")
    if not world.is_first_stage:
        return TokenBatch.empty(step, 0)
    everything = list(range(batch))
    if order == "reversed":
        everything.reverse()
    if order == "interleaved":
        everything = everything[::2] + everything[1::2]
    return rows_of(job, step, [everything[i] for i in synthetic.mine(batch, world.replica, world.data)])


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Load, train from the loaded step on, and save, as the job says."""
    started = time.time()
    world = ParallelDims(Parallel(job.get("pipeline", 1), job.get("expert", 1)))
    recipe = recipe_of(job)
    engine = build_engine(recipe, model_of(job), world)
    engine.balance = balance_of(job)
    if "load" in job:
        Checkpoint.open(job["load"]).load(engine)
    if job.get("resave"):
        save(engine, job["resave"])
    steps, result = [], None  # None if the checkpoint is of the last step
    for step in range(engine.step, job.get("steps", STEPS)):
        result = engine.train_step(rows_for(world, step, job, recipe.deepspeed["train_batch_size"]))
        steps.append([result.loss, result.gradient_norm, result.auxiliary, result.tokens, result.targets])
        if result.step == job.get("save_at"):
            save(engine, job["run"])
    held_out = {
        name: sums.tolist()
        for name, sums in engine.evaluate(
            rows_for(world, 999, {"paradigm": job["paradigm"]} if "paradigm" in job else {})
        ).items()
    }
    engine.destroy()
    measured = result and {name: getattr(result, name) for name in ("memory", "all_to_all", "bubble", "bubble_bound")}
    return {"steps": steps, "held_out": held_out, "measured": measured, "seconds": round(time.time() - started, 1)}


def save(engine: Engine, run: str) -> None:
    launch = str(engine.world.gather(str(time.time_ns()))[0])
    Writer(run, launch, timeout=60).save(engine, {"step": engine.step}, wait=True)
    engine.world.barrier()


class Plain(NamedTuple):
    """Results of the oracle: (loss, gradient norm) of each step, and weights and buffers after the last step."""

    steps: np.ndarray
    weights: dict[str, torch.Tensor]


def plain(job: dict[str, Any]) -> Plain:
    """The oracle: one process, whole batches, torch's AdamW and gradient clipping."""
    model, recipe = model_of(job), recipe_of(job)
    options = recipe.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options["lr"], betas=tuple(options["betas"]), weight_decay=options["weight_decay"]
    )
    model.train()
    out, balance = [], balance_of(job)
    for step in range(job.get("steps", STEPS)):
        batch = rows_of(job, step, list(range(recipe.deepspeed["train_batch_size"])))
        batch = batch if balance is None else balance.weighted(batch)
        inputs = to_tensors(batch, task_dropout=model.config.task_dropout, seed=recipe.train.seed)
        output = model(inputs, batch.targets, batch.real_tokens)
        loss = output.loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.deepspeed["gradient_clipping"])
        optimizer.step()
        if balance is not None:
            balance.observe(step + 1, output.loss_by_task[:, 0].double().numpy())
        for layer, counts in zip(mixtures(model), step_counts(model)[0], strict=True):
            layer.finish_step(counts)
        out.append([loss.item(), norm.item()])
    return Plain(np.array(out), dict(model.state_dict()))


if __name__ == "__main__":
    out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    results = {job["name"]: do(job) for job in jobs}
    if ParallelDims(Parallel()).rank == 0:
        out.write_text(json.dumps(results))
