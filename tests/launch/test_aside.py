"""Evaluation and publication beside training: results come late but with their step, and no fault of the side process stops
training."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from tests.launch.small_recipe import small_recipe
from tests.pretrain.test_checkpoint import part
from tests.processes import REPOSITORY, alone
from tiphys.launch import aside as beside
from tiphys.launch import side_process
from tiphys.launch.aside import Aside, unfinished
from tiphys.pretrain import checkpoint as ck
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import checkpoint_snapshot
from tiphys.pretrain.callbacks import Checkpointer, Every, MetricsWriter

EXPORT = ""
EVALUATE = """
import json, pathlib, sys
out = pathlib.Path(__file__).parent / "evaluations" / f"step-{int(sys.argv[1]):08d}" / "evaluation.json"
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps({"tasks": {"reach": {"expert_normalized": 0.5, "mean_return": float(sys.argv[1])}}}))
"""
PUBLISH = "print('published    somewhere')"
HANGS = "import time; time.sleep(1000)"


class Run:
    """A training run without a model: it commits checkpoints and calls the callbacks."""

    def __init__(
        self, folder: Path, steps: int = 1000, start: int = 0, *, published: int = 0, minutes: float = 60, **tasks: str
    ) -> None:
        self.folder = folder
        for name, code in ({"export": EXPORT, "evaluate": EVALUATE, "publish": PUBLISH} | tasks).items():
            (folder / f"{name}.py").write_text(code)
        (folder / "recipe.yaml").write_text(
            small_recipe() + f"publish: {{to: somewhere}}\nevaluate: {{minutes: {minutes}}}\n"
        )
        world = SimpleNamespace(rank=0)
        self.trainer: Any = SimpleNamespace(world=world, step=start, steps=steps, stopped=False)
        self.keeper, self.writer = Checkpointer(folder, 1, keep=1), MetricsWriter(folder, tensorboard=False)
        self.aside = Aside(folder, Every(10), Every(published), dict, self.keeper, self.writer)
        self.writer.on_start(self.trainer)
        self.aside.on_start(self.trainer)

    def checkpoint(self, step: int) -> float:
        """Commit a checkpoint of a step; returns the seconds that training waits for its evaluation to start."""
        self.trainer.step = step
        self.keeper._committed.append(
            checkpoint_snapshot.write(part(step, save=f"save-{step}-{time.time_ns()}"), self.folder)
        )
        began = time.perf_counter()
        self.keeper._notify_listeners(self.trainer)
        return time.perf_counter() - began

    def until(self, condition: Any, limit: float = 60.0) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, self.lines()
            self.aside.on_step(self.trainer, None)  # type: ignore[arg-type]
            time.sleep(0.02)

    def lines(self, kind: str = "evaluation") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if line.get("kind") == kind]

    def close(self, *, stopped: bool = False) -> None:
        self.trainer.stopped = stopped
        self.aside.on_end(self.trainer)
        self.aside.close(self.trainer)
        self.writer.close(self.trainer)

    @property
    def process(self) -> psutil.Process:
        assert self.aside._pipe is not None
        return psutil.Process(self.aside._pipe.process.pid)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "SIDE", ("-m", "tests.launch.side_stub"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def test_results_have_the_step_of_their_checkpoint_and_one_export_serves_both(tmp_path: Path) -> None:
    run = Run(tmp_path, published=10)
    run.checkpoint(10)
    run.checkpoint(11)
    assert (files.folder_of(tmp_path, 10) / files.MANIFEST).exists()  # protected, although keep=1
    run.until(lambda: not run.aside.jobs)
    (line,), (published,) = run.lines(), run.lines("publication")
    assert line["step"] == published["step"] == 10
    assert line["tasks"] == {"reach": {"expert_normalized": 0.5, "mean_return": 10.0}}
    assert published["said"] == "published somewhere"
    run.checkpoint(12)
    assert [c.step for c in ck.Checkpoint.all(tmp_path)] == [12]  # released
    assert not (tmp_path / "aside" / "policies").exists() or not os.listdir(tmp_path / "aside" / "policies")
    run.close(stopped=True)


def test_the_newest_goes_first_and_few_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, evaluate=EVALUATE + "import time; time.sleep(.5)")
    run.checkpoint(10)
    run.until(lambda: run.aside.jobs[10].begun)
    for step in (20, 30, 40):
        run.checkpoint(step)
    assert sorted(run.aside.jobs) == [10, 30, 40]
    assert "step 20: neither evaluated nor published, because newer checkpoints go first" in capsys.readouterr().out
    run.until(lambda: not run.aside.jobs)
    assert [line["step"] for line in run.lines()] == [10, 40, 30]
    run.close(stopped=True)


def test_a_killed_side_process_is_started_again_and_its_tasks_end(tmp_path: Path) -> None:
    run = Run(
        tmp_path, evaluate=f"import os\nif not os.path.exists({str(tmp_path / 'again')!r}):\n    {HANGS}\n" + EVALUATE
    )
    run.checkpoint(10)
    run.until(lambda: run.process.children())
    (task,) = run.process.children()
    (tmp_path / "again").touch()
    run.process.kill()
    run.until(run.lines)
    assert not task.is_running() or task.status() == psutil.STATUS_ZOMBIE
    assert run.lines()[0]["step"] == 10
    run.close(stopped=True)


def test_a_hung_side_process_is_ended_and_a_job_is_given_up_after_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "SILENCE", 3.0)
    run = Run(tmp_path, evaluate=HANGS)
    run.checkpoint(10)
    for attempt in (1, 2):
        run.until(lambda attempt=attempt: run.aside.jobs[10].begun and run.aside.jobs[10].attempts == attempt)
        run.process.send_signal(signal.SIGSTOP)
        run.until(lambda: run.aside._pipe is None)
    (line,) = run.lines("aside")
    assert line["step"] == 10
    assert "no sign of life" in line["why"]
    assert not run.aside.jobs
    run.close(stopped=True)


def test_a_task_that_takes_too_long_or_finds_a_full_disk_fails_alone(tmp_path: Path) -> None:
    full = "import sys; sys.exit('tiphys: /run: No space left on device')"
    run = Run(tmp_path, export=f"import sys\nif sys.argv[1] == '10': {full}")
    run.checkpoint(10)
    run.until(lambda: run.lines("aside"))
    assert run.lines("aside")[0]["why"] == "/run: No space left on device"
    run.checkpoint(20)
    run.until(run.lines)
    assert run.lines()[0]["step"] == 20
    run.close(stopped=True)
    (tmp_path / "slow").mkdir()
    slow = Run(tmp_path / "slow", minutes=0.05, evaluate=HANGS)
    slow.checkpoint(10)
    slow.until(lambda: slow.lines("aside"))
    assert slow.lines("aside")[0]["failed"] == "evaluate"
    assert "evaluate.minutes" in slow.lines("aside")[0]["why"]
    slow.close(stopped=True)


def test_a_store_that_is_down_is_tried_again_while_others_are_evaluated(tmp_path: Path) -> None:
    back = tmp_path / "back"
    away = f"import os, sys\nif not os.path.exists({str(back)!r}): sys.exit('the store is down')\n{PUBLISH}"
    run = Run(tmp_path, published=20, publish=away)
    run.checkpoint(20)
    run.until(lambda: run.lines())
    run.checkpoint(30)
    run.until(lambda: len(run.lines()) == 2)
    assert not run.lines("publication")
    back.touch()
    run.until(lambda: run.lines("publication"))
    assert run.lines("publication")[0]["step"] == 20
    run.close(stopped=True)


def test_a_stop_ends_an_evaluation_at_once_and_a_resumed_run_does_it(tmp_path: Path) -> None:
    run = Run(tmp_path, published=10, evaluate=HANGS)
    run.checkpoint(10)
    run.until(lambda: run.process.children())
    side, tasks = run.process, run.process.children()
    began = time.monotonic()
    run.close(stopped=True)
    assert time.monotonic() - began < 20
    psutil.wait_procs([side, *tasks], 10)
    assert not [p for p in (side, *tasks) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    again = Run(tmp_path, start=10, published=10)
    again.until(lambda: again.lines("publication"))
    assert [line["step"] for line in again.lines()] == [10]
    assert not unfinished(tmp_path, 10)
    again.close(stopped=True)


def test_rolled_back_steps_leave_no_job_and_no_result(tmp_path: Path) -> None:
    """A run evaluates step 20, is stopped before step 30 is evaluated, and resumes from step 10."""
    run = Run(tmp_path, evaluate=f"import sys\nif sys.argv[1] == '30': {HANGS}\n{EVALUATE}")
    run.checkpoint(10)
    run.until(lambda: run.lines())
    run.checkpoint(20)
    run.until(lambda: len(run.lines()) == 2)
    run.checkpoint(30)
    run.until(lambda: run.aside.jobs[30].begun)
    run.close(stopped=True)
    assert [job.step for job in unfinished(tmp_path, 30)] == [30]
    again = Run(tmp_path, start=10)
    assert not again.aside.jobs
    assert [line["step"] for line in again.lines()] == [10]
    again.checkpoint(30)  # done again: another save of the same step
    again.until(lambda: len(again.lines()) == 2)
    assert [line["step"] for line in again.lines()] == [10, 30]
    again.close(stopped=True)


def test_a_result_that_comes_after_training_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=11, evaluate=f"import time; time.sleep(1)\n{EVALUATE}")
    run.checkpoint(10)
    run.trainer.step = 11
    run.close()
    run.aside.drain()
    assert [line["step"] for line in run.lines()] == [10]


def test_the_tasks_end_with_the_trainer(tmp_path: Path) -> None:
    """If the trainer is killed, the pipe ends."""
    run = Run(tmp_path, evaluate=HANGS)
    run.checkpoint(10)
    run.until(lambda: run.process.children())
    processes = [run.process, *run.process.children()]
    assert run.aside._pipe is not None
    assert run.aside._pipe.process.stdin is not None
    run.aside._pipe.process.stdin.close()
    psutil.wait_procs(processes[1:], 20)
    run.aside._pipe.process.wait(20)
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
@pytest.mark.envs
def test_a_real_run_evaluates_and_publishes_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    from safetensors import safe_open

    from tiphys.launch import run
    from tiphys.launch.attendance import Attendance
    from tiphys.recipes.load import load_recipe

    monkeypatch.setattr(beside, "SIDE", ("-m", "tiphys.launch.side_process"))
    more = "checkpoint: {every: 2}\nevaluate: {every: 2, tasks: [CartPole-v1], episodes: 1, processes: 1}\n"
    more += f"publish: {{to: {tmp_path / 'published'}, every: 2}}\n"
    (tmp_path / "small.yaml").write_text(small_recipe(steps=4) + more)
    recipe = load_recipe(tmp_path / "small.yaml", [f"run.dir={tmp_path / 'run'}"])
    with contextlib.closing(Attendance()) as attendance:
        _, _, aside = run._train(recipe, alone(), attendance, False)
    assert aside is not None
    aside.drain()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if line.get("kind") == "evaluation"]
    assert evaluated["step"] == 2
    assert evaluated["tasks"]["CartPole-v1"]["episodes"] == 1
    (published,) = (tmp_path / "published" / "steps").iterdir()
    weights = published / "model.safetensors"
    assert (weights.stat().st_mode & 0o777) == 0o666 & ~_mask()
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} >= {"torch.bfloat16"}  # noqa: SIM118
    assert json.loads((published / "config.json").read_text())["tiphys"]["step"] == 2
    assert (published / "evaluation.json").is_file()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("minutes, published", [(60.0, True), (4.0, False)])
def test_a_store_that_is_down_for_five_minutes(
    minutes: float, published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks are replaced by answers, and its clock is ours. `evaluate.minutes` is the limit."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(side_process.time, "monotonic", lambda: clock.now)
    (tmp_path / "recipe.yaml").write_text(small_recipe() + f"evaluate: {{minutes: {minutes}}}\n")
    side = side_process.SideProcess(tmp_path, -1, -1)
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(side, "_say", said.append)
    job = side.jobs[10] = side_process.Job(10, ["publish"])
    tries = []
    while side.jobs and clock.now < 1000:
        if job.ready <= clock.now:
            tries.append(clock.now)
            job.since = job.since or clock.now
            if clock.now < 300:
                side._failed(job, "publish", "the store is down")
            else:
                side._answer(job, "published", said="")
                side._next(job)
        clock.now += 1.0
    assert said[-1]["event"] == "finished"
    assert said[-2] == {"step": 10, **({"event": "published", "said": ""} if published else _GIVEN_UP)}
    pauses = np.diff(tries)
    assert (pauses[1:] >= pauses[:-1]).all()
    assert len(tries) < 12
    assert clock.now < 300 + side_process.LONGEST_PAUSE


_GIVEN_UP = {"event": "failed", "task": "publish", "why": "the store is down"}
