"""A run whose processes are killed at random until it is done.

    python -m tests.chaos --every 60 quickstart train.steps=700
    python -m tests.chaos --every 60 train my-recipe.yaml checkpoint.minutes=0.1

Every so many seconds it kills (SIGKILL) a rank or the launcher of the run; never the supervisor, which has to bring the run to
its end. Then it says which share of the steps and of the time was useful, and what ate the rest. Its exit status is that of the
run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.processes import environment


class Chaos:
    """Kills processes of a running command, and reads what it says.

    Attributes
    ----------
    lines : list of (float, str)
        When a line came, and what it said.
    kills : list of float
        When processes were killed.
    """

    def __init__(self, words: Sequence[str], every: float, seed: int = 0, cwd: Path | None = None) -> None:
        self.every, self.random = every, random.Random(seed)
        self.lines: list[tuple[float, str]] = []
        self.kills: list[float] = []
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tiphys", *words],
            env=environment(),
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, limit: float = float("inf")) -> int:
        """Kill until the command has ended. Returns its status."""
        following = self.every
        while self.process.poll() is None:
            now = time.monotonic() - self.began
            if now > limit:
                self.process.kill()
            if now >= following:
                following += self.every
                self._kill()
            time.sleep(0.05)
        self._reader.join()
        return int(self.process.returncode)

    def report(self, steps: int) -> str:
        """What was useful, for a run of so many steps."""
        whole = max(time.monotonic() - self.began, 1e-9)
        again = sum(int(n) for _, line in self.lines for n in re.findall(r"(\d+) steps? (?:is|are) done again", line))
        restarts = [
            at for at, line in self.lines if ("restart " in line and "resuming" in line) or "beginning again" in line
        ]
        eaten: Counter[str] = Counter()
        for kill in self.kills:
            found = next((at for at in restarts if at >= kill), None)
            eaten["detect"] += (found - kill) if found is not None else 0.0
        for _, line in self.lines:
            if line.startswith("start "):
                eaten.update(
                    {name: float(s) for name, s in re.findall(r"([a-z ]+) (\d+\.\d)(?:,|$)", line.partition(": ")[2])}
                )
        parts = ", ".join(f"{name.strip()} {seconds:.1f}" for name, seconds in eaten.most_common())
        return (
            f"chaos: {len(self.kills)} kills, {len(restarts)} restarts, {whole:.0f} s; {steps / max(steps + again, 1):.0%} of "
            f"the steps were useful, at most {1 - sum(eaten.values()) / whole:.0%} of the time; seconds lost: {parts}"
        )

    def _kill(self) -> None:
        with_rank = []
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if any(word in " ".join(child.cmdline()) for word in ("tiphys.launch.train", "tiphys.launch.node")):
                    with_rank.append(child)
        except psutil.Error:
            return
        if len(with_rank) > 1:  # between two launches there is nothing to kill
            victim = self.random.choice(with_rank)
            self.kills.append(time.monotonic())
            print(f"chaos: kills process {victim.pid}", flush=True)
            os.kill(victim.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))
            print(line, end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command of tiphys and kill its processes until it is done.")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args, words = parser.parse_known_args()
    chaos = Chaos(words, args.every, args.seed)
    status = chaos.run()
    steps = max((int(n) for _, line in chaos.lines for n in re.findall(r"^step (\d+)/", line)), default=0)
    print(chaos.report(steps), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
