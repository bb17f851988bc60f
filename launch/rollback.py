"""Goes back to a checkpoint from before a spike, and skips the rows of the bad steps.

The steps of a spike are done: their updates are in the weights. So the run continues from the last trusted checkpoint, and an
event `skip` of the plan's log leaves out the rows of the bad steps. It moves the rows, not the schedule: step 500 still has the
learning rate of step 500.

`<run.dir>/rollbacks.jsonl` has a line for each rollback. It is on disk before anything else changes, so a crash at any moment
leaves a run that does the same again: same recipe and same lines, same bits.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import counted, say
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.health import TRUST, Spike
from tiphys.pretrain.trainer import Diverged

if TYPE_CHECKING:
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.callbacks.checkpointer import Checkpointer
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer

ROLLBACKS = "rollbacks.jsonl"
NAMED = 8  # episodes that a message names


@dataclass(frozen=True)
class Rollback:
    """One rollback.

    first, last  the bad steps, counted from 1
    to           step of the checkpoint from which the run continues; 0: from the beginning
    log          the events of the plan's log from then on
    episodes     those of the bad steps, as `entry episode-id`, of the tasks whose loss stood out
    """

    first: int
    last: int
    to: int
    log: list[dict[str, Any]]
    episodes: list[str]


def read(run_dir: str | Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. A last line that a crash cut off does not count.

    Raises DataError if another line is damaged.
    """
    file, found = Path(run_dir) / ROLLBACKS, []
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else [""]
    for number, text in enumerate(lines[:-1], 1):
        try:
            found.append(Rollback(**json.loads(text)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{file}, line {number}: not a rollback ({error}); restore the line, or use another run.dir"
            ) from None
    return found


def complete(run_dir: str | Path) -> list[dict[str, Any]]:
    """Finish a rollback that a crash may have cut off: remove the checkpoints that it leaves behind. On one rank, before a
    checkpoint is chosen. Returns the events for the plan's log; empty if the run never went back.
    """
    rollbacks = read(run_dir)
    if not rollbacks:
        return []
    for _, folder in files.folders(run_dir):
        if files.step_of(folder) > rollbacks[-1].to and not _knows(folder, rollbacks[-1].log):
            files.remove(folder)
    return rollbacks[-1].log


def _knows(folder: Path, log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint was written after a rollback: the plan's log in it has the skip that the rollback added."""
    with suppress(files.CheckpointError, KeyError, TypeError):
        return log[-1] in files.read_json(folder / files.STATE)["loader"]["log"]
    return False


class Guard(Callback):
    """Keeps a trusted checkpoint beyond `checkpoint.keep`, and prepares the rollback when there is a spike.

    Parameters
    ----------
    run_dir : str or Path
    most : int
        Rollbacks without getting past the bad steps, after which the run gives up.
    checkpointer : Checkpointer
    plan : SamplingPlan
    tasks : sequence of str
        Names of the tasks, by number.
    """

    def __init__(
        self, run_dir: str | Path, most: int, checkpointer: Checkpointer, plan: SamplingPlan, tasks: Sequence[str]
    ) -> None:
        self.run_dir, self.most, self.checkpointer, self.plan, self.tasks = (
            Path(run_dir),
            most,
            checkpointer,
            plan,
            tasks,
        )
        self._known: dict[int, Path] = {}  # checkpoints that are protected, and newer ones
        self._held: dict[int, Callable[[], None]] = {}
        checkpointer.listen(self._checkpointed)

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.rank == 0:
            self._known = {files.step_of(folder): folder for folder, _ in files.whole(self.run_dir)}
            self._protect(trainer)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.world.rank == 0:
            self._protect(trainer)

    def on_spike(self, trainer: Trainer, spike: Spike) -> None:
        with suppress(files.CheckpointError, OSError):  # a save that failed leaves nothing to go back to
            self.checkpointer.writer.wait()  # nothing may be committed after the newer checkpoints are removed
        trainer.world.barrier()
        message = self._go_back(trainer, spike) if trainer.world.rank == 0 else ""
        if message := str(trainer.world.gather(message)[0]):
            raise Diverged(message)

    def _checkpointed(self, trainer: Trainer, folder: Path, step: int) -> None:
        # others may be removed from now on: by the checkpointer, which keeps the newest ones
        self._known = {known: path for known, path in self._known.items() if known in self._held} | {step: folder}

    def _protect(self, trainer: Trainer) -> None:
        """Protect the newest trusted checkpoint, and one later checkpoint until it is trusted and takes its place."""
        trusted = [step for step in self._known if trainer.health.trusts(step)]
        later = [step for step in self._known if not trainer.health.trusts(step)]
        waiting = [step for step in later if step in self._held] or later
        wanted = {max(steps) for steps in (trusted, waiting) if steps}
        for step in wanted - self._held.keys():
            self._held[step] = self.checkpointer.protect(self._known[step])
        for step in self._held.keys() - wanted:
            self._held.pop(step)()

    def _go_back(self, trainer: Trainer, spike: Spike) -> str:
        """Write the rollback, then remove what it leaves behind. Returns why it gives up instead, or nothing."""
        before = read(self.run_dir)
        failed = chain(before, spike)
        episodes = self._episodes(spike)
        if len(failed) >= self.most:
            for step, folder in files.folders(self.run_dir):
                if step >= spike.first:
                    files.remove(folder)
            return given_up(spike, failed, episodes)
        to = self._target(trainer, spike, failed)
        first = max(spike.first - 1, to)  # steps of the plan are counted from 0
        skip = {"kind": "skip", "step": first, "steps": spike.last - first}
        log = [*trainer.state()["loader"].get("log", []), skip]
        line = Rollback(spike.first, spike.last, to, log, episodes)
        append(self.run_dir, line)
        complete(self.run_dir)
        where = f"the checkpoint of step {to}" if to else "the beginning"
        say(
            f"step {spike.last}: {spike.why}. Going back to {where}; the rows of "
            f"{counted(spike.last - first, 'step')}, from step {first + 1} on, are skipped, the schedule is not "
            f"(rollback {len(failed) + 1} of at most {self.most})"
        )
        return ""

    def _target(self, trainer: Trainer, spike: Spike, failed: Sequence[Rollback]) -> int:
        """The newest trusted checkpoint. If none is trusted yet, the newest one from before the spike that was not tried."""
        steps = [files.step_of(folder) for folder, _ in files.whole(self.run_dir)]
        trusted = max((step for step in steps if trainer.health.trusts(step)), default=-1)
        tried = {rollback.to for rollback in failed}
        return max([0, trusted, *(step for step in steps if trusted < 0 and step < spike.first and step not in tried)])

    def _episodes(self, spike: Spike) -> list[str]:
        names = {self.tasks[task] for task in spike.tasks if task < len(self.tasks)}
        found: Counter[str] = Counter()
        for step in range(spike.first - 1, spike.last):
            windows = self.plan.windows(step)
            for e, t, episode in zip(
                windows.entry.tolist(), windows.task.tolist(), windows.episode.tolist(), strict=True
            ):
                entry = self.plan.entries[e]
                if not names or entry.index.tasks[t].name in names:
                    found[f"{entry.name} {entry.index.id(episode)}"] += 1
        return [name for name, _ in found.most_common()]


def chain(rollbacks: Sequence[Rollback], spike: Spike) -> list[Rollback]:
    """The last rollbacks that did not help: after each, the next spike came before `TRUST` healthy steps were past it."""
    found: list[Rollback] = []
    first = spike.first
    for rollback in reversed(rollbacks):
        if first > rollback.last + TRUST:
            break
        found.insert(0, rollback)
        first = rollback.first
    return found


def append(run_dir: Path, rollback: Rollback) -> None:
    """Add a line; it is on disk when this returns. A line that a crash cut off is ended first."""
    line = to_json(vars(rollback)).encode() + b"\n"
    with open(run_dir / ROLLBACKS, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def given_up(spike: Spike, failed: Sequence[Rollback], episodes: Sequence[str]) -> str:
    """The last message of a run that does not get past its bad steps."""
    tried = f"{len(failed)} rollbacks did not get past it" if failed else "train.rollbacks is 0"
    seen = Counter(
        name for names in [episodes, *(rollback.episodes for rollback in failed)] for name in dict.fromkeys(names)
    )
    names = [name for name, _ in seen.most_common(NAMED)]
    more = f" and {len(seen) - NAMED} more" if len(seen) > NAMED else ""
    return (
        f"step {spike.last}: {spike.why}; {tried}. No checkpoint of these steps was kept. "
        f"Candidates for quarantine, episodes of steps {spike.first} to {spike.last}: {', '.join(names)}{more}. "
        "Look at them with `tiphys inspect`, lower the learning rate, or clip gradients (deepspeed.gradient_clipping)"
    )
