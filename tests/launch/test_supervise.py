"""The supervisor brings a run to its end, says what happened, and leaves nothing behind. `fake_launch.py` stands for ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import environment
from tiphys.launch import supervise as module
from tiphys.launch.launches import Launch
from tiphys.launch.lease import FolderInUse, Lease
from tiphys.launch.statuses import Status
from tiphys.launch.supervise import Job, Node, Settings, supervise

FAKE = Path(__file__).with_name("fake_launch.py")


def job(plan: str) -> Job:
    return Job({}, None, [sys.executable, str(FAKE)], [plan], list, "", 2, environment())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder. Nothing is checked and pauses are short. SIGHUP is not ignored, as it would be under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = tmp_path / "run"
    monkeypatch.setattr(Node, "check", lambda self, stops: Settings(str(folder), 0.2, 3))
    monkeypatch.setattr(module, "pause_after", lambda failures: 0.01 * failures)
    monkeypatch.setattr(module, "GRACE", 0.2)
    yield folder
    signal.signal(signal.SIGHUP, before)


def stop_when_it_runs(folder: Path, number: int) -> None:
    def stop() -> None:
        wait_for(folder / "pid")
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()


def wait_for(file: Path) -> int:
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return int(file.read_text())


def test_a_lost_launch_is_started_again_from_its_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(job("saves,lost,done")) == Status.DONE
    assert capfd.readouterr().err.splitlines() == [
        "tiphys: restart 1: rank 1 was killed (signal 9) at step 12; resuming from 10, 2 steps are done again",
        "tiphys: restart 2: rank 1 was killed (signal 9) at step 12; resuming from 10, 2 steps are done again",
    ]
    assert [len(Launch(run, n).reports()) for n in (1, 2, 3, 4)] == [1, 1, 2, 0]
    assert not (run / "lease.json").exists()


def test_it_gives_up_after_failures_without_a_newer_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(job("lost,saves,saves,lost")) == Status.GAVE_UP
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 6  # the third launch began a new count: 1, then three more
    assert "failed 4 times without a newer checkpoint" in said[-1]
    assert "resuming from 30 with the same command" in said[-1]


def test_a_launcher_that_returns_0_is_no_success(run: Path) -> None:
    assert supervise(job("nothing")) == Status.GAVE_UP


def test_what_cannot_be_helped_is_not_started_again(run: Path) -> None:
    assert supervise(job("refused")) == Status.REFUSED
    assert not Launch(run, 2).folder.exists()


def test_a_folder_in_use_is_left_alone(run: Path) -> None:
    owner = Lease(run)
    with pytest.raises(FolderInUse):
        supervise(job("done"))
    assert not (run / "launches").exists()
    owner.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_which_save(number: int, run: Path) -> None:
    stop_when_it_runs(run, number)
    assert supervise(job("waits")) == Status.TERMINATED


def test_ranks_that_do_not_end_in_time_are_killed(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stop_when_it_runs(run, signal.SIGTERM)
    assert supervise(job("deaf")) == Status.NOT_SAVED
    assert "stopped without saving after step 12; the same command resumes from the beginning" in capfd.readouterr().err
    assert not Path(f"/proc/{wait_for(run / 'pid')}").exists()


@pytest.mark.parametrize("how", ["stopped", "holding"])
def test_a_launch_that_stands_still_is_named_and_started_again(
    how: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise(job(f"{how},done")) == Status.DONE
    said = capfd.readouterr().err
    here = f'rank 0 ({socket.gethostname()}) stands in "forward" at step 13 for '
    assert f"tiphys: {here}" in said
    assert f"tiphys: restart 1: {here}" in said
    stacks = Launch(run, 1).stack_file(0).read_text()
    assert ("fake_launch.py" in stacks) == (how == "holding")


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.launch.test_supervise import job; from tiphys.launch.supervise import *\n"
        f"Node.check = lambda self, stops: Settings({str(tmp_path)!r}, 1.0, 3)\n"
        "supervise(job('waits'))"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script], env=environment())
    rank = wait_for(tmp_path / "pid")
    with open(f"/proc/{supervisor.pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    supervisor.kill()
    supervisor.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    Lease(tmp_path).release()  # its lease is that of a dead process
    assert peak < 100_000  # kilobytes; with pytest and this test imported


def test_the_supervisor_imports_no_torch() -> None:
    code = "import tiphys.launch.commands.runs, tiphys.launch.supervise, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
