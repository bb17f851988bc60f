"""A run with a poisoned batch goes back, skips the batch, and ends with the same bits each time."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import processes
from tests.launch.poison import Poison
from tests.launch.small_recipe import small_recipe
from tiphys.launch import rollback, run
from tiphys.launch.attendance import Attendance
from tiphys.launch.rollback import ROLLBACKS, Rollback, append, chain, read
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import engine, health
from tiphys.pretrain.checkpoint import Checkpoint
from tiphys.pretrain.health import Spike
from tiphys.pretrain.parallel import ParallelDims
from tiphys.pretrain.trainer import Diverged
from tiphys.recipes.load import load_recipe

STEPS, EVERY = 18, 4


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TRUST", 3)
    monkeypatch.setattr(rollback, "TRUST", 3)


def train(folder: Path, world: ParallelDims, poison: Poison | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run it in this process; returns what it printed."""
    folder.mkdir(exist_ok=True)
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(small_recipe(steps=STEPS) + f"checkpoint: {{every: {EVERY}, keep: 1}}\n")
    recipe = load_recipe(recipe_file, [f"run.dir={folder / 'run'}"])
    printed = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
        if poison is not None:
            patch.setattr(engine.Engine, "train_step", lambda of, batch: poison(of, batch))
        with contextlib.closing(Attendance()) as attendance:
            run._train_past_spikes(recipe, world, attendance, False)
    return printed.getvalue()


def bits(folder: Path) -> Any:
    last = Checkpoint.newest_whole(folder / "run", verify=True)
    assert last is not None
    assert last.step == STEPS
    return {name: file for name, file in last.manifest["files"].items() if name.endswith(".safetensors")}


def test_a_poisoned_batch_is_skipped_and_the_bits_follow_from_recipe_and_log(
    world: ParallelDims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 9 comes right after a save. The checkpoint of step 8 is not trusted yet; that of step 4 was kept beyond `keep`."""
    said = train(tmp_path / "a", world, Poison((8,)), monkeypatch)
    assert "step 9: the loss is nan. Going back to the checkpoint of step 4; the rows of 1 step, from step 9 on" in said
    (line,) = read(tmp_path / "a" / "run")
    assert (line.first, line.last, line.to, line.log[-1]) == (9, 9, 4, {"kind": "skip", "step": 8, "steps": 1})
    assert line.episodes
    losses = [json.loads(text) for text in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [found["step"] for found in losses if "kind" not in found] == list(range(1, STEPS + 1))
    # The same log, known from the beginning: the same bits, without any rollback.
    (tmp_path / "b" / "run").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "run" / ROLLBACKS, tmp_path / "b" / "run" / ROLLBACKS)
    assert "Going back" not in train(tmp_path / "b", world, None, monkeypatch)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


@pytest.mark.long
@pytest.mark.parametrize("step", [0, EVERY * 2 - 1])
def test_poison_at_the_start_and_right_before_a_save(
    world: ParallelDims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, world, Poison((step,)), monkeypatch)
        assert read(tmp_path / name / "run")[0].to == (0 if step == 0 else EVERY)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


@pytest.mark.long
def test_a_run_that_does_not_get_past_gives_up_and_names_candidates(
    world: ParallelDims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Diverged, match=r"step 10: the loss is nan; 3 rollbacks did not get past it.*quarantine.*cart"):
        train(tmp_path / "a", world, Poison(range(9, 15)), monkeypatch)
    assert [found.to for found in read(tmp_path / "a" / "run")] == [4, 4, 4]


def test_a_rollback_that_a_crash_cut_off_is_finished(tmp_path: Path) -> None:
    from tests.pretrain.test_checkpoint import part
    from tiphys.pretrain import checkpoint_snapshot

    skip = {"kind": "skip", "step": 8, "steps": 1}
    for step, log in ((4, []), (8, []), (12, [skip])):
        snap = part(step)
        snap.state["loader"] = {"log": log}
        checkpoint_snapshot.write(snap, tmp_path)
    assert rollback.complete(tmp_path) == []
    append(tmp_path, Rollback(9, 9, 4, [skip], ["0:x e1"]))
    with open(tmp_path / ROLLBACKS, "a") as file:
        file.write('{"first": 1')  # the next one, cut off
    assert rollback.complete(tmp_path) == [skip]
    assert [files.step_of(folder) for folder, _ in files.whole(tmp_path)] == [12, 4]  # 12 came after the rollback
    append(tmp_path, Rollback(10, 10, 4, [skip], []))
    assert len(read(tmp_path)) == 2


def test_a_trusted_checkpoint_is_kept_beyond_keep_however_often_is_saved(tmp_path: Path) -> None:
    """A save at every step, `keep: 1`: without the guard, every checkpoint would be gone long before it is trusted."""
    from tests.pretrain.test_checkpoint import part
    from tiphys.pretrain import checkpoint_snapshot
    from tiphys.pretrain.callbacks import Checkpointer

    keeper = Checkpointer(tmp_path, 1, keep=1)
    guard = rollback.Guard(tmp_path, 3, keeper, None, [])  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(world=SimpleNamespace(rank=0), health=health.Health(), step=0)
    guard.on_start(trainer)
    for step in range(1, 40):
        trainer.health.observe(step, 1.0, 1.0)
        keeper._committed.append(checkpoint_snapshot.write(part(step), tmp_path))
        keeper._notify_listeners(trainer)
        guard.on_step(trainer, None)  # type: ignore[arg-type]
        there = [found.step for found in Checkpoint.all(tmp_path)]
        assert len(there) <= 3
        if step > 2 * health.TRUST:
            trusted = [found for found in there if trainer.health.trusts(found)]
            assert len(trusted) >= 1
            assert step - trusted[0] <= 3 * health.TRUST


@pytest.mark.long
def test_two_ranks_go_back_to_the_same_checkpoint_and_end_with_the_same_bits_each_time(tmp_path: Path) -> None:
    """Only rank 1 draws poisoned rows."""
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "small.yaml").write_text(small_recipe(steps=STEPS) + f"checkpoint: {{every: {EVERY}, keep: 1}}\n")
        script = Path(__file__).with_name("poisoned_rank.py")
        said = processes.run(script, [folder / "small.yaml", f"run.dir={folder / 'run'}"], 2)
        assert said.count("step-00000004 after step 4") == 1, said  # rank 0 speaks
        assert [found.to for found in read(folder / "run")] == [4]
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_rollbacks_count_until_the_run_is_past_the_bad_steps() -> None:
    one, two = Rollback(100, 103, 50, [], []), Rollback(101, 104, 50, [], [])
    assert chain([one, two], Spike(105, 108, "")) == [one, two]
    assert chain([one, two], Spike(200, 203, "")) == []
    assert chain([one, Rollback(200, 203, 150, [], [])], Spike(205, 205, "")) == [Rollback(200, 203, 150, [], [])]
