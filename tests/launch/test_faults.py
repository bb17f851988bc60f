"""Real launches whose processes are killed or stopped: each end has its status, and the weights are those of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch.small_recipe import small_recipe
from tests.processes import environment
from tiphys.launch.launches import Launch
from tiphys.launch.statuses import Status
from tiphys.pretrain.checkpoint import Checkpoint, optimizer_state
from tiphys.pretrain.phases import Beat

pytestmark = pytest.mark.long
STEPS = 2000
LONG = 400.0  # seconds that nothing needs on a machine that is not overloaded


class Training:
    """`tiphys train` on two ranks, in a folder of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self.run_dir, self.said = folder / "run", folder / "said.txt"
        (folder / "small.yaml").write_text(small_recipe(steps=STEPS))
        command = [sys.executable, "-m", "tiphys", "train", "small.yaml", "--processes", "2"]
        more = ["checkpoint.minutes=0.02", "train.log_every=50", *overrides]
        with self.said.open("a") as out:
            self.process = subprocess.Popen(
                [*command, *more], cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT
            )

    def ranks(self, launch: int, step: int) -> list[int]:
        """Wait until both ranks of a launch are at a step, and a checkpoint exists. Returns their process numbers."""
        files = [Launch(self.run_dir, launch).beat_file(rank) for rank in (0, 1)]

        def there() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            return all((beat := Beat.read(file)) is not None and beat.step >= step for file in files)

        wait_until(there)
        wait_until(lambda: Checkpoint.newest_whole(self.run_dir) is not None)
        return [beat.process for file in files if (beat := Beat.read(file)) is not None]

    def end(self) -> Status:
        return Status(self.process.wait(LONG))


def wait_until(true: Callable[[], bool], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def weights(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    newest = Checkpoint.newest_whole(run_dir, verify=True)
    assert newest is not None
    assert newest.step == STEPS
    return optimizer_state(newest)


def assert_same_bits(run_dir: Path, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    found = weights(run_dir)
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        for key, tensor in parts.items():
            assert torch.equal(found[name][key], tensor), (name, key)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    training = Training(tmp_path_factory.mktemp("undisturbed"))
    assert training.end() == Status.DONE, training.said.read_text()
    return weights(training.run_dir)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path)
    yield training
    for child in psutil.Process().children(recursive=True):
        child.kill()


def test_killed_ranks_and_launchers_are_replaced(
    training: Training, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    os.kill(training.ranks(1, 300)[1], signal.SIGKILL)
    launcher = psutil.Process(training.ranks(2, 600)[0]).ppid()
    os.kill(launcher, signal.SIGKILL)
    assert training.end() == Status.DONE, training.said.read_text()
    said = training.said.read_text()
    assert "restart 1: rank 1 was killed (signal 9) at step " in said
    assert "restart 2: the launcher was killed (signal 9) at step " in said
    assert_same_bits(training.run_dir, undisturbed)


def test_a_killed_supervisor_leaves_nothing_and_a_second_command_has_to_wait_for_its_end(
    training: Training, tmp_path: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    ranks = training.ranks(1, 100)
    assert psutil.Process(training.process.pid).memory_info().rss < 60e6
    second = Training(tmp_path)
    assert second.end() == Status.IN_USE, second.said.read_text()
    assert f"is trained by host {os.uname().nodename}, process {training.process.pid}, since" in second.said.read_text()
    training.process.kill()
    training.process.wait()
    wait_until(lambda: not any(psutil.pid_exists(rank) for rank in ranks), 10.0)
    assert Training(tmp_path).end() == Status.DONE
    assert_same_bits(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("whom", ["supervisor", "launcher", "rank"])
def test_whoever_gets_sigterm_the_run_is_saved(whom: str, training: Training) -> None:
    ranks = training.ranks(1, 50)
    target = {"supervisor": training.process.pid, "launcher": psutil.Process(ranks[0]).ppid(), "rank": ranks[1]}[whom]
    os.kill(target, signal.SIGTERM)
    assert training.end() == Status.TERMINATED, training.said.read_text()
    newest = Checkpoint.newest_whole(training.run_dir)
    assert newest is not None
    assert [report.step for report in Launch(training.run_dir, 1).reports()] == [newest.step] * 2


def test_a_stopped_rank_is_named_and_replaced(training: Training) -> None:
    os.kill(training.ranks(1, 300)[1], signal.SIGSTOP)
    assert training.end() == Status.DONE, training.said.read_text()
    said = training.said.read_text()
    assert "restart 1: rank 1 (" in said
    assert ") stands in " in said
    assert "1 other waits in exchange " in said
