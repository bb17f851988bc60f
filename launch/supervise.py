"""The command that stays: it starts a launch, watches it, says what its end means, and starts the next one if that can help.

It is small (it imports no torch), so that it lives when memory is short. It owns the lease of the run's folder, and all processes
of a launch end with it. What DeepSpeed's launcher returns is only evidence; `verdict.judge` decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tiphys.dataio.messages import say
from tiphys.dataio.python_path import python
from tiphys.launch.attendance import STACKS, option
from tiphys.launch.launches import Launch
from tiphys.launch.lease import PERIOD, Lease
from tiphys.launch.parents import adopted_orphans
from tiphys.launch.shrink import Blame, host_of, without_host
from tiphys.launch.start_times import StartTimes
from tiphys.launch.statuses import Status, stopped_by
from tiphys.launch.verdict import Verdict, judge
from tiphys.launch.watchdog import Watchdog
from tiphys.pretrain import checkpoint_files
from tiphys.pretrain.phases import Beat

GRACE = 5.0  # seconds beyond `checkpoint.deadline` until a launch that was asked to stop is killed
LONGEST_PAUSE = 300.0  # seconds between two launches
STACK_TIME = 1.0  # seconds for writing stacks
_TICK = 0.1
_UNKNOWN_HOSTS = (
    "the ranks of each host must be known: name the hosts in the hostfile, and give DeepSpeed none of --include, --exclude, "
    "--num_nodes, --num_gpus, --num_accelerators, --master_addr, --no_ssh"
)


@dataclass(frozen=True)
class Job:
    """What to run.

    check    what `launch/node.py` checks first
    module   what each rank runs under DeepSpeed's launcher of this machine; None: `words` is a whole command
    words    options of that launcher, or the beginning of the command
    ranks    the words of each rank, without those about the launch
    packed   makes the words of a rank one word that no shell changes
    folder   where the launcher starts; empty: the current folder
    world    number of ranks; 0: not known
    hosts    ranks of each host by its name in the hostfile, in the order of their ranks; empty: one machine, or not known
    missing  what the launcher lacks on this machine, in words; empty: nothing
    """

    check: dict[str, Any]
    module: str | None
    words: Sequence[str]
    ranks: Sequence[str]
    packed: Any
    folder: str
    world: int
    environment: Mapping[str, str]
    hosts: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Settings:
    """What the supervisor must know about a recipe: its folder (absolute), `checkpoint.deadline` and `restart`."""

    run_dir: str
    deadline: float
    attempts: int
    shrink: bool = False


def supervise(job: Job) -> Status:
    """Run a job to its end. Raises FolderInUse if another command trains in its folder."""
    with adopted_orphans(), Stops() as stops:
        times = StartTimes()
        node = Node(job)
        try:
            settings = node.check(stops)
            if isinstance(settings, Status):
                return settings
            times.add("check")
            unknown = settings.shrink and job.module is None and not job.hosts
            if refused := job.missing or unknown * f"restart.shrink: {_UNKNOWN_HOSTS}":
                _tell(refused)
                return Status.REFUSED
            lease = Lease(settings.run_dir)
            try:
                return Supervisor(job, settings, lease, stops).run(node, times)
            finally:
                lease.release()
        finally:
            node.end()


class Stops:
    """Inside the block, signals that stop the run are kept. A second Ctrl-C insists.

    SIGUSR1, which a scheduler can send ahead of its limit, and SIGHUP, unless it is ignored, count as SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = 0  # SIGINT or SIGTERM
        self.insists = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.insists |= bool(self.asked) and number == signal.SIGINT
        self.asked = self.asked or (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class Node:
    """The process of `launch/node.py`, with a session of its own: the terminal's Ctrl-C reaches only the supervisor."""

    def __init__(self, job: Job) -> None:
        self.job = job
        theirs, self._write = os.pipe()
        self._read, writing = os.pipe()
        command = python("-m", "tiphys.launch.node", str(theirs), str(writing), str(os.getpid()))
        self.process = subprocess.Popen(
            [*command, "deepspeed.launcher.launch"],
            env=dict(job.environment),
            pass_fds=(theirs, writing),
            start_new_session=True,
        )
        os.close(theirs)
        os.close(writing)

    def check(self, stops: Stops) -> Settings | Status:
        """Let it check the recipe. A status if that failed, which was said, or was stopped."""
        answer = self._ask({"check": self.job.check}, stops)
        if answer is None:
            return stopped_by(stops.asked) if stops.asked else _status_of_check(self.process.wait())
        self.prepare()
        return Settings(**answer)

    def fit(self, world: int, each: int, stops: Stops, renew: Callable[[], None]) -> dict[str, Any]:
        """Ask for a layout on fewer ranks: the fields of `shrink.Fewer`, or `why` there is none. `each`: most ranks of a host."""
        check, before = self.job.check, self.job.world
        overrides = [word for word in self.job.ranks[1:] if not word.startswith("-")]
        asked = {"recipe": check["recipe"], "overrides": overrides, "world": world, "before": before, "each": each}
        return self._ask({"fit": asked}, stops, renew) or {"why": "the computation of a layout was stopped"}

    def prepare(self) -> None:
        """Let it import what it will need."""
        if self.job.module is not None:
            self._send({"import": True})

    def run(self, launch: Launch, token: str) -> None:
        """Start the ranks."""
        job, mine = self.job, option(launch, token)
        words = [*job.words, *job.packed([*job.ranks, mine])]
        self._send({"run": {"module": job.module, "words": words, "folder": job.folder}})

    def poll(self) -> int | None:
        return self.process.poll()

    def signal(self, number: int, launch: Launch) -> None:
        """Pass a signal on to the ranks of this machine. If it is to end them before there are any, end the launcher."""
        session = set(_members(self.process.pid))
        beats = [Beat.read(file) for file in sorted(launch.folder.glob("rank-*.beat"))]
        ranks = [beat.process for beat in beats if beat is not None and beat.process in session]
        if not ranks and number != STACKS:
            ranks, number = [self.process.pid], signal.SIGTERM
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """Kill all processes of its session."""
        for process in _members(self.process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of it, and wait until it is gone."""
        end = time.monotonic() + 30
        while (left := _members(self.process.pid)) and time.monotonic() < end:
            self.kill()
            self.process.poll()
            for process in left:
                if process != self.process.pid:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(process, os.WNOHANG)  # an orphan that was adopted
            time.sleep(0.02)
        self.process.poll()
        for handle in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(handle)
        self._read = self._write = -1

    def _ask(self, request: dict[str, Any], stops: Stops, renew: Callable[[], None] = lambda: None) -> Any:
        """Its answer; None if it has ended, or a signal came."""
        self._send(request)
        answer = b""
        while not answer.endswith(b"\n"):
            if stops.asked:
                return None
            renew()
            if select.select([self._read], [], [], _TICK)[0]:
                part = os.read(self._read, 1 << 16)
                if not part:
                    return None
                answer += part
        return json.loads(answer)

    def _send(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its status will say
            os.write(self._write, json.dumps(request).encode() + b"\n")


class Supervisor:
    """Launch after launch, until one needs no further one."""

    def __init__(self, job: Job, settings: Settings, lease: Lease, stops: Stops) -> None:
        self.job, self.settings, self.lease, self.stops = job, settings, lease, stops
        self.restarts = self.failures = 0
        self.blame = Blame()

    def run(self, node: Node, times: StartTimes) -> Status:
        """Returns the status of the command. The first launch uses `node`, which has checked the recipe."""
        while True:
            saved = newest(self.settings.run_dir)
            verdict = self._launch(node, times)
            if not verdict.failed:
                if verdict.why:
                    _tell(verdict.why)
                return verdict.status
            times = StartTimes()
            progress = newest(self.settings.run_dir) > saved
            self.blame.add(host_of(verdict.ranks, self.job.hosts), progress=progress)
            self.failures = 1 if progress else self.failures + 1
            if self.failures > self.settings.attempts:
                self._give_up(verdict)
                return Status.GAVE_UP
            self.restarts += 1
            _tell(restart_line(self.restarts, verdict, newest(self.settings.run_dir)))
            node.end()
            if self.settings.shrink and self.blame.times >= 2 and len(self.job.hosts) > 1:
                self._leave_out(self.blame.host)
            node = Node(self.job)
            try:
                node.prepare()
                if not self._pause(pause_after(self.failures)):
                    node.end()
                    return stopped_by(self.stops.asked)
                times.add("pause")
            except BaseException:
                node.end()
                raise

    def _launch(self, node: Node, times: StartTimes) -> Verdict:
        launch = Launch.new(self.settings.run_dir)
        times.leave(launch)
        self.lease.begin(launch.number)
        node.run(launch, self.lease.token)
        places = [name for name, count in self.job.hosts.items() for _ in range(count)]
        watchdog = Watchdog(launch, self.job.world, places=places)
        stalled, until = "", float("inf")
        try:
            while (code := node.poll()) is None:
                self.lease.renew()
                if self.stops.asked and until == float("inf"):
                    until = time.monotonic() + self.settings.deadline + GRACE
                    self.lease.stop(self.stops.asked)
                    node.signal(self.stops.asked, launch)
                if self.stops.insists or time.monotonic() > until:
                    node.kill()
                elif not stalled and watchdog.look():
                    self._ask_for_stacks(node, launch)
                    if stalled := watchdog.confirm():
                        _tell(stalled)
                        node.kill()
                time.sleep(_TICK)
        finally:
            node.end()
        watchdog.read()
        return judge(
            launch.reports(),
            code=code,
            world=self.job.world,
            asked=self.stops.asked,
            step=watchdog.step,
            saved=newest(self.settings.run_dir),
            stalled=stalled,
            stands=watchdog.named,
        )

    def _leave_out(self, host: str) -> None:
        """Go on without a host, if the run fits on the others."""
        left = {name: count for name, count in self.job.hosts.items() if name != host}
        node = Node(self.job)
        try:
            found = node.fit(sum(left.values()), max(left.values()), self.stops, self.lease.renew)
        finally:
            node.end()
        if self.stops.asked:
            return
        if "why" in found:
            _tell(f"host {host} failed {self.blame.times} times, but the run cannot go on without it: {found['why']}")
            return
        self.job = without_host(self.job, host, self.settings.run_dir, found["overrides"])
        _tell(f"host {host} failed {self.blame.times} times and is left out (restart.shrink): {found['said']}")
        self.blame = Blame()

    def _ask_for_stacks(self, node: Node, launch: Launch) -> None:
        """Let all ranks write the stacks of their threads, and give them the time. A stopped one cannot."""
        node.signal(STACKS, launch)
        self.lease.stop(STACKS)  # reaches those on other hosts
        time.sleep(STACK_TIME if self.job.module is not None else STACK_TIME + PERIOD)

    def _pause(self, seconds: float) -> bool:
        """False if a signal ended the pause."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stops.asked:
            self.lease.renew()
            time.sleep(min(_TICK, max(end - time.monotonic(), 0.0)))
        return not self.stops.asked

    def _give_up(self, verdict: Verdict) -> None:
        times = f"{self.failures} times" if self.failures > 1 else "once"
        _tell(
            f"{verdict.why}. The run failed {times} without a newer checkpoint, so it is not started again "
            f"(restart.attempts: {self.settings.attempts}); {resuming(newest(self.settings.run_dir))} with the same command"
        )


def restart_line(number: int, verdict: Verdict, saved: int) -> str:
    """`restart 3: rank 1 was killed (signal 9) at step 812; resuming from 800, 12 steps are done again`."""
    again = max(verdict.step - saved, 0)
    steps = f"{again} step{'' if again == 1 else 's'} {'is' if again == 1 else 'are'} done again"
    return f"restart {number}: {verdict.why}; {resuming(saved)}, {steps}"


def resuming(saved: int) -> str:
    return f"resuming from {saved}" if saved else "beginning again"


def pause_after(failures: int) -> float:
    """Seconds until the next launch: 1, 2, 4 … `LONGEST_PAUSE`, and up to a quarter less, so that runs do not start together."""
    return min(LONGEST_PAUSE, 2.0 ** (failures - 1)) * random.uniform(0.75, 1.0)


def newest(run_dir: str | Path) -> int:
    """Step of the newest whole checkpoint of a run; 0: there is none."""
    return next((int(manifest["step"]) for _, manifest in checkpoint_files.whole(run_dir)), 0)


def _tell(text: str) -> None:
    say(f"tiphys: {text}", error=True)


def _status_of_check(code: int) -> Status:
    try:
        return Status(code) if code else Status.CRASHED
    except ValueError:  # it was killed, so it has said nothing
        _tell(f"the check of the recipe was killed (signal {-code})")
        return Status.GAVE_UP


def _members(session: int) -> list[int]:
    """Processes of a session that have not ended, and those that have ended without being waited for."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and not (fields[0] == "Z" and int(fields[1]) != os.getpid()):
                    found.append(int(name))
    return found
