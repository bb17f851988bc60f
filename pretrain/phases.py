"""What this process is doing, in a file that other processes read while it stands still.

`mark` costs about a microsecond, so the training loop calls it several times in each step. Whoever reads the file (`Beat.read`)
sees a counter that no longer changes, and how long it may stay the same.

    0  counter      raised by every mark
    8  step         training step that is being done, from 1
    16 phase        place in `PHASES`
    24 collective   number of exchanges between CPUs that this rank has given its part to
    32 limit        float64: seconds until the next mark, at most
    40 process      process number
"""

from __future__ import annotations

import mmap
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PHASES = ("import", "meet", "start", "rows", "forward", "backward", "step", "save", "validate", "end")
SHORTEST = 60.0  # seconds that every phase may take
LONGEST = {"import": 1200.0, "meet": 1200.0, "start": 3600.0, "save": 3600.0, "validate": 1800.0, "end": float("inf")}
FIRST = 3600.0  # seconds that a phase of the first step may take: kernels are compiled there
_LAYOUT = struct.Struct("<QQQQdQ")
_KEPT = 64  # steps whose median is the usual one


@dataclass(frozen=True)
class Beat:
    """What a process said last.

    counter     raised by every mark
    step        training step that is being done, from 1; 0 before the first
    phase       one of `PHASES`
    collective  number of exchanges between CPUs that it has given its part to
    limit       seconds that it may need until its next mark
    process     process number
    """

    counter: int
    step: int
    phase: str
    collective: int
    limit: float
    process: int

    @classmethod
    def read(cls, file: Path) -> Beat | None:
        """The beat in a file; None if there is none yet."""
        try:
            counter, step, phase, collective, limit, process = _LAYOUT.unpack(file.read_bytes()[: _LAYOUT.size])
            return cls(counter, step, PHASES[phase], collective, limit, process)
        except (OSError, struct.error, IndexError):
            return None

    @property
    def progress(self) -> tuple[int, int, int]:
        """Larger, the further the process is: it can be compared with that of other ranks."""
        return self.step, self.collective, PHASES.index(self.phase)


class Phases:
    """Writes the beat of this process. Without a file, nobody reads it.

    process   process number
    """

    def __init__(self) -> None:
        self._place: bytearray | mmap.mmap = bytearray(_LAYOUT.size)
        self._counter = self._step = self._phase = self._collectives = self._process = 0
        self._limit = self._usual = FIRST
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._began = 0.0
        self._first = 0
        self._spent, self._marked = [0.0] * len(PHASES), time.monotonic()

    def open(self, file: Path, process: int) -> None:
        """Write to a file from now on. Raises OSError if it cannot be made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w+b") as opened:
            opened.write(bytes(_LAYOUT.size))
            opened.flush()
            self._place = mmap.mmap(opened.fileno(), _LAYOUT.size)
        self._process = process
        self.mark("import")
        self.flush()

    def mark(self, phase: str, step: int = 0) -> None:
        """A phase begins.

        step   training step that is being done, from 1; 0: the same as before
        """
        now = time.monotonic()
        self._spent[self._phase] += now - self._marked
        self._marked = now
        if phase == "start":  # again after a rollback: whatever is compiled is compiled again
            self._step, self._usual = 0, FIRST
            self._seconds.clear()
        if step and step != self._step:
            self._begin(step)
        self._counter += 1
        self._phase = PHASES.index(phase)
        self._limit = LONGEST.get(phase, self._usual)
        self._write()

    def spent(self) -> dict[str, float]:
        """Seconds in each phase since the last call. What a device still computes counts for the phase that waits for it."""
        self.mark(PHASES[self._phase])
        found = {phase: seconds for phase, seconds in zip(PHASES, self._spent, strict=True) if seconds}
        self._spent = [0.0] * len(PHASES)
        return found

    def collective(self) -> None:
        """This rank has given its part to an exchange with other ranks, and may have to wait for theirs."""
        self._collectives += 1
        self._write()

    def flush(self) -> None:
        """Write the file to a file system that other machines share."""
        if isinstance(self._place, mmap.mmap):
            self._place.flush()

    def _begin(self, step: int) -> None:
        now = time.monotonic()
        if self._step and step == self._step + 1 and step - 1 > self._first:  # the first step is no measure
            self._seconds.append(now - self._began)
            self._usual = max(SHORTEST, 10 * statistics.median(self._seconds))
        if not self._step:
            self._first = step
        self._step, self._began = step, now

    def _write(self) -> None:
        values = (self._counter, self._step, self._phase, self._collectives, self._limit, self._process)
        _LAYOUT.pack_into(self._place, 0, *values)


phases = Phases()  # of this process
mark, collective = phases.mark, phases.collective
