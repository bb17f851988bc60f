"""The training loop: exact resume after SIGKILL, stops that all ranks agree on, quarantine, and the callbacks."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests import processes
from tests.pretrain import synthetic, training
from tiphys.pretrain import callbacks as cb
from tiphys.pretrain.callbacks.progress import ProgressLine
from tiphys.pretrain.checkpoint import Checkpoint, CheckpointError
from tiphys.pretrain.engine import StepResult
from tiphys.pretrain.metrics import StepMetrics
from tiphys.pretrain.parallel import ParallelDims, Sum
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.trainer import Signals, Trainer, TrainingError


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss. Every step must be there exactly once."""
    found = [line for line in lines(run) if "loss" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line["loss"] for line in found}


def test_a_killed_and_resumed_run_equals_one_without_a_kill(world: ParallelDims, tmp_path: Path) -> None:
    """SIGKILL at a random step. All losses and the last checkpoint are equal, bit for bit."""
    steps, kill_at = 12, random.Random(os.environ.get("TIPHYS_SEED", "1")).randint(4, 11)
    assert training.train(tmp_path / "whole", steps)[0]
    killed = processes.Ranks(training.__file__, [tmp_path / "killed", steps, "--kill-at", kill_at], 1)
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    resumed = Checkpoint.newest_whole(tmp_path / "killed")
    assert resumed is not None
    assert 0 < resumed.step <= kill_at
    assert training.train(tmp_path / "killed", steps)[0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    digests = []
    for run in ("whole", "killed"):
        last = Checkpoint.newest_whole(tmp_path / run)
        assert last is not None
        assert last.step == steps
        digests.append(last.manifest["files"]["rank00000.safetensors"])
    assert digests[0] == digests[1]
    assert [c.step for c in Checkpoint.all(tmp_path / "whole")] == [12, 9]  # keep=2


def test_a_signal_to_one_rank_stops_and_saves_all(tmp_path: Path) -> None:
    """The signal goes to the last stage of a pipeline, which has no loader."""
    ranks = processes.Ranks(training.__file__, [tmp_path, 1000, "--pause", 0.02, "--pipeline", 2], 2)
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_text()) < 10:
        assert time.monotonic() < deadline, ranks.text()
        assert all(p.poll() is None for p in ranks.processes), ranks.text()
        time.sleep(0.1)
    ranks.processes[1].send_signal(signal.SIGTERM)
    ranks.processes[1].send_signal(signal.SIGTERM)  # a launcher may send it twice
    statuses = [p.wait(120) for p in ranks.processes]
    assert statuses == [143, 143], ranks.text()  # both know which signal it was
    saved = Checkpoint.newest_whole(tmp_path, verify=True)
    assert saved is not None
    assert saved.world == 2
    assert saved.step == max(losses(tmp_path))
    assert f"stopped after step {saved.step}, which is saved; the same command resumes" in ranks.text()


def test_quarantined_episodes_enter_the_log_and_the_checkpoint(world: ParallelDims, tmp_path: Path) -> None:
    event = {"kind": "quarantine", "entry": "0:x", "episode": 5, "id": "e5"}
    loader = synthetic.SyntheticLoader(13, events={2: [event, event]})
    training.train(tmp_path, 6, loader=loader)
    assert loader.heard == [{**event, "step": 4}]  # steps 2 and 3 were already drawn
    assert all(item.released for item in loader.given)
    last = Checkpoint.newest_whole(tmp_path)
    assert last is not None
    assert last.state()["loader"] == {"step": 6, "log": loader.heard}
    assert lines(tmp_path)[0]["loader"] == {"cache_hit_rate": 0.75, "store_bytes": 4.0}


def test_a_change_of_the_mixture_is_printed_and_written_with_its_first_step(
    world: ParallelDims, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"kind": "weights", "weights": {"0:x": 0.5}}
    loader = synthetic.SyntheticLoader(13, events={2: [event]})
    training.train(tmp_path, 6, loader=loader)
    capsys.readouterr()
    (line,) = [line for line in lines(tmp_path) if line.get("kind") == "change"]
    assert line["event"] == {**event, "step": 4}
    assert line["step"] == 3  # a checkpoint of three steps contains the change
    shown = cb.Progress(terminal=False)
    shown.prints = True
    shown.on_change(None, [line["event"]])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "from step 4 on: mixture weights 0:x = 0.5\n"


def test_a_loss_that_is_not_finite_ends_training_without_a_checkpoint(world: ParallelDims, tmp_path: Path) -> None:
    class Poisoned(synthetic.SyntheticLoader):
        def __next__(self) -> synthetic.Item:
            item = super().__next__()
            if item.step == 4:
                item.arrays["weight"][:] = np.nan
            return item

    with pytest.raises(TrainingError, match="step 5: the loss is nan"):
        training.train(tmp_path, 8, loader=Poisoned(13))
    last = Checkpoint.newest_whole(tmp_path)
    assert last is not None
    assert last.step == 3


@pytest.mark.long
def test_through_the_deepspeed_launcher(world: ParallelDims, tmp_path: Path) -> None:
    processes.launch(training.__file__, [tmp_path / "two", 6], 2)
    training.train(tmp_path / "one", 6)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert list(one.values()) == pytest.approx(list(two.values()), abs=2e-6)


# --- without DeepSpeed ------------------------------------------------------------------------------------------------


class FakeWorld:
    rank, world, replica, data = 0, 1, 0, 1
    device = __import__("torch").device("cpu")

    def sum(self, values: list[float]) -> Sum:
        return Sum(None, values)

    def gather(self, value: Any) -> list[Any]:
        return [value]


class FakeEngine:
    """Counts steps, and records which rows it gets."""

    balance = None
    bf16 = False

    def __init__(self) -> None:
        self.world, self.step = FakeWorld(), 0
        self.announced: list[int] = []
        self.rows: list[list[int]] = []

    def announce(self, batch: TokenBatch) -> None:
        self.announced.append(batch.step)

    def train_step(self, batch: TokenBatch) -> StepResult:
        assert batch.step in self.announced
        self.rows.append(batch.row.tolist())
        self.step += 1
        return StepResult(self.step, 1.0 / self.step, 0.0, 1.0, 1e-3, 13, 1000, 50, 1e6, {0: (2.0, 4), 1: (0.0, 0)})


def fake_trainer(steps: int, *stages: cb.Callback, run: str = "unused") -> Trainer:
    recipe = synthetic.recipe(run, train={"steps": steps})
    return Trainer(recipe, FakeEngine(), synthetic.SyntheticLoader(13), stages)  # type: ignore[arg-type]


def test_batches_are_announced_one_step_ahead() -> None:
    trainer = fake_trainer(4)
    seen: list[list[int]] = []

    class Watch(cb.Callback):
        def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
            seen.append(list(trainer.engine.announced))  # type: ignore[attr-defined]

    trainer.callbacks.append(Watch())
    assert trainer.fit()
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert trainer.engine.rows == [list(range(13))] * 4  # type: ignore[attr-defined]


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 9}\n{"step": 2, "loss": 9}\n{"kind": "validation", "step": 2, "loss": 9}\n{"step": 3, "lo'
    )
    trainer = fake_trainer(4, cb.MetricsWriter(tmp_path, tasks=["reach"], tensorboard=False))
    trainer.engine.step = 1  # type: ignore[misc]
    trainer.loader.step = 1  # type: ignore[union-attr]
    trainer.fit()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[0]["loss"] == 9
    assert found[3]["loss"] == 0.25
    assert found[3]["loss_by_task"] == {"reach": 0.5}
    assert found[3]["tokens_per_second"] == pytest.approx(1000 / found[3]["seconds"], rel=1e-2)


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    fake_trainer(3, cb.Progress(terminal=False, seconds=0.0)).fit()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[-1].startswith("step 3/3  ETA 0:00  loss 0.3333  ")
    for word in ("tokens/s", "MFU", "data wait", "cache 75%"):
        assert word in out[-1]


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fake_trainer(3, cb.Progress(terminal=True)).fit()
    assert "step 3/3  ETA 0:00  loss 0.3333" in capsys.readouterr().out


@pytest.mark.parametrize("width", [200, 100, 80, 60, 50, 40, 30, 20])
def test_a_narrow_terminal_shows_the_most_important_items(width: int) -> None:
    items = [
        "step 12345/100000",
        "ETA 12:34:56",
        "loss 0.3333",
        "123.4k tokens/s",
        "data wait 0.1%",
        "MFU 12.3%",
        "cache 7%",
    ]
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(ProgressLine(items, 12345, 100000))
    (line,) = captured.get().splitlines()
    assert len(line) <= width
    shown = [item for item in items if item in line]
    assert shown == items[: len(shown)]
    assert "  ".join(shown) in line
    assert len(shown) == {200: 7, 100: 6, 80: 4, 60: 3, 50: 3, 40: 2, 30: 1, 20: 1}[width]
    assert ("━" in line) == (width in (200, 100, 80, 60, 30))


def test_resuming_with_other_datasets_is_refused(tmp_path: Path) -> None:
    trainer = fake_trainer(3)
    checkpoint = type("Saved", (), {"path": tmp_path, "state": lambda self: trainer.state() | {"datasets": ["old"]}})()
    with pytest.raises(CheckpointError, match="the datasets have changed"):
        trainer.fit(checkpoint)


def test_every() -> None:
    assert [s for s in range(1, 10) if cb.Every(3)(s)] == [3, 6, 9]
    assert not any(cb.Every(0)(s) for s in range(10))


@pytest.mark.parametrize(
    "signals, status", [([signal.SIGINT], 0), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM] * 3, 0)]
)
def test_a_second_interrupt_ends_the_process_at_once(signals: list[int], status: int) -> None:
    pid = os.fork()
    if pid == 0:
        with Signals(False) as handling:
            for number in signals:
                os.kill(os.getpid(), number)
            time.sleep(0.01)
            os._exit(0 if handling.stop else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
