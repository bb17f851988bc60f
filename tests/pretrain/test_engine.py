"""The same loss on every layout, and the recipes that the engine refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests import processes
from tests.pretrain import layouts, synthetic
from tests.pretrain.layouts import Plain
from tiphys.pretrain.checkpoint import Checkpoint, export_weights
from tiphys.pretrain.distributed.deepspeed_config import derive
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import Grid, LayoutError, ParallelDims
from tiphys.recipes.schema import Recipe

SCRIPT = Path(layouts.__file__)
# Tolerance of weights after steps of 3e-3: Adam divides by √v, so the rounding of a small gradient is a visible part of a step.
WEIGHTS = 1e-5


def run(tmp_path: Path, ranks: int, jobs: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    out = tmp_path / "results.json"
    processes.run(SCRIPT, [out, tmp_path / "jobs.json"], ranks, **options)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


@functools.cache
def _oracle(job: str) -> Plain:
    return layouts.plain(json.loads(job))


FEW, MANY = 6, 30  # steps of an oracle, so that jobs of few steps share theirs


def oracle_of(job: dict[str, Any], steps: int = MANY) -> Plain:
    """Plain PyTorch, for at least so many steps, with those settings of a job that are not its layout."""
    return _oracle(
        json.dumps(
            {"steps": max(steps, FEW)}
            | {
                k: v
                for k, v in job.items()
                if k in ("config", "batch", "favourite", "paradigm", "init", "adopt", "balance")
            }
        )
    )


def compare(jobs: list[dict[str, Any]], results: dict[str, Any], tolerance: float = 1e-5) -> None:
    held_out: dict[Any, dict[str, Any]] = {}
    for job in jobs:
        name = job["name"]
        steps, sums = np.array(results[name]["steps"]), results[name]["held_out"]
        oracle = oracle_of(job, len(steps))
        expected = oracle.steps[: len(steps)]
        worst = (np.abs(steps[:, :2] - expected) / np.maximum(1, [0, 1] * expected)).max(0)  # large norms: relative
        assert (worst < tolerance).all(), f"{name}: loss differs by {worst[0]:.1e}, gradient norm by {worst[1]:.1e}"
        first = held_out.setdefault((id(oracle), len(steps)), sums)  # of the same model after the same number of steps
        np.testing.assert_allclose(sums["by_task"], first["by_task"], rtol=1e-4, err_msg=name)
        if job.get("pipeline", 1) == 1 and np.sum(first["errors"]) > 0:
            np.testing.assert_allclose(sums["errors"], first["errors"], rtol=1e-4, err_msg=name)
        assert np.sum(sums["by_task"]) > 0


def test_one_rank_equals_plain_pytorch(world: ParallelDims, tmp_path: Path) -> None:
    begins = {"init": str(weights_in(tmp_path)), "steps": 6}
    jobs: list[dict[str, Any]] = [{"name": f"zero-{stage}", "stage": stage} for stage in (0, 1, 2, 3)]
    jobs += [{"name": f"begins, zero-{stage}", "stage": stage, **begins} for stage in (1, 3)]
    jobs += [{"name": "reversed", "order": "reversed", "micro": 3}, {"name": "balanced", "balance": True}]
    jobs = [{"steps": 10, **job} for job in jobs]
    compare(jobs, {job["name"]: layouts.do(job) for job in jobs})


def weights_in(folder: Path) -> Path:
    """Weights of a model that begins with other ones than those of the tests."""
    weights = DecisionModel(synthetic.config(), seed=11).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.long
def test_layouts_begin_with_the_same_weights(tmp_path: Path) -> None:
    """A run that begins with other weights: whole models, expert ranks, and stages that read their own part."""
    begins = {"init": str(weights_in(tmp_path)), "steps": 6}
    jobs: list[dict[str, Any]] = [
        {"name": "zero-1", **begins},
        {"name": "zero-3", "stage": 3, **begins},
        {"name": "expert", "expert": 2, **begins},
        {"name": "pipeline", "pipeline": 2, **begins},
    ]
    results = run(tmp_path, 2, jobs)
    compare(jobs, results)
    assert abs(results["zero-1"]["steps"][0][0] - oracle_of({}).steps[0, 0]) > 1e-4  # they do not begin as seed 3 does


ONE = {"num_experts_per_tok": 1}
EVERYTHING = {  # all that a recipe can choose in a model
    "bias_rate": 0.05,
    "router_task": True,
    "task_dropout": 0.3,
    "shared_expert": True,
    "num_key_value_heads": 1,
    "timesteps": 6,
    "checkpointing": True,
    "tie_word_embeddings": True,
}
STRONG = {"balance": 1.0, "z_loss": 0.1}  # auxiliary losses as large as the loss itself
DENSE_HALF = {"moe_every": 4}  # only the last of four layers has experts, so the first of two stages has none


def test_two_ranks_equal_plain_pytorch(tmp_path: Path) -> None:
    """Ranks with different rows and micro-batches, and cases in which a rank might wait forever or divide by zero.

    These are: fewer rows than ranks, so that a rank has only filler rows; all tokens routed to one expert, so that a rank of
    an expert group gets no token; a pipeline stage without experts; a model without experts.
    """
    jobs: list[dict[str, Any]] = [
        {"name": "zero-1", "stage": 1},
        {"name": "zero-2", "stage": 2, "order": "interleaved", "micro": 2},
        {"name": "zero-3", "stage": 3, "order": "reversed", "micro": 3},
        {"name": "expert", "expert": 2, "steps": 6},
        {"name": "pipeline", "pipeline": 2, "steps": 6},
        {"name": "measured-pipeline", "pipeline": 2, "measure": True},
        {"name": "one-row", "stage": 3, "batch": 1},
        {"name": "one-row-expert", "expert": 2, "stage": 2, "batch": 1},
        {"name": "one-row-pipeline", "pipeline": 2, "batch": 1},
        {"name": "one-row-one-expert", "expert": 2, "batch": 1, "config": ONE, "favourite": 3},
        {"name": "first-expert", "expert": 2, "config": ONE, "favourite": 0},
        {"name": "last-expert", "expert": 2, "stage": 2, "config": ONE, "favourite": 3},
        {"name": "one-expert-zero-3", "stage": 3, "config": ONE, "favourite": 3},
        {"name": "one-expert-pipeline", "pipeline": 2, "config": ONE, "favourite": 3},
        {"name": "no-expert-on-a-stage", "pipeline": 2, "config": DENSE_HALF},
        {"name": "dense", "pipeline": 2, "config": {"num_experts": 0}},
        {"name": "balanced-zero-3", "stage": 3, "order": "interleaved", "micro": 2, "balance": True},
        {"name": "balanced-pipeline", "pipeline": 2, "balance": True},
        {"name": "everything-expert", "expert": 2, "stage": 2, "config": EVERYTHING},
        {"name": "everything-pipeline", "pipeline": 2, "config": EVERYTHING},
        {"name": "reward-zero-3", "stage": 3, "order": "interleaved", "micro": 2, "paradigm": "reward"},
        {"name": "reward-pipeline", "pipeline": 2, "paradigm": "reward"},
        {"name": "madt-pipeline", "pipeline": 2, "paradigm": "madt"},
        {"name": "told-zero-3", "stage": 3, "order": "interleaved", "micro": 2, "paradigm": "told"},
        {"name": "told-pipeline", "pipeline": 2, "paradigm": "told"},
        {"name": "strong-auxiliary-expert", "expert": 2, "config": STRONG},
        {"name": "strong-auxiliary-pipeline", "pipeline": 2, "config": STRONG},
        # Windows that are seen from both sides with hidden parts; windows with prefixes
        {"name": "unimask-zero-2", "stage": 2, "order": "interleaved", "micro": 2, "paradigm": "unimask"},
        {"name": "unimask-expert", "expert": 2, "paradigm": "unimask"},
        {"name": "unimask-pipeline", "pipeline": 2, "paradigm": "unimask"},
        {"name": "prefix-pipeline", "pipeline": 2, "paradigm": "turned"},
        # Chunks of actions, whose noise and times travel through the pipeline; a rank without any
        {"name": "flow-zero-3", "stage": 3, "order": "interleaved", "micro": 2, "paradigm": "flow"},
        {"name": "flow-one-row", "stage": 2, "batch": 1, "paradigm": "flow"},
        {"name": "flow-pipeline", "pipeline": 2, "paradigm": "flow"},
        {"name": "insulated-pipeline", "pipeline": 2, "paradigm": "insulated"},
        {"name": "l1-pipeline", "pipeline": 2, "paradigm": "l1"},
    ]
    results = run(tmp_path, 2, [{"steps": 4, **job} if len(job) > 2 else job for job in jobs])
    compare(jobs, results)
    for job in jobs:
        measured, micro_batches = results[job["name"]]["measured"], 1 if "batch" in job else 4
        assert 2**27 < measured["memory"] < 2**34
        assert (measured["all_to_all"] is None) == (job.get("expert", 1) == 1)
        assert measured["bubble_bound"] == (1 / (micro_batches + 1) if "pipeline" in job else None)
    # With two stages and one micro-batch, only one stage works at a time on any machine.
    assert 0.5 <= results["one-row-pipeline"]["measured"]["bubble"] < 1
    assert results["expert"]["measured"]["all_to_all"] > 0


DENSE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "rope_theta": 1e4,
}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        *({"name": f"data-2-zero-{stage}", "stage": stage} for stage in (1, 2, 3)),
        *({"name": f"expert-2-zero-{stage}", "stage": stage, "expert": 2} for stage in (1, 2)),
        {"name": "pipeline-2", "pipeline": 2},
    ],
    4: [
        {"name": "pipeline-4", "pipeline": 4},
        {"name": "pipeline-2-data-2", "pipeline": 2},
        {"name": "pipeline-2-data-2-expert-2", "pipeline": 2, "expert": 2},
        {
            "name": "pipeline-2-data-2-expert-2, a stage without experts",
            "pipeline": 2,
            "expert": 2,
            "config": DENSE_HALF,
        },
    ],
    8: [{"name": "pipeline-2-data-4-expert-2", "pipeline": 2, "expert": 2}],
}


def jobs_of(
    ranks: int, tmp_path: Path, config: dict[str, Any], steps: int = MANY, **common: Any
) -> list[dict[str, Any]]:
    """Jobs for every layout of `ranks` ranks, with four micro-batches in a step if there are enough rows."""
    return [
        {**common, **job, "config": {**config, **job.get("config", {})}}
        | {"run": str(tmp_path / str(i)), "steps": steps, "save_at": steps}
        | {"micro": max(1, 4 * job.get("pipeline", 1) // ranks)}
        for i, job in enumerate(LAYOUTS[ranks])
    ]


@pytest.mark.parametrize(
    "ranks, tied, chosen, steps",
    [
        (2, False, 2, 12),
        (4, False, 2, 12),
        *(pytest.param(ranks, False, 2, MANY, marks=pytest.mark.long) for ranks in (2, 4, 8)),
        *(pytest.param(ranks, True, 1, MANY, marks=pytest.mark.long) for ranks in (2, 4, 8)),
    ],
)
def test_every_layout_equals_plain_pytorch(tmp_path: Path, ranks: int, tied: bool, chosen: int, steps: int) -> None:
    """Steps with gradient clipping; embeddings tied or not; one or two experts for each token.

    With TIPHYS_LAYOUT_TABLE=docs/layouts.md the test adds its rows to that table.
    """
    jobs = jobs_of(ranks, tmp_path, {"tie_word_embeddings": tied, "num_experts_per_tok": chosen}, steps)
    results = run(tmp_path, ranks, jobs, timeout=550)
    compare(jobs, results)
    for job in jobs:
        results[job["name"]]["weights"] = farthest(Path(job["run"]), oracle_of(job, steps))
    if steps == MANY:
        record(jobs, results, f"{'tied' if tied else 'untied'}, {chosen} of 4 experts a token")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layout_begins_with_the_same_language_model(tmp_path: Path, ranks: int) -> None:
    """A dense model of `transformers` becomes a mixture of experts; each rank reads its own part of it."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(folder)
    sizes = {"moe_intermediate_size": 48, "intermediate_size": 48}
    jobs = [{**job, "steps": 6, "save_at": 0} for job in jobs_of(ranks, tmp_path, sizes, adopt=str(folder))]
    results = run(tmp_path, ranks, jobs, timeout=550)
    compare(jobs, results)
    record(jobs, results, "from a dense Llama, untied, 2 of 4 experts a token")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_bf16_is_close_to_fp32(tmp_path: Path, ranks: int) -> None:
    """Every layout in bf16 with fp32 masters, against plain PyTorch in fp32."""
    jobs = jobs_of(ranks, tmp_path, {}, deepspeed={"bf16": {"enabled": True}})
    results = run(tmp_path, ranks, jobs, timeout=550)
    for job in jobs:
        steps, oracle = np.array(results[job["name"]]["steps"]), oracle_of(job)
        assert np.abs(steps[:, 0] - oracle.steps[:, 0]).max() < 2e-2, job["name"]
    record(jobs, results, "bf16, untied, 2 of 4 experts a token")


def farthest(run_dir: Path, oracle: Plain) -> float:
    """The largest difference between a trained weight and the oracle's. Counts of routed tokens must be equal."""
    checkpoint = Checkpoint.newest_whole(run_dir, verify=True)
    assert checkpoint is not None
    weights, token = export_weights(checkpoint), oracle.weights["token.weight"]
    aliases = {
        name
        for name, other in oracle.weights.items()
        if name != "token.weight" and other.data_ptr() == token.data_ptr()
    }
    assert weights.keys() == oracle.weights.keys() - aliases
    worst = 0.0
    for name, weight in weights.items():
        difference = (weight - oracle.weights[name]).abs().max().item()
        limit = WEIGHTS if weight.is_floating_point() else 0
        assert difference <= limit, f"{checkpoint.path}: {name} differs by {difference:.1e}"
        worst = max(worst, difference)
    return worst


def record(jobs: list[dict[str, Any]], results: dict[str, Any], model: str) -> None:
    """Add a row for each layout: the largest difference from plain PyTorch in loss, gradient norm and final weights."""
    table = os.environ.get("TIPHYS_LAYOUT_TABLE")
    if not table:
        return
    with Path(table).open("a", encoding="utf-8") as file:
        for job in jobs:
            result, oracle = results[job["name"]], oracle_of(job)
            steps = np.array(result["steps"])
            loss, norm = np.abs(steps[:, :2] - oracle.steps[: len(steps)]).max(0)
            weights = f"{result['weights']:.1e}" if "weights" in result else "–"
            file.write(f"| {job['name']} | {model} | {len(steps)} | {loss:.1e} | {norm:.1e} | {weights} |\n")


RECIPE = synthetic.recipe()


def changed(**deepspeed: Any) -> Recipe:
    return dataclasses.replace(RECIPE, deepspeed={**RECIPE.deepspeed, **deepspeed})


def sizes(ranks: int, **deepspeed: Any) -> tuple[int, int, int]:
    d = derive(changed(**deepspeed), Grid(0, ranks, 1, 1))
    assert d.config["train_batch_size"] == d.micro_batch * d.accumulation * ranks
    assert d.rows_per_rank == d.micro_batch * d.accumulation
    return d.rows, d.micro_batch, d.accumulation


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [7, 12, 13, 64])
@pytest.mark.parametrize("micro", [0, 1, 4, 5])
def test_rows_are_filled_up_and_never_dropped(ranks: int, rows: int, micro: int) -> None:
    real, size, accumulation = sizes(
        ranks, train_batch_size=rows, **({"train_micro_batch_size_per_gpu": micro} if micro else {})
    )
    most = -(-rows // ranks)  # of a rank
    assert real == rows
    assert most <= size * accumulation < most + size


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="whole micro-batch would be empty"):
        sizes(2, train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=3)
    with pytest.raises(LayoutError, match="hold only 2"):
        sizes(2, train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1)
    with pytest.raises(LayoutError, match="micro-batches are more than the 4 rows"):
        sizes(2, train_batch_size=8, gradient_accumulation_steps=5)


@pytest.mark.parametrize(
    "changes, pipeline, expert, message",
    [
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, 1, 1, "master weights"),
        ({"fp16": {"enabled": True}}, 1, 1, "use bf16"),
        ({"zero_optimization": {"stage": 2}}, 2, 1, "need deepspeed.zero_optimization.stage: 1, not 2"),
        ({"zero_optimization": {"stage": 0}}, 2, 1, "wrong gradient norm"),
        ({"zero_optimization": {"stage": 3}}, 1, 2, "stage: 1 or 2, not 3"),
        ({"optimizer": {"type": "Lamb"}}, 1, 1, "use Adam or AdamW"),
        ({"zero_optimization": {"stage": 4}}, 1, 1, "4 is not allowed; allowed: 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, 1, 1, "ignores it at stage 2"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, 1, 1, "write cpu"),
        ({"gradient_allreduce_op": "sum"}, 1, 1, "mean over the processes"),
        ({"train_batch_size": 0}, 1, 1, "at least 1"),
        ({}, 3, 1, "4 processes cannot be divided into 3 pipeline stages"),
        ({}, 2, 3, "2 data-parallel processes .* cannot be divided into expert groups of 3"),
    ],
)
def test_sections_that_cannot_run_are_refused(
    changes: dict[str, Any], pipeline: int, expert: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        derive(changed(**changes), Grid(0, 4, pipeline, expert))


def test_weights_are_aligned_for_a_gpu() -> None:
    recipe = synthetic.recipe(model={"moe": {"experts": 4}})
    key = "parameter_alignment"
    assert derive(recipe, Grid(0, 2, 1, 1), accelerator="cuda").config["zero_optimization"][key]
    assert key not in derive(recipe, Grid(0, 2, 1, 1)).config["zero_optimization"]
    dense = derive(RECIPE, Grid(0, 2, 1, 1), accelerator="cuda")
    assert key not in dense.config["zero_optimization"]


@pytest.mark.parametrize("elements, bucket", [(12_345, 12_345), (7 * 10**9, 500_000_000)])
def test_the_reduction_bucket_is_no_larger_than_the_model(elements: int, bucket: int) -> None:
    d = derive(changed(zero_optimization={"stage": 2}), Grid(0, 2, 1, 1), elements=elements)
    assert d.config["zero_optimization"]["reduce_bucket_size"] == bucket
    assert str(bucket) in str(d.values["zero_optimization.reduce_bucket_size"])
    own = changed(zero_optimization={"stage": 2, "reduce_bucket_size": 1000})
    given = derive(own, Grid(0, 2, 1, 1), elements=elements)
    assert given.config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "zero_optimization.reduce_bucket_size" not in given.values
    plain = derive(changed(zero_optimization={"stage": 0}), Grid(0, 2, 1, 1), elements=elements)
    assert "reduce_bucket_size" not in plain.config["zero_optimization"]  # stage 0 has no bucket of its own


def test_an_engine_asks_for_a_bucket_of_its_trained_parameters(world: ParallelDims) -> None:
    recipe = changed(zero_optimization={"stage": 1})
    engine = layouts.build_engine(recipe, DecisionModel(synthetic.config()), world)
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert engine.deepspeed.zero_reduce_bucket_size() == trained
    assert str(trained) in str(engine.derived["zero_optimization.reduce_bucket_size"])
    engine.destroy()


def test_auto_values_are_filled_in_and_reported() -> None:
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 5},
    }
    d = derive(changed(scheduler=scheduler, gradient_clipping="auto"), Grid(0, 1, 1, 1))
    assert d.config["scheduler"]["params"] == {"total_num_steps": 20, "warmup_max_lr": 3e-3, "warmup_num_steps": 5}
    assert d.config["gradient_clipping"] == 1.0
    assert {"scheduler.params.total_num_steps", "gradient_clipping", "optimizer.params.torch_adam"} <= set(d.values)
