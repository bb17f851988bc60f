"""What a launch's end means: the reports of its ranks decide, never the launcher's status alone."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tiphys.launch.launches import RankReport
from tiphys.launch.statuses import Status
from tiphys.launch.supervise import pause_after, restart_line
from tiphys.launch.verdict import judge


def report(rank: int, status: Status, cause: str = "", *, step: int = 812, lost: bool = False) -> RankReport:
    return RankReport(rank, step, cause, status, lost, "node-1")


DONE = [report(0, Status.DONE), report(1, Status.DONE)]
SURVIVOR = report(0, Status.GAVE_UP, "another process is gone", lost=True)
SAVED = [report(0, Status.TERMINATED), report(1, Status.TERMINATED)]


@pytest.mark.parametrize(
    "reports, facts, status, said",
    [
        (DONE, {"code": 0}, Status.DONE, ""),
        (DONE, {"code": 1}, Status.DONE, ""),
        ([], {"code": 0}, Status.GAVE_UP, "ended without a report (launcher's status 0)"),
        ([report(1, Status.DONE)], {"code": 0}, Status.GAVE_UP, "rank 0 ended without a report"),
        ([], {"code": -9}, Status.GAVE_UP, "the launcher was killed (signal 9) at step 7"),
        ([SURVIVOR], {"code": 247}, Status.GAVE_UP, "rank 1 was killed (signal 9) at step 812"),
        ([SURVIVOR, report(1, Status.REFUSED, "no")], {"code": 3}, Status.REFUSED, ""),
        ([report(1, Status.GAVE_UP, "StoreError: down")], {"code": 75}, Status.GAVE_UP, "rank 1 (node-1) failed"),
        ([SURVIVOR], {"code": -9, "stalled": "rank 1 stands"}, Status.GAVE_UP, "rank 1 stands"),
        (SAVED, {"code": 1}, Status.TERMINATED, ""),
        (SAVED[:1], {"code": 1}, Status.GAVE_UP, "rank 1 ended without a report"),
        (SAVED, {"code": 1, "asked": signal.SIGINT}, Status.INTERRUPTED, ""),
        ([], {"code": -9, "asked": signal.SIGTERM}, Status.NOT_SAVED, "resumes from step 5"),
        ([], {"code": 1, "asked": signal.SIGTERM, "saved": 7}, Status.TERMINATED, ""),
        ([report(0, Status.NOT_SAVED, "late")], {"code": 70}, Status.NOT_SAVED, "resumes from step 5"),
        ([report(0, Status.NOT_EVALUATED), DONE[1]], {"code": 7}, Status.NOT_EVALUATED, ""),
    ],
)  # fmt: skip
def test_verdicts(reports: list[RankReport], facts: dict[str, object], status: Status, said: str) -> None:
    verdict = judge(reports, **{"world": 2, "step": 7, "saved": 5, **facts})  # type: ignore[arg-type]
    assert verdict.status == status
    assert said in verdict.why
    assert bool(said) == bool(verdict.why)


@pytest.mark.parametrize(
    "reports, facts, ranks",
    [
        ([SURVIVOR], {"code": 247}, (1,)),
        ([report(1, Status.GAVE_UP, "AcceleratorError")], {"code": 75}, (1,)),
        ([replace(report(1, Status.GAVE_UP, "StoreError"), outside=True)], {"code": 75}, ()),  # other machines would meet it too
        ([], {"code": -9}, ()),
        ([], {"code": 0, "world": 0}, ()),
        ([SURVIVOR], {"code": -9, "stalled": "rank 0 stands", "stands": (0,)}, (0,)),
        ([report(1, Status.GAVE_UP)], {"code": -9, "stalled": "rank 0 stands", "stands": (0,)}, (1,)),
    ],
)  # fmt: skip
def test_the_ranks_whose_machine_may_have_failed(
    reports: list[RankReport], facts: dict[str, object], ranks: tuple[int, ...]
) -> None:
    assert judge(reports, **{"world": 2, **facts}).ranks == ranks  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [Status.USAGE, Status.REFUSED, Status.IN_USE, Status.DIVERGED, Status.STORAGE_FULL])
def test_what_would_fail_again_is_not_started_again(status: Status) -> None:
    assert not judge([report(1, status)], code=int(status), world=2).failed


def test_a_restart_says_what_happened_and_what_is_done_again() -> None:
    verdict = judge([SURVIVOR], code=247, world=2)
    assert restart_line(3, verdict, 800) == (
        "restart 3: rank 1 was killed (signal 9) at step 812; resuming from 800, 12 steps are done again"
    )
    assert restart_line(1, verdict, 0).endswith("; beginning again, 812 steps are done again")


def test_pauses_double_up_to_five_minutes() -> None:
    pauses = [pause_after(n) for n in range(1, 14)]
    assert all(0.75 * min(300, 2 ** (n - 1)) <= p <= min(300, 2 ** (n - 1)) for n, p in enumerate(pauses, 1))
