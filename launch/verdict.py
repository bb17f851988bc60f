"""What the end of a launch means: from the reports of its ranks, and the launcher's exit status where a report is missing."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from tiphys.launch.launches import RankReport
from tiphys.launch.statuses import Status

# Statuses that another launch would end with as well, so there is none.
FINAL = (
    Status.CRASHED,
    Status.USAGE,
    Status.REFUSED,
    Status.IN_USE,
    Status.DIVERGED,
    Status.STORAGE_FULL,
)


@dataclass(frozen=True)
class Verdict:
    """How a launch ended.

    status  GAVE_UP stands for a failure that another launch may pass
    why     in words, for a failure; empty if a rank has said it to the user
    step    training steps that were done, as far as known
    ranks   those whose machine may have failed: they reported an error of their own, are gone, or stood still; empty: not known
    """

    status: Status
    why: str = ""
    step: int = 0
    ranks: tuple[int, ...] = ()

    @property
    def failed(self) -> bool:
        """A further launch may get further."""
        return self.status == Status.GAVE_UP


def judge(
    reports: Sequence[RankReport],
    *,
    code: int,
    world: int,
    asked: int = 0,
    step: int = 0,
    saved: int = 0,
    stalled: str = "",
    stands: tuple[int, ...] = (),
) -> Verdict:
    """The verdict on a launch that has ended.

    reports  those of its ranks, at most one each
    code     exit status of the launcher; negative: the signal that killed it
    world    number of ranks; 0: not known
    asked    the signal with which the user stopped the run, or 0
    step     training steps done, as far as the ranks have said
    saved    step of the newest whole checkpoint
    stalled  what the watchdog said before it ended the launch
    stands   the ranks that it named
    """
    of = {report.rank: report for report in reports}
    step = max([step, *(report.step for report in reports)])
    first = of.get(0)
    final = [report for report in reports if report.status in FINAL and not report.lost]
    if final:
        return Verdict(final[0].status, step=step)
    if first is not None and first.status.finished:
        return Verdict(first.status, step=step)
    if first is not None and first.status.stopped and all(r.status.stopped for r in reports) and len(of) >= world:
        return Verdict(Status.INTERRUPTED if asked == signal.SIGINT else first.status, step=step)
    if asked:
        if step <= saved:  # it ended before training began, or right after a save
            return Verdict(Status.INTERRUPTED if asked == signal.SIGINT else Status.TERMINATED, step=step)
        return Verdict(Status.NOT_SAVED, _unsaved(step, saved), step)
    late = [report for report in reports if report.status == Status.NOT_SAVED]
    if late:
        return Verdict(Status.NOT_SAVED, _unsaved(step, saved), step)
    if stalled and not _own(reports):
        return Verdict(Status.GAVE_UP, stalled, step, stands)
    return Verdict(Status.GAVE_UP, _lost(reports, code, world, step), step, _failed(reports, code, world))


def _unsaved(step: int, saved: int) -> str:
    where = f"step {saved}" if saved else "the beginning"
    return f"stopped without saving after step {step}; the same command resumes from {where}"


def _own(reports: Sequence[RankReport]) -> list[RankReport]:
    """The reports of ranks that failed by themselves."""
    return [report for report in reports if not (report.lost or report.status.stopped or report.status.finished)]


def _failed(reports: Sequence[RankReport], code: int, world: int) -> tuple[int, ...]:
    if own := _own(reports):
        return tuple(report.rank for report in own if not report.outside)
    have = {report.rank for report in reports}
    return () if code < 0 else tuple(rank for rank in range(world) if rank not in have)


def _lost(reports: Sequence[RankReport], code: int, world: int, step: int) -> str:
    """Which rank failed, and how it is known."""
    if own := _own(reports):
        return f"rank {own[0].rank} ({own[0].host}) failed at step {own[0].step}: {own[0].cause}"
    if code < 0:
        return f"the launcher was killed ({_signal(-code)}) at step {step}"
    gone = _failed(reports, code, world)
    how = (
        f"was killed ({_signal(256 - code)})"
        if 192 <= code < 256
        else f"ended without a report (launcher's status {code})"
    )
    if len(gone) == 1:
        return f"rank {gone[0]} {how} at step {step}"
    who = f"one of the ranks {', '.join(map(str, gone[:4]))}{' …' if len(gone) > 4 else ''}" if gone else "a rank"
    return f"{who} {how} at step {step}"


def _signal(number: int) -> str:
    return f"signal {number}"
