"""Notices that ranks stand still, and says which one the others wait for.

Ranks publish what they do (`pretrain/phases.py`). The watchdog is in another process, because a thread of a rank does not run
while something in that rank holds Python's lock. It measures by its own clock how long a rank has said the same. The rank itself
has said how long that may be: it knows its phase and the usual time of a step.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiphys.launch.launches import Launch
from tiphys.pretrain.phases import Beat

PERIOD = 1.0  # seconds between two looks


@dataclass
class _Seen:
    beat: Beat
    since: float


class Watchdog:
    """Watches the ranks of one launch.

    world   number of ranks; 0: not known
    clock   seconds, for tests
    """

    def __init__(self, launch: Launch, world: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.launch, self.world, self._clock = launch, world, clock
        self._seen: dict[int, _Seen] = {}
        self._next = 0.0

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

    def read(self, now: float = 0.0) -> None:
        """Read what the ranks say now; also after they have ended."""
        for rank in self._ranks():
            beat = Beat.read(self.launch.beat_file(rank))
            if beat is not None and beat.counter:
                before = self._seen.get(rank)
                if before is None or before.beat.counter != beat.counter:
                    self._seen[rank] = _Seen(beat, now)

    def _ranks(self) -> range:
        return range(
            self.world or 1 + max((int(f.stem[5:]) for f in self.launch.folder.glob("rank-*.beat")), default=-1)
        )

    def _stopped(self, rank: int) -> bool:
        """Whether a signal has stopped a rank of this machine."""
        return host_of(self.launch, rank) == socket.gethostname() and _state(self._seen[rank].beat.process) == "T"

    def _stalled(self, now: float) -> str:
        """All ranks wait for the one that is furthest behind, so its silence is what counts.

        A rank that was stopped (SIGSTOP) inside an exchange may be ahead of the others, which wait for it all the same.
        """
        if not self._seen:
            return ""
        rank = min(self._seen, key=lambda r: (not self._stopped(r), self._seen[r].beat.progress, r))
        seen = self._seen[rank]
        if seen.beat.phase == "end" or now - seen.since <= seen.beat.limit:
            return ""
        others = [s.beat for r, s in self._seen.items() if r != rank]
        waiting = f"; {len(others)} other{'s' * (len(others) > 1)} wait" if others else ""
        if waiting and len(others) == 1:
            waiting += "s"
        if others:
            waiting += f" in exchange {max(beat.collective for beat in others)}"
        return (
            f'rank {rank} ({host_of(self.launch, rank)}) stands in "{seen.beat.phase}" at step {seen.beat.step} for '
            f"{now - seen.since:.0f} s{waiting}; stacks are in {self.launch.folder}"
        )


def _state(process: int) -> str:
    """The state of a process of this machine, as in `man 5 proc`; empty if there is none."""
    with suppress(OSError, IndexError):
        return Path("/proc", str(process), "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    return ""


def host_of(launch: Launch, rank: int) -> str:
    """Host of a rank, from the file in which it writes stacks; the beat has numbers only."""
    with suppress(OSError, IndexError):
        return launch.stack_file(rank).read_text(encoding="utf-8").splitlines()[0].removeprefix("host ")
    return "host unknown"
