"""A checkpoint is whole or does not count; another layout loads exactly what was saved, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.pretrain import layouts, synthetic
from tiphys.pretrain import checkpoint as ck
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import checkpoint_snapshot, checkpoint_weights
from tiphys.pretrain.checkpoint import Checkpoint, CheckpointError
from tiphys.pretrain.checkpoint_snapshot import Snapshot
from tiphys.pretrain.engine import build_engine
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.parallel import ParallelDims

# --- the folder -------------------------------------------------------------------------------------------------------


def part(step: int, rank: int = 0, world: int = 1, save: str = "", value: float | None = None) -> Snapshot:
    """One rank's part of a checkpoint of one parameter, whose 8 elements are divided among the ranks."""
    size = 8 // world
    tensors = {f"w@{rank * size}|master": torch.full((size,), float(step if value is None else value))}
    index = [{"name": "w", "shape": [8], "start": rank * size, "numel": size, "keys": ["master"], "step": float(step)}]
    return Snapshot(step, rank, world, save or f"save-{step}", tensors, index, {}, {"step": step})


def newest(run: Path) -> int | None:
    """Step of the newest whole checkpoint, whose contents are checked."""
    found = Checkpoint.newest_whole(run)
    if found is None:
        return None
    found.verify()
    assert found.state()["step"] == found.step
    torch.testing.assert_close(ck.export_weights(found)["w"], torch.full((8,), float(found.step)), rtol=0, atol=0)
    return found.step


def die_at(call: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a forked process that kills itself at call number `call` of those that change the disk. True if it did."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return inner

        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint_snapshot.save_file = counted(checkpoint_snapshot.save_file)
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    """The newest whole checkpoint is the previous one, then the new one, never a damaged one."""
    checkpoint_snapshot.write(part(1), tmp_path)
    seen: list[int] = []
    call = 1
    while die_at(call, lambda: checkpoint_snapshot.write(part(2), tmp_path)):
        seen.append(newest(tmp_path) or 0)
        call += 1
    assert call > 10  # a save has so many steps
    assert newest(tmp_path) == 2
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}  # some kills come after the commit


def test_killed_at_every_step_of_pruning(tmp_path: Path) -> None:
    call = 1
    for step in (1, 2, 3, 4):
        checkpoint_snapshot.write(part(step), tmp_path)
    while die_at(call, lambda: files.prune(tmp_path, 2)):
        assert newest(tmp_path) == 4
        for checkpoint in Checkpoint.all(tmp_path):
            checkpoint.verify()
        call += 1
    assert call > 5
    assert [c.step for c in Checkpoint.all(tmp_path)] == [4, 3]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file does not fit: a clear error, the previous checkpoint stays the newest, no temporary file remains."""
    import resource

    checkpoint_snapshot.write(part(1), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 50, 300, 420, 700):  # smaller than the tensors, the index, the state, the manifest
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                checkpoint_snapshot.write(part(2), tmp_path)
                committed = True
            except CheckpointError as error:
                committed = False
                assert "step-00000002: not written" in str(error)  # noqa: PT017
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert newest(tmp_path) == (2 if committed else 1)
        assert not list(tmp_path.rglob("*.tmp"))
        if limit == 0:
            assert not committed
    checkpoint_snapshot.write(part(2), tmp_path)
    assert newest(tmp_path) == 2


def test_rank_0_ignores_parts_of_another_save(tmp_path: Path) -> None:
    """Rank 0 does not commit files that a crashed save of the same step left; it waits for those of this save."""
    checkpoint_snapshot.write(part(5, 1, 2, save="crashed", value=-1.0), tmp_path)
    writer = threading.Thread(target=checkpoint_snapshot.write, args=(part(5, 0, 2, save="now"), tmp_path))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    assert newest(tmp_path) is None
    checkpoint_snapshot.write(part(5, 1, 2, save="now"), tmp_path)
    writer.join(10)
    assert newest(tmp_path) == 5


def test_a_rank_that_fails_or_never_writes(tmp_path: Path) -> None:
    files.folder_of(tmp_path, 3).mkdir(parents=True)
    checkpoint_snapshot.report_failure(
        files.folder_of(tmp_path, 3) / "rank00001.json", "s", OSError("No space left on device")
    )
    with pytest.raises(CheckpointError, match="rank 1 could not write its part: No space left"):
        checkpoint_snapshot.write(part(3, 0, 2, save="s"), tmp_path)
    with pytest.raises(CheckpointError, match=r"no part from rank 1 .* file system that all hosts share"):
        checkpoint_snapshot.write(part(4, 0, 2), tmp_path, timeout=0.1)
    assert newest(tmp_path) is None


def test_damage_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        checkpoint_snapshot.write(part(step), tmp_path)
    tensors = files.folder_of(tmp_path, 3) / "rank00000.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank00000.safetensors: differs from its digest"):
        Checkpoint.open(files.folder_of(tmp_path, 3)).verify()
    newest_verified = Checkpoint.newest_whole(tmp_path, verify=True)
    assert newest_verified is not None
    assert newest_verified.step == 2
    assert re.search(r"skipped a damaged.*rank00000.safetensors: differs", caplog.text)
    tensors.write_bytes(data[:-1])
    caplog.clear()
    assert newest(tmp_path) == 2
    assert re.search(r"skipped a damaged.*rank00000.safetensors", caplog.text)
    (files.folder_of(tmp_path, 2) / "state.json").unlink()
    assert newest(tmp_path) == 1
    (files.folder_of(tmp_path, 1) / "manifest.json").write_text("[")
    assert newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        Checkpoint.open(files.folder_of(tmp_path, 2))


def test_a_manifest_may_list_only_files_of_its_folder(tmp_path: Path) -> None:
    checkpoint_snapshot.write(part(1), tmp_path)
    path = files.folder_of(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    outside = tmp_path / "outside"
    outside.write_text("x")
    manifest["files"]["../../outside"] = files.digest(outside)
    path.write_text(json.dumps(manifest))
    assert newest(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        checkpoint_snapshot.write(part(step), tmp_path)
    (files.folder_of(tmp_path, 2) / "manifest.json").unlink()  # damaged, and older than the newest
    protected = files.folder_of(tmp_path, 1)
    gone = files.prune(tmp_path, 2, frozenset({protected}))
    assert [files.step_of(p) for p in gone] == [2, 3]
    assert [files.step_of(p) for _, p in files.folders(tmp_path)] == [1, 4, 5]


def test_ranges_are_read_across_files(tmp_path: Path) -> None:
    """A range that overlaps fragments of several ranks is correct in every element; only the overlap is read."""
    for rank in (3, 2, 1):
        checkpoint_snapshot.write(part(9, rank, 4, save="s", value=float(rank)), tmp_path)
    checkpoint_snapshot.write(part(9, 0, 4, save="s", value=0.0), tmp_path)
    with checkpoint_weights.RangeReader(Checkpoint.open(files.folder_of(tmp_path, 9))) as reader:
        for start in range(8):
            for stop in range(start + 1, 9):
                into, before = torch.full((stop - start,), -1.0), reader.bytes
                assert reader.copy("w", "master", (8,), start, into) == {9.0}
                assert into.tolist() == [float(i // 2) for i in range(start, stop)]
                assert reader.bytes - before == 4 * (stop - start)
        with pytest.raises(CheckpointError, match="has shape"):
            reader.copy("w", "master", (4, 2), 0, torch.zeros(8))
        with pytest.raises(CheckpointError, match="saved as master, not as frozen"):
            reader.copy("w", "frozen", (8,), 0, torch.zeros(8))
        with pytest.raises(CheckpointError, match="no parameter 'v'"):
            reader.copy("v", "master", (8,), 0, torch.zeros(8))


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_recipe_with_other_results_is_refused() -> None:
    saved = synthetic.recipe("a")
    state = ck.recipe_state(saved)
    fine = synthetic.recipe(
        "b",
        train={"steps": 99, "seed": 7},
        checkpoint={"every": 3},
        parallel={"pipeline": 2},
        deepspeed={**saved.deepspeed, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1},
    )
    ck.check_recipe(state, saved, "x")
    ck.check_recipe(state, fine, "x")
    other = synthetic.recipe("b", train={"steps": 20, "seed": 8}, deepspeed={**saved.deepspeed, "train_batch_size": 14})
    with pytest.raises(CheckpointError) as error:
        ck.check_recipe(state, other, "runs/x")
    text = str(error.value)
    assert "train.seed: 7 -> 8" in text
    assert "deepspeed.train_batch_size: 13 -> 14" in text
    assert "run.dir:" not in text
    assert "runs/x" in text


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


def engine_of(world: ParallelDims, **job: Any) -> Any:
    recipe = layouts.recipe_of(job)
    return build_engine(recipe, DecisionModel(layouts.config_of(job), seed=3), world)


def test_states_that_cannot_be_saved_are_refused(world: ParallelDims, tmp_path: Path) -> None:
    engine = engine_of(world, stage=1)
    checkpoint_snapshot.snapshot(engine, "s", {})  # possible before the first step: Adam's state is zero
    batch = layouts.rows_for(world, 0, {})
    micro = next(engine.micro_batches(batch, engine.accumulation))
    output = engine.deepspeed(engine.inputs(micro, training=True))
    engine.deepspeed.backward(output.loss)
    engine.deepspeed.step()
    with pytest.raises(CheckpointError, match="between the micro-batches"):
        checkpoint_snapshot.snapshot(engine, "s", {})
    engine.destroy()

    engine = engine_of(world, stage=1)
    engine.train_step(batch)
    with torch.no_grad():
        next(engine.module.parameters()).view(-1)[3] += 1e-3
    with pytest.raises(CheckpointError, match=r"token.weight\[0:.*differs from the weights"):
        checkpoint_snapshot.snapshot(engine, "s", {})
    engine.deepspeed.optimizer = type("FP16_UnfusedOptimizer", (), {})()
    with pytest.raises(TypeError, match="FP16_UnfusedOptimizer: unknown optimizer wrapper"):
        checkpoint_snapshot.snapshot(engine, "s", {})


def equal(a: Path, b: Path) -> None:
    """Assert that masters, moments, buffers and steps of two checkpoints are equal, bit for bit."""
    one, two = Checkpoint.open(a), Checkpoint.open(b)
    states = [ck.optimizer_state(c) for c in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert states[0][name].keys() == states[1][name].keys(), name
        for key in states[0][name]:
            torch.testing.assert_close(states[0][name][key], states[1][name][key], rtol=0, atol=0, msg=f"{name}|{key}")
    for c in (one, two):
        c.verify()
    steps = [checkpoint_weights.RangeReader(c).steps for c in (one, two)]
    assert steps[0] == steps[1]
    engines = [c.state()["engine"] for c in (one, two)]
    assert engines[0] == engines[1]


def folder(run: Path, step: int) -> Path:
    return files.folder_of(run, step)


SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 3e-3}}}
# The bias of the router is in buffers only: if it were lost or counted twice, the next steps would differ.
EVERY = {"steps": 6, "save_at": 3, "deepspeed": SCHEDULE, "config": {"bias_rate": 0.05, "router_task": True}}
EVERY |= {"train": {"ema": {"decay": 0.9}}}  # the average of the weights is one more part of the state


Leg = tuple[str, str, dict[str, Any]]  # name of the checkpoint to load, name under which to save it again, layout


def jobs_of(legs: list[Leg], root: Path) -> list[dict[str, Any]]:
    """Jobs that load a checkpoint, save it again at once, and train on."""
    return [
        {"name": name, **EVERY, **layout, "load": str(folder(root / source, 3)), "resave": str(root / name)}
        for source, name, layout in legs
    ]


def ranks_do(legs: list[Leg], root: Path, ranks: int) -> dict[str, Any]:
    (root / "jobs.json").write_text(json.dumps(jobs_of(legs, root)))
    processes.run(layouts.__file__, [root / "out.json", root / "jobs.json"], ranks)
    return json.loads((root / "out.json").read_text())


def here(legs: list[Leg], root: Path) -> dict[str, Any]:
    return {job["name"]: layouts.do(job) for job in jobs_of(legs, root)}


@pytest.fixture(scope="module")
def first(world: ParallelDims, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, results) of six steps of one process, saved after the third step as `one`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return root, layouts.do({"name": "one", **EVERY, "stage": 1, "run": str(root / "one")})


def same(root: Path, results: dict[str, Any], one: dict[str, Any]) -> None:
    """Assert that every checkpoint has bit-equal state, and that losses, norms and counts of later steps are the same."""
    for name, result in results.items():
        equal(folder(root / "one", 3), folder(root / name, 3))
        assert len(result["steps"]) == 3
        for after, before in zip(result["steps"], one["steps"][3:], strict=True):
            assert after == pytest.approx(before, abs=2e-6), name


def test_between_zero_stages_pipelines_and_expert_ranks(first: tuple[Path, dict[str, Any]]) -> None:
    """1 ↔ 2 ranks, ZeRO-1 → 2 → 3 → two stages → two expert ranks → one rank with ZeRO-3, 0, 1."""
    root, one = first
    legs: list[Leg] = [
        ("one", "two-e1", {"expert": 2}),
        ("two-e1", "two-1", {"stage": 1}),
        ("two-1", "two-2", {"stage": 2, "zero": {"round_robin_gradients": True, "parameter_alignment": True}}),
        ("two-2", "two-3", {"stage": 3, "zero": {"stage3_param_persistence_threshold": 100}}),
        ("two-3", "two-p", {"stage": 1, "pipeline": 2}),
        ("two-p", "two-e", {"stage": 2, "expert": 2}),
    ]
    results = ranks_do(legs, root, 2)
    results |= here(
        [("two-e", "back-3", {"stage": 3}), ("back-3", "back-0", {"stage": 0}), ("back-0", "back-1", {})], root
    )
    same(root, results, one)


def test_pipeline_with_experts_and_one_process(first: tuple[Path, dict[str, Any]]) -> None:
    """Two stages × two replicas with expert parallelism 2: from one process, from ZeRO-3, and back to it."""
    root, one = first
    hybrid = {"pipeline": 2, "expert": 2}
    legs: list[Leg] = [
        ("one", "hybrid", hybrid),
        ("hybrid", "four-3", {"stage": 3}),
        ("four-3", "again", hybrid),
        ("again", "four-e", {"expert": 2, "stage": 2}),
        ("four-e", "four-p", {"pipeline": 4}),
    ]
    results = ranks_do(legs, root, 4)
    results |= here([("hybrid", "hybrid-back", {}), ("four-p", "four-back", {"stage": 3})], root)
    same(root, results, one)


def test_frozen_and_tied_parameters(world: ParallelDims, tmp_path: Path) -> None:
    job = {"config": {"tie_word_embeddings": True}, "run": str(tmp_path / "a"), "steps": 2, "save_at": 2, "stage": 1}
    layouts.do({"name": "a", **job})
    names = ck.export_weights(Checkpoint.open(folder(tmp_path / "a", 2)))
    model = DecisionModel(layouts.config_of(job), seed=5)
    missing, extra = model.load_state_dict(names, strict=False)
    assert set(missing) <= {"output.weight"}
    assert not extra
    assert "layers.1.mlp.previous" in names
    layouts.do({"name": "b", **job, "stage": 3, "load": str(folder(tmp_path / "a", 2)), "resave": str(tmp_path / "b")})
    equal(folder(tmp_path / "a", 2), folder(tmp_path / "b", 2))


def test_bf16_state_is_bit_equal(world: ParallelDims, tmp_path: Path) -> None:
    job: dict[str, Any] = {"deepspeed": {"bf16": {"enabled": True}}, "steps": 2, "save_at": 2}
    layouts.do({"name": "a", **job, "stage": 1, "run": str(tmp_path / "a")})
    last = "a"
    for name, changes in (
        ("b", {"stage": 3}),
        ("c", {"stage": 1, "deepspeed": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}}),
        ("d", {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}),
    ):
        layouts.do(
            {"name": name, **job, **changes, "load": str(folder(tmp_path / last, 2)), "resave": str(tmp_path / name)}
        )
        equal(folder(tmp_path / last, 2), folder(tmp_path / name, 2))
        last = name


@pytest.mark.parametrize(
    "change",
    [
        {"fragments": None},
        {"rng": 3},
        {"fragments": [{}]},
        {"fragments": [{"name": "w", "shape": [-1], "start": 0, "numel": 1, "keys": ["master"], "step": None}]},
        {"fragments": [{"name": "w", "shape": [2**61], "start": 0, "numel": 2, "keys": ["master"], "step": None}]},
        {"fragments": [{"name": "w", "shape": [2**40], "start": 0, "numel": 2, "keys": ["master"], "step": None}]},
        {"fragments": [{"name": "w", "shape": [9], "start": 0, "numel": 9, "keys": ["master"], "step": None}]},
        {"fragments": [{"name": "w", "shape": [2], "start": 0, "numel": 2, "keys": ["m"], "step": None}]},
        {"fragments": [{"name": "v", "shape": [2], "start": 0, "numel": 2, "keys": ["master"], "step": None}]},
    ],
)
def test_an_invalid_index_of_a_rank_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = checkpoint_snapshot.write(part(1), tmp_path)
    file = folder / "rank00000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError):
        ck.export_weights(Checkpoint(folder, {"step": 1, "world": 1}))
