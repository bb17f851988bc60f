"""One rank's part in a launch: it watches the lease and signals, says what it does, and leaves a report before it ends.

A launch is given by the command that supervises it (`--launch=7:TOKEN:RUN_DIR`). Without one, as with `deepspeed
launch/train.py`, rank 0 takes the lease and makes the launch itself.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from tiphys.launch.launches import Launch, RankReport
from tiphys.launch.lease import FolderInUse, Lease, Watch, check
from tiphys.launch.start_times import StartTimes
from tiphys.launch.statuses import Status, stopped_by
from tiphys.pretrain.phases import phases

if TYPE_CHECKING:
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.recipes.schema import Recipe

OPTION = "--launch="
_STOPS = (signal.SIGINT, signal.SIGTERM)
STACKS = signal.SIGUSR2  # asks a rank for the stacks of its threads


def option(launch: Launch, token: str) -> str:
    """The word that tells a rank about its launch."""
    return f"{OPTION}{launch.number}:{token}:{launch.run_dir.absolute()}"


def taken(words: Sequence[str]) -> tuple[list[str], str]:
    """(the other words, the value of `--launch=`)."""
    found = [word.removeprefix(OPTION) for word in words if word.startswith(OPTION)]
    return [word for word in words if not word.startswith(OPTION)], found[-1] if found else ""


class Attendance:
    """Made before anything slow is imported. `begin` joins a launch that was not given.

    Attributes
    ----------
    step : int
        Training steps done, for reports.
    times : StartTimes
        Of the start, on rank 0.
    deadline : float
        Seconds from a signal until this rank must have saved and ended.
    """

    def __init__(self, given: str = "") -> None:
        self.rank, self.step, self.deadline = int(os.environ.get("RANK", "0")), 0, 25.0
        self.launch: Launch | None = None
        self.token = ""
        self.times = StartTimes()
        self._reported = False
        self._lease: Lease | None = None
        self._watch: Watch | None = None
        self._stacks: IO[str] | None = None
        self._ended = False
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1
        if threading.current_thread() is threading.main_thread():
            self._listen()
        if given:
            number_, self.token, run_dir = given.split(":", 2)
            self._join(Launch(run_dir, int(number_)))

    def begin(self, recipe: Recipe, world: ParallelDims) -> None:
        """Take part in the launch. Collective if none was given. Raises FolderInUse on every rank."""
        self.rank, self.deadline = world.rank, recipe.checkpoint.deadline
        if self.launch is None:
            mine: dict[str, Any] = {}
            if world.rank == 0:
                try:
                    self._lease = Lease(recipe.run.dir)
                except FolderInUse as error:
                    mine = {"refused": str(error)}
                else:
                    mine = {"token": self._lease.token, "number": Launch.new(recipe.run.dir).number}
                    self._lease.begin(mine["number"])
                    self._lease.keep()
            made = world.gather(mine)[0]
            if "refused" in made:
                raise FolderInUse(made["refused"])
            self.token = made["token"]
            self._join(Launch(recipe.run.dir, made["number"]))
        assert self.launch is not None
        self._watch = Watch(
            self.launch.run_dir, self.token, self.launch.number, self._lost_lease, self._ask_to_stop, phases.flush
        )

    def permit(self) -> None:
        """Raises LeaseLost if another command has taken over. Called before a checkpoint counts."""
        if self.launch is not None:
            check(self.launch.run_dir, self.token, self.launch.number)

    def report(self, status: Status, cause: str = "", *, lost: bool = False, outside: bool = False) -> None:
        """Leave the report. Only the first one counts. The arguments are those of `RankReport`."""
        if not self._reported and self.launch is not None:
            self._reported = True
            self.launch.write(RankReport(self.rank, self.step, cause, status, lost, outside=outside))

    def others(self) -> list[RankReport]:
        """What ranks have reported so far."""
        return self.launch.reports() if self.launch is not None else []

    def close(self) -> None:
        self._ended = True
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._wakeup >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)  # its thread ends
        if self._watch is not None:
            self._watch.close()
        if self._lease is not None:
            self._lease.release()

    # -----------------------------------------------------------------------------------------------------------------

    def _join(self, launch: Launch) -> None:
        self.launch = launch
        if self.rank == 0:
            self.times = StartTimes.continued(launch)
            self.times.add("launcher")
        with suppress(OSError):
            phases.open(launch.beat_file(self.rank), os.getpid())
            self._stacks = open(launch.stack_file(self.rank), "w", encoding="utf-8")  # noqa: SIM115  (kept open)
            self._stacks.write(f"host {socket.gethostname()}\n")
            self._stacks.flush()
            faulthandler.register(STACKS, self._stacks, all_threads=True)

    def _end_at_once(self, number: int, _: object) -> None:
        """A signal outside the training loop: nothing is left to be saved."""
        self.report(stopped_by(number), f"stopped by {signal.Signals(number).name}")
        os._exit(stopped_by(number))

    def _listen(self) -> None:
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in _STOPS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = signal.signal(number, self._end_at_once)
        threading.Thread(target=self._await_signals, args=(reader,), name="signals", daemon=True).start()

    def _await_signals(self, reader: int) -> None:
        """Hears of a signal at once. A handler in Python waits until the main thread leaves a call, such as a collective."""
        until: float | None = None
        while True:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            if select.select([reader], [], [], left)[0]:
                numbers = os.read(reader, 64)
                if not numbers:
                    os.close(reader)
                    return
                if until is None and any(number in _STOPS for number in numbers):
                    until = time.monotonic() + self.deadline
            elif not self._ended:
                self._end(Status.NOT_SAVED, f"not saved within {self.deadline:g} s (checkpoint.deadline) of the signal")

    def _ask_to_stop(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def _lost_lease(self, why: str) -> None:
        self._end(Status.IN_USE if "taken over" in why else Status.NOT_SAVED, why)

    def _end(self, status: Status, why: str) -> None:
        self.report(status, why)
        os.write(sys.stderr.fileno(), f"tiphys: rank {self.rank} ends after step {self.step}: {why}\n".encode())
        os._exit(status)
