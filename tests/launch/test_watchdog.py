"""The watchdog names the rank that the others wait for, when its own limit is over, and never earlier."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiphys.launch.launches import Launch, RankReport
from tiphys.launch.statuses import Status
from tiphys.launch.watchdog import ABSENT, PERIOD, Watchdog
from tiphys.pretrain import phases
from tiphys.pretrain.phases import Beat, Phases


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    launch = Launch.new(tmp_path)
    for rank in range(3):
        launch.stack_file(rank).write_text(f"host node-{rank}\n")
    return launch


def ranks(launch: Launch, number: int = 3) -> list[Phases]:
    """Ranks that have done some steps of a millisecond, so their limit is the shortest one."""
    made = [Phases() for _ in range(number)]
    for rank, one in enumerate(made):
        one.open(launch.beat_file(rank), process=1)
        for step in range(1, 6):
            one.mark("rows", step)
    return made


def said_after(watchdog: Watchdog, clock: Clock, seconds: float) -> tuple[str, float]:
    """What the watchdog says, and after how long."""
    start = clock.now
    while clock.now - start < seconds:
        if said := watchdog.look():
            return said, clock.now - start
        clock.now += PERIOD
    return "", seconds


def test_the_rank_furthest_behind_is_named(launch: Launch) -> None:
    made, clock = ranks(launch), Clock()
    made[2].mark("rows", 812)
    for one in (made[0], made[1]):
        one.mark("forward", 812)
        one.collective()
    watchdog = Watchdog(launch, 3, clock)
    said, after = said_after(watchdog, clock, 600)
    assert said.startswith('rank 2 (node-2) stands in "rows" at step 812 for ')
    assert "2 others wait in exchange 1" in said
    assert phases.SHORTEST < after <= phases.SHORTEST + 15
    assert watchdog.step == 811


def test_a_rank_that_waits_for_a_slow_one_is_no_alarm(launch: Launch) -> None:
    made, clock = ranks(launch, 2), Clock()
    made[0].mark("forward", 9)
    made[1].mark("validate", 8)  # of minutes
    watchdog = Watchdog(launch, 2, clock)
    for _ in range(10):
        assert said_after(watchdog, clock, 60) == ("", 60)
        made[1].mark("validate")
    assert said_after(watchdog, clock, phases.LONGEST["validate"])[0] == ""


def test_limits_follow_the_usual_step_and_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(phases.time, "monotonic", clock)
    one, file = Phases(), tmp_path / "beat"
    one.open(file, process=1)

    def limit() -> float:
        beat = Beat.read(file)
        assert beat is not None
        return beat.limit

    for step in range(1, 10):
        one.mark("rows", step)
        if step < 3:
            assert limit() == phases.FIRST  # kernels may be compiled
        clock.now += 20 if step != 5 else 500
    assert limit() == 200
    one.mark("save")
    assert limit() == phases.LONGEST["save"]
    one.mark("end")
    assert said_after(Watchdog(Launch(tmp_path, 1), 1, Clock()), Clock(), 5)[0] == ""


def test_a_rank_that_never_begins_is_named_with_its_host(tmp_path: Path) -> None:
    clock, launch = Clock(), Launch.new(tmp_path)
    launch.stack_file(0).write_text("host node-0\n")
    one = Phases()
    one.open(launch.beat_file(0), process=1)
    one.mark("meet")
    watchdog = Watchdog(launch, 3, clock, places=["node-0", "node-1", "node-1"])
    said, after = said_after(watchdog, clock, 1000)
    assert said == f"rank 1 (node-1) and 1 more have not begun {ABSENT + 1:.0f} s after the first rank; 1 other waits"
    assert ABSENT < after <= ABSENT + 15
    assert watchdog.named == (1, 2)


@pytest.mark.parametrize("status, after", [(Status.GAVE_UP, phases.SHORTEST), (Status.DONE, phases.LONGEST["start"])])
def test_if_a_rank_has_failed_the_others_must_end_soon(status: Status, after: float, tmp_path: Path) -> None:
    """One that is still starting would wait for it for an hour. A rank that has reported is not to blame."""
    clock, launch = Clock(), Launch.new(tmp_path)
    for rank in (0, 1):
        one = Phases()
        one.open(launch.beat_file(rank), process=1)
        one.mark("start")
    launch.write(RankReport(0, 0, "for a test", status))
    watchdog = Watchdog(launch, 2, clock)
    said, took = said_after(watchdog, clock, 5000)
    assert said.startswith("rank 1 (")
    assert after < took <= after + 15


def test_of_two_ranks_in_the_same_exchange_the_one_that_does_not_wait_is_named(launch: Launch) -> None:
    clock = Clock()
    ranks(launch, 3)
    other = 'host n\nThread 0x1 (most recent call first):\n  File "/lib/x.py", line 3 in run\n\n'
    main = 'Current thread 0x2 (most recent call first):\n  File "/lib/torch/distributed/c10d.py", line 7 in wait\n'
    waiting = other + main
    for rank in (0, 2):
        launch.stack_file(rank).write_text(waiting)
    called = '  File "/home/x.py", line 1 in sleep\n'  # from inside the exchange
    launch.stack_file(1).write_text(waiting.replace(main, main.replace("first):\n", "first):\n" + called)))
    watchdog = Watchdog(launch, 3, clock)
    assert watchdog.look() == ""
    clock.now += 2 * phases.SHORTEST
    assert watchdog.confirm().startswith("rank 1 (")


def test_no_beat_is_none(tmp_path: Path) -> None:
    assert Beat.read(tmp_path / "nothing") is None
    (tmp_path / "short").write_bytes(b"123")
    assert Beat.read(tmp_path / "short") is None


def test_a_stopped_rank_is_named_although_it_is_ahead(launch: Launch) -> None:
    """It was stopped inside an exchange that it had begun before the others."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        clock = Clock()
        for rank in range(3):
            launch.stack_file(rank).write_text(f"host {socket.gethostname()}\n")
            one = Phases()
            one.open(launch.beat_file(rank), process=child.pid if rank == 1 else os.getpid())
            for step in range(1, 6):
                one.mark("step", step)
            if rank == 1:
                one.collective()
        said, _ = said_after(Watchdog(launch, 3, clock), clock, 600)
        assert said.startswith("rank 1 (")
    finally:
        child.kill()
        child.wait()
