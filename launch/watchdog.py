"""Notices that ranks stand still, and says which one the others wait for.

Ranks publish what they do (`pretrain/phases.py`). The watchdog is in another process, because a thread of a rank does not run
while something in that rank holds Python's lock. It measures by its own clock how long a rank has said the same. The rank itself
has said how long that may be: it knows its phase and the usual time of a step.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiphys.launch.launches import Launch
from tiphys.pretrain.phases import SHORTEST, Beat

PERIOD = 1.0  # seconds between two looks
UNKNOWN = "host unknown"
ABSENT = 600.0  # seconds after the first rank in which every rank must have begun


_EXCHANGES = ("/torch/distributed/", "/deepspeed/comm/", "/pretrain/parallel.py")  # code that waits for other ranks


@dataclass
class _Seen:
    beat: Beat
    since: float


class Watchdog:
    """Watches the ranks of one launch.

    Parameters
    ----------
    launch : Launch
    world : int
        Number of ranks; 0: not known.
    clock : callable
        Seconds, for tests.
    places : sequence of str, optional
        Host of each rank. A rank that has begun tells its host by itself.

    Attributes
    ----------
    named : tuple of int
        Ranks that the last sentence of `look` was about.
    """

    def __init__(
        self,
        launch: Launch,
        world: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        places: Sequence[str] = (),
    ) -> None:
        self.launch, self.world, self._clock, self._places = launch, world, clock, places
        self.named: tuple[int, ...] = ()
        self._seen: dict[int, _Seen] = {}
        self._next = 0.0
        self._first: float | None = None  # when the first rank was seen

    @property
    def step(self) -> int:
        """Training steps that are done on every rank that has said so."""
        return max(min((s.beat.step for s in self._seen.values()), default=0) - 1, 0)

    def look(self) -> str:
        """Read what the ranks say. Returns a sentence if the launch stands still; otherwise an empty string."""
        now = self._clock()
        if now < self._next:
            return ""
        self._next = now + PERIOD
        self.read(now)
        return self._stalled(now)

    def confirm(self) -> str:
        """Like `look`, at once. With the stacks that ranks have written meanwhile, a rank that waits in an exchange is told
        from one that has stopped inside it."""
        now = self._clock()
        self.read(now)
        return self._stalled(now)

    def read(self, now: float = 0.0) -> None:
        """Read what the ranks say now; also after they have ended."""
        for rank in self._ranks():
            beat = Beat.read(self.launch.beat_file(rank))
            if beat is not None and beat.counter:
                before = self._seen.get(rank)
                if before is None or before.beat.counter != beat.counter:
                    self._seen[rank] = _Seen(beat, now)
        if self._seen and self._first is None:
            self._first = now

    def _ranks(self) -> range:
        return range(
            self.world or 1 + max((int(f.stem[5:]) for f in self.launch.folder.glob("rank-*.beat")), default=-1)
        )

    def _stopped(self, rank: int) -> bool:
        """Whether a signal has stopped a rank of this machine."""
        return host_of(self.launch, rank) == socket.gethostname() and _state(self._seen[rank].beat.process) == "T"

    def _stalled(self, now: float) -> str:
        """All ranks wait for the one that is furthest behind, so its silence is what counts.

        A rank that was stopped (SIGSTOP) inside an exchange may be ahead of the others, which wait for it all the same. A rank
        that has left its report waits for nobody; if it failed, the others must end soon.
        """
        if absent := self._absent(now):
            return absent
        reports = {report.rank: report for report in self.launch.reports()}
        left = [rank for rank in self._seen if rank not in reports]
        if not left:
            return ""
        rank = min(left, key=lambda r: (not self._stopped(r), self._seen[r].beat.progress, waits(self.launch, r), r))
        seen = self._seen[rank]
        failed = any(not (r.status.finished or r.status.stopped) for r in reports.values())
        limit = min(seen.beat.limit, SHORTEST) if failed else seen.beat.limit
        if seen.beat.phase == "end" or now - seen.since <= limit:
            return ""
        self.named = (rank,)
        others = [s.beat for r, s in self._seen.items() if r != rank]
        waiting = f"{_waiting(len(others))} in exchange {max(b.collective for b in others)}" if others else ""
        return (
            f'rank {rank} ({self._host(rank)}) stands in "{seen.beat.phase}" at step {seen.beat.step} for '
            f"{now - seen.since:.0f} s{waiting}; stacks are in {self.launch.folder}"
        )

    def _absent(self, now: float) -> str:
        """A sentence if ranks have not even begun long after the first one; their host may be off."""
        absent = tuple(rank for rank in range(self.world) if rank not in self._seen)
        if not absent or self._first is None or now - self._first <= ABSENT:
            return ""
        self.named = absent
        more = f" and {len(absent) - 1} more have" if len(absent) > 1 else " has"
        return (
            f"rank {absent[0]} ({self._host(absent[0])}){more} not begun {now - self._first:.0f} s after the first rank"
            f"{_waiting(len(self._seen))}"
        )

    def _host(self, rank: int) -> str:
        known = host_of(self.launch, rank)
        return self._places[rank] if known == UNKNOWN and rank < len(self._places) else known


def _waiting(others: int) -> str:
    return f"; {others} other waits" if others == 1 else f"; {others} others wait"


def _state(process: int) -> str:
    """The state of a process of this machine, as in `man 5 proc`; empty if there is none."""
    with suppress(OSError, IndexError):
        return Path("/proc", str(process), "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    return ""


def waits(launch: Launch, rank: int) -> bool:
    """Whether the last stacks of a rank show that its main thread waits for other ranks. Its main thread is the last one.

    Its innermost frame tells: whatever stops *inside* an exchange has called something else from there.
    """
    with suppress(OSError):
        text = launch.stack_file(rank).read_text(encoding="utf-8", errors="replace")
        innermost = re.search(r'  File "([^"]+)"', text.rpartition("(most recent call first):")[2])
        return innermost is not None and any(place in innermost[1] for place in _EXCHANGES)
    return False


def host_of(launch: Launch, rank: int) -> str:
    """Host of a rank, from the file in which it writes stacks; the beat has numbers only."""
    with suppress(OSError, IndexError):
        return launch.stack_file(rank).read_text(encoding="utf-8").splitlines()[0].removeprefix("host ")
    return UNKNOWN
