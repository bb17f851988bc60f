"""A rank leaves a report, however it ends, unless it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_supervise import wait_for
from tests.processes import environment
from tiphys.launch import lease
from tiphys.launch.attendance import Attendance, option, taken
from tiphys.launch.launches import Launch
from tiphys.launch.lease import Lease
from tiphys.launch.statuses import Status

RANK = Path(__file__).with_name("attending_rank.py")


def start(how: str, launch: Launch, token: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(RANK), how, option(launch, token)]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process in the background inherits that it is ignored
    try:
        process = subprocess.Popen(words, env=environment())
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(launch.run_dir / "pid")
    return process


@pytest.mark.parametrize(
    "how, number, status, cause",
    [
        ("starting", signal.SIGTERM, Status.TERMINATED, "stopped by SIGTERM"),
        ("starting", signal.SIGINT, Status.INTERRUPTED, "stopped by SIGINT"),
        ("training", signal.SIGTERM, Status.NOT_SAVED, "not saved within 0.3 s (checkpoint.deadline) of the signal"),
    ],
)
def test_a_signal(how: str, number: int, status: Status, cause: str, tmp_path: Path) -> None:
    launch = Launch.new(tmp_path)
    process = start(how, launch, "token")
    process.send_signal(number)
    assert process.wait(60) == status
    (report,) = launch.reports()
    assert (report.rank, report.step, report.status, report.cause) == (0, 7, status, cause)


def test_a_rank_ends_with_its_lease(tmp_path: Path) -> None:
    owner = Lease(tmp_path)
    launch = Launch.new(tmp_path)
    owner.begin(launch.number)
    process = start("watching", launch, owner.token)
    owner.begin(launch.number + 1)
    began = time.monotonic()
    assert process.wait(60) == Status.NOT_SAVED
    assert time.monotonic() - began < 60
    assert launch.reports()[0].cause == "launch 1 was replaced by launch 2"
    assert lease.PERIOD * lease.MISSES < 10  # seconds until orphans on other hosts are gone


def test_the_word_of_a_launch(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "a:b c", 12)
    assert taken(["recipe", option(launch, "t"), "x=1"]) == (["recipe", "x=1"], f"12:t:{launch.run_dir}")


def test_nothing_of_it_stays_in_the_process(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    attendance = Attendance(f"1:token:{tmp_path}")
    attendance.report(Status.DONE)
    attendance.report(Status.CRASHED, "only the first report counts")
    attendance.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert [report.status for report in Launch(tmp_path, 1).reports()] == [Status.DONE]
    assert os.listdir(tmp_path / "launches" / "0001")
