"""Checkpoints by the clock, and training that goes on while the disk is full."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.test_checkpoint import newest, part
from tests.pretrain.test_trainer import fake_trainer
from tiphys.launch.lease import LeaseLost
from tiphys.pretrain import callbacks as cb
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import checkpoint_snapshot
from tiphys.pretrain.callbacks import checkpointer
from tiphys.pretrain.checkpoint import Checkpoint
from tiphys.pretrain.checkpoint_files import StorageFull, WriteError
from tiphys.pretrain.checkpoint_writer import Writer
from tiphys.pretrain.trainer import Trainer


class Keeper(cb.Checkpointer):
    """Saves one parameter whose value is the step, instead of an engine's state."""

    def _writer(self, trainer: Trainer, launch: str) -> Writer:
        return Writer(self.run_dir, launch, asynchronous=self.asynchronous, permit=self.permit)


class Clock:
    """`time` for the checkpointer: a step takes a second, and nobody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Disk:
    """Full while `full(step)` is true."""

    def __init__(self) -> None:
        self.full: Callable[[int], bool] = lambda step: False

    def write(self, tensors: Any, path: Path) -> None:
        step = int(next(iter(tensors.values()))[0])
        if self.full(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        SAVE(tensors, path)


SAVE = checkpoint_snapshot.save_file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpointer, "time", clock)
    monkeypatch.setattr(checkpointer.Trouble.__init__, "__defaults__", (clock.monotonic,))
    monkeypatch.setattr(
        checkpoint_snapshot, "snapshot", lambda engine, save, state, buffers: part(engine.step, save=save)
    )
    return clock


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(checkpoint_snapshot, "save_file", disk.write)
    return disk


class Tick(cb.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step(self, trainer: Trainer, metrics: Any) -> None:
        self.clock.now += 1


def train(steps: int, keeper: Keeper, clock: Clock) -> None:
    fake_trainer(steps, Tick(clock), keeper).fit()


def test_minutes_beside_steps(tmp_path: Path, clock: Clock) -> None:
    train(20, Keeper(tmp_path, 8, keep=99, minutes=0.1, asynchronous=False), clock)
    # after 6 s each, one step later because the ranks agree while a step runs; and at every eighth step
    assert [c.step for c in Checkpoint.all(tmp_path)][::-1] == [7, 8, 15, 16, 20]


def test_a_full_disk_stops_nothing(
    tmp_path: Path, clock: Clock, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.full = lambda step: 6 <= step < 20
    seen: list[int | None] = []

    class Look(cb.Callback):
        def on_step(self, trainer: Trainer, metrics: Any) -> None:
            seen.append(newest(tmp_path))

    keeper = Keeper(tmp_path, 2, keep=3, asynchronous=False)
    fake_trainer(30, Tick(clock), keeper, Look()).fit()
    assert None not in seen[3:]  # there is always a whole one
    assert set(seen[8:18]) == {4}
    assert [c.step for c in Checkpoint.all(tmp_path)] == [30, 28, 26]
    said = capsys.readouterr().err.splitlines()
    assert "could not be written" in said[0]
    assert "No space left on device" in said[0]
    assert said[0].endswith("the newest whole checkpoint is that of step 4")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000026",
        "step-00000028",
        "step-00000030",
    ]


def test_old_checkpoints_go_one_by_one_for_room_and_the_last_one_stays(tmp_path: Path, clock: Clock) -> None:
    trouble = checkpointer.Trouble(1e9, clock.monotonic)
    for step in (1, 2, 3):
        checkpoint_snapshot.write(part(step), tmp_path)
    left = []
    for _ in range(4):
        trouble.add(tmp_path, 3, frozenset(), 9, None)
        left.append([c.step for c in Checkpoint.all(tmp_path)])
    assert left == [[3, 2], [3], [3], [3]]


def test_patience_ends(tmp_path: Path, clock: Clock, disk: Disk) -> None:
    disk.full = lambda step: step > 4
    with pytest.raises(
        StorageFull, match=r"for 0.5 minutes \(checkpoint.patience\), the last time because: .*No space"
    ):
        train(200, Keeper(tmp_path, 4, keep=3, patience=0.5, asynchronous=False), clock)
    assert 30 <= clock.now <= 75
    assert newest(tmp_path) == 4


def test_a_full_disk_at_the_end_is_tried_again(tmp_path: Path, clock: Clock, disk: Disk) -> None:
    tries: list[int] = []
    disk.full = lambda step: tries.append(step) or len(tries) < 4
    train(5, Keeper(tmp_path, 0, asynchronous=False), clock)
    assert tries == [5] * 4
    assert newest(tmp_path) == 5


def test_a_run_that_lost_its_folder_commits_nothing(tmp_path: Path, clock: Clock) -> None:
    def permit() -> None:
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        train(4, Keeper(tmp_path, 2, permit=permit, asynchronous=False), clock)
    assert newest(tmp_path) is None
    assert files.folders(tmp_path)  # all but the manifest is there


def test_rank_0_stops_waiting_for_a_part_that_could_not_be_written(tmp_path: Path) -> None:
    cancelled = threading.Event()
    threading.Timer(0.05, cancelled.set).start()
    with pytest.raises(WriteError, match="another rank could not write its part"):
        checkpoint_snapshot.write(part(3, world=2), tmp_path, cancelled=cancelled.is_set)


def test_metrics_wait_while_the_disk_is_full(tmp_path: Path, clock: Clock) -> None:
    class Full:
        """A file that takes half of the first line, then is full for some steps."""

        def __init__(self, file: Any) -> None:
            self.file, self.calls = file, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if 1 < self.calls < 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data[: len(data) // 2] if self.calls == 1 else data))

        def close(self) -> None:
            self.file.close()

    class FillUp(cb.Callback):
        def on_start(self, trainer: Trainer) -> None:
            writer._file = Full(writer._file)

    writer = cb.MetricsWriter(tmp_path, tensorboard=False)
    fake_trainer(8, writer, FillUp()).fit()
    found = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == list(range(1, 9))
