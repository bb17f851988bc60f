"""The same loss on every layout, and what the engine refuses."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import processes
import pytest
import synthetic
from layouts import Plain

from pretrain.checkpoint import Checkpoint, export_weights
from pretrain.deepspeed_config import derive
from pretrain.parallel import Grid, LayoutError, ParallelDims
from recipes.schema import Recipe

SCRIPT = Path(layouts.__file__)
# Of a weight, after steps of 3e-3: Adam's quotient m / √v turns the rounding of a small gradient into a part of a step.
WEIGHTS = 1e-5


def run(tmp_path: Path, ranks: int, jobs: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    out = tmp_path / "results.json"
    processes.run(SCRIPT, [out, tmp_path / "jobs.json"], ranks, **options)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


@pytest.fixture(scope="module")
def oracle() -> Plain:
    return layouts.plain(synthetic.config(), synthetic.recipe())


def compare(results: dict[str, Any], oracle: Plain, tolerance: float = 1e-5) -> None:
    held_out: dict[int, dict[str, Any]] = {}
    for name, result in results.items():
        steps = np.array(result["steps"])
        worst = np.abs(steps[:, :2] - oracle.steps[: len(steps)]).max(0)
        assert (worst < tolerance).all(), f"{name}: loss differs by {worst[0]:.1e}, gradient norm by {worst[1]:.1e}"
        sums = result["held_out"]
        first = held_out.setdefault(len(steps), sums)  # of the same number of steps
        np.testing.assert_allclose(sums["by_task"], first["by_task"], rtol=1e-4, err_msg=name)
        if "pipeline" not in name:
            np.testing.assert_allclose(sums["errors"], first["errors"], rtol=1e-4, err_msg=name)
            assert np.sum(sums["errors"]) > 0


def test_one_rank_equals_plain_pytorch(world: ParallelDims, oracle: Plain) -> None:
    jobs: list[dict[str, Any]] = [{"name": f"zero-{stage}", "stage": stage} for stage in (0, 1, 2, 3)]
    jobs += [{"name": "reversed", "order": "reversed", "micro": 3}]
    compare({job["name"]: layouts.do(job) for job in jobs}, oracle)


def test_two_ranks_equal_plain_pytorch(tmp_path: Path, oracle: Plain) -> None:
    """Also with other rows on each rank, in other micro-batches; and with fewer rows than ranks, where one computes filler."""
    jobs: list[dict[str, Any]] = [
        {"name": "zero-1", "stage": 1},
        {"name": "zero-2", "stage": 2, "order": "interleaved", "micro": 2},
        {"name": "zero-3", "stage": 3, "order": "reversed", "micro": 3},
        {"name": "expert", "expert": 2, "steps": 6},
        {"name": "pipeline", "pipeline": 2, "steps": 6},
        {"name": "one-row", "stage": 3, "batch": 1, "steps": 4},
        {"name": "one-row-expert", "expert": 2, "stage": 2, "batch": 1, "steps": 4},
    ]
    results = run(tmp_path, 2, jobs)
    one_row = {name: results.pop(name) for name in list(results) if name.startswith("one-row")}
    compare(results, oracle)
    compare(one_row, layouts.plain(synthetic.config(), changed(train_batch_size=1), 4))


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
    ],
    8: [{"name": "pipeline-2-data-4-expert-2", "pipeline": 2, "expert": 2}],
}


@pytest.mark.parametrize(
    "ranks, tied, chosen",
    [
        (2, False, 2),
        (4, False, 2),
        pytest.param(8, False, 2, marks=pytest.mark.long),
        *(pytest.param(ranks, True, 1, marks=pytest.mark.long) for ranks in (2, 4, 8)),
    ],
)
def test_every_layout_equals_plain_pytorch(tmp_path: Path, ranks: int, tied: bool, chosen: int) -> None:
    """30 steps, clipping on, accumulation 4 where the rows suffice; embeddings tied or not, one expert a token or two.

    With TIPHYS_LAYOUT_TABLE=docs/layouts.md the run adds its rows to that table.
    """
    options = {"tie_word_embeddings": tied, "num_experts_per_tok": chosen}
    common = {"steps": 30, "save_at": 30, "config": options}
    jobs = [
        {**common, **job, "run": str(tmp_path / job["name"]), "micro": micro_of(ranks // job.get("pipeline", 1))}
        for job in LAYOUTS[ranks]
    ]
    oracle = layouts.plain(synthetic.config(**options), RECIPE, 30)
    results = run(tmp_path, ranks, jobs, timeout=550)
    compare(results, oracle)
    for job in jobs:
        results[job["name"]]["weights"] = farthest(Path(job["run"]), oracle)
    if table := os.environ.get("TIPHYS_LAYOUT_TABLE"):
        record(Path(table), results, oracle, f"{'tied' if tied else 'untied'}, {chosen} of 4 experts a token")


def micro_of(data: int) -> int:
    """Rows of a micro-batch, so that a step has four of them where the rows suffice."""
    return max(1, 16 // (4 * data))


def farthest(run_dir: Path, oracle: Plain, tolerance: float = WEIGHTS) -> float:
    """The largest difference of a trained weight from the oracle's; counts of routed tokens must be equal."""
    checkpoint = Checkpoint.newest_whole(run_dir, verify=True)
    assert checkpoint is not None
    weights = export_weights(checkpoint)
    tied = {
        name for name, other in oracle.weights.items() if other.data_ptr() == oracle.weights["token.weight"].data_ptr()
    }
    assert oracle.weights.keys() - weights.keys() == tied - {"token.weight"}
    worst = 0.0
    for name, weight in weights.items():
        difference = (weight - oracle.weights[name]).abs().max().item()
        assert difference <= (tolerance if weight.is_floating_point() else 0), (
            f"{run_dir.name}: {name}: {difference:.1e}"
        )
        worst = max(worst, difference)
    return worst


def record(table: Path, results: dict[str, Any], oracle: Plain, model: str) -> None:
    """Add a row a layout: the worst difference from plain PyTorch in loss, gradient norm and final weights."""
    with table.open("a", encoding="utf-8") as file:
        for name, result in results.items():
            steps = np.array(result["steps"])
            loss, norm = np.abs(steps[:, :2] - oracle.steps[: len(steps)]).max(0)
            row = f"{name} | {model} | {len(steps)} | {loss:.1e} | {norm:.1e} | {result['weights']:.1e}"
            file.write(f"| {row} |\n")


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
def test_rows_are_filled_up_never_dropped(ranks: int, rows: int, micro: int) -> None:
    real, size, accumulation = sizes(
        ranks, train_batch_size=rows, **({"train_micro_batch_size_per_gpu": micro} if micro else {})
    )
    most = -(-rows // ranks)  # no rank has more
    assert real == rows
    assert most <= size * accumulation < most + size


def test_no_whole_micro_batch_of_filler() -> None:
    with pytest.raises(LayoutError, match="whole micro-batch would be empty"):
        sizes(2, train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=3)
    with pytest.raises(LayoutError, match="hold only 2"):
        sizes(2, train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1)
    with pytest.raises(LayoutError, match="more than the 4 rows"):
        sizes(2, train_batch_size=8, gradient_accumulation_steps=5)


@pytest.mark.parametrize(
    "changes, pipeline, expert, message",
    [
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, 1, 1, "master weights"),
        ({"fp16": {"enabled": True}}, 1, 1, "use bf16"),
        ({"zero_optimization": {"stage": 2}}, 2, 1, "needs deepspeed.zero_optimization.stage 1"),
        ({"zero_optimization": {"stage": 0}}, 2, 1, "wrong gradient norm"),
        ({"zero_optimization": {"stage": 3}}, 1, 2, "stage 1 or 2"),
        ({"optimizer": {"type": "Lamb"}}, 1, 1, "Adam and AdamW"),
        ({"zero_optimization": {"stage": 4}}, 1, 1, "0, 1, 2 or 3"),
        ({"train_batch_size": 0}, 1, 1, "at least 1"),
        ({}, 3, 1, "do not divide 4 processes"),
        ({}, 2, 3, "does not divide the 2 data-parallel"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], pipeline: int, expert: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        derive(changed(**changes), Grid(0, 4, pipeline, expert))


def test_auto_values_are_filled_in_and_told() -> None:
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 5},
    }
    d = derive(changed(scheduler=scheduler, gradient_clipping="auto"), Grid(0, 1, 1, 1))
    assert d.config["scheduler"]["params"] == {"total_num_steps": 20, "warmup_max_lr": 3e-3, "warmup_num_steps": 5}
    assert d.config["gradient_clipping"] == 1.0
    assert {"scheduler.params.total_num_steps", "gradient_clipping", "optimizer.params.torch_adam"} <= set(d.values)
