"""Evaluation and publication beside training: the trainer's side of `launch/side_process.py`.

The training thread only appends a line to a queue, protects the checkpoint, and reads answers between two steps. The queue,
`<run.dir>/aside/queue.jsonl`, tells a resumed run which jobs were not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import to_json, write_json, write_text
from tiphys.dataio.messages import counted, printable, redacted, say
from tiphys.dataio.python_path import child_environment, python
from tiphys.launch.side_process import POLICY
from tiphys.pretrain.callbacks.base import Callback, Every
from tiphys.pretrain.checkpoint_files import MANIFEST, CheckpointError, folder_of, read_json

if TYPE_CHECKING:
    from tiphys.pretrain.callbacks.checkpointer import Checkpointer
    from tiphys.pretrain.callbacks.metrics_writer import MetricsWriter
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer

SIDE = ("-m", "tiphys.launch.side_process")
QUEUE = "aside/queue.jsonl"
WAITING = 2  # jobs that wait while another one is done; each protects a checkpoint
SILENCE = 60.0  # seconds without a sign of life after which the side process counts as hung
ATTEMPTS = 2  # times that a job may be begun
LONGEST_PAUSE = 300.0  # seconds before a side process that keeps ending is started again
# What the launcher tells a rank about the other ranks. A process outside the training must not see it.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@dataclass
class Queued:
    """A checkpoint that is evaluated or published.

    save      identifies the save: a step that was done again has another checkpoint
    todo      tasks that are left: evaluate, publish
    evaluated whether this checkpoint has been evaluated
    release   ends the protection of the checkpoint; does nothing the second time
    attempts  how often it was begun
    """

    step: int
    save: str
    todo: list[str]
    release: Callable[[], None] = lambda: None
    evaluated: bool = False
    begun: bool = False
    attempts: int = 0


@dataclass
class Pipe:
    """The side process, with pipes that never block the trainer."""

    process: subprocess.Popen[bytes]
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""

    @classmethod
    def start(cls, run_dir: Path) -> Pipe:
        environment = {k: v for k, v in child_environment().items() if k not in RANK_VARIABLES}
        command = python(*SIDE, str(run_dir))
        # a session of its own: Ctrl-C does not reach it, and its group can be ended as a whole
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return cls(process)

    def say(self, command: Mapping[str, Any]) -> None:
        """Send a command. If the pipe is full or broken, the process is hung or gone, and `alive` will say so."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), json.dumps(command).encode() + b"\n")

    def answers(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        assert self.process.stdout is not None
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.process.stdout.fileno(), 1 << 16):
                data += part
        if data:
            self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a library may print
                found.append(json.loads(line))
        return [answer for answer in found if isinstance(answer, dict)]

    def problem(self) -> str:
        """Why it does not work any more; empty if it does."""
        status = self.process.poll()
        if status is not None:
            return f"ended with status {status}"
        silent = time.monotonic() - self.heard
        return f"has given no sign of life for {silent:.0f} s" if silent > SILENCE else ""

    def end(self) -> None:
        """End it and everything that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Aside(Callback):
    """Rank 0 hands checkpoints to the side process, and writes its results into metrics.jsonl, with the step of the checkpoint.

    The newest checkpoint goes first. If more than `WAITING` wait, the oldest is left out. Nothing that happens to the side
    process stops training: one that ends or hangs is started again.

    Parameters
    ----------
    run_dir : str or Path
    evaluate, publish : Every
        The steps whose checkpoints are evaluated, and published.
    policy : callable
        Returns config and processor of the run's policies, as JSON.
    checkpointer : Checkpointer
    writer : MetricsWriter
    evaluates_published : bool
        Also evaluate what is published, because only a better policy is.
    """

    def __init__(
        self,
        run_dir: str | Path,
        evaluate: Every,
        publish: Every,
        policy: Callable[[], dict[str, Any]],
        checkpointer: Checkpointer,
        writer: MetricsWriter,
        *,
        evaluates_published: bool = False,
    ) -> None:
        self.run_dir, self.clocks, self.policy = Path(run_dir), {"evaluate": evaluate, "publish": publish}, policy
        self.checkpointer, self.writer, self.evaluates_published = checkpointer, writer, evaluates_published
        self.jobs: dict[int, Queued] = {}
        self._pipe: Pipe | None = None
        self._again, self._pause, self._finished = 0.0, 1.0, False
        checkpointer.listen(self._checkpointed)

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.rank:
            return
        write_json(self.run_dir / POLICY, self.policy())
        for job in unfinished(self.run_dir, trainer.step):
            job.release = self._protect(folder_of(self.run_dir, job.step))
            self.jobs[job.step] = job
        lines = [self._line(job) for job in self.jobs.values()]
        write_text(self.run_dir / QUEUE, "".join(line + "\n" for line in lines))
        self._start()

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.attend()

    def on_end(self, trainer: Trainer) -> None:
        self._finished = not trainer.stopped

    def close(self, trainer: Trainer) -> None:
        """A run that has done all its steps still waits for its jobs (`drain`), after the other ranks have ended."""
        if not self._finished:
            self.end()

    def drain(self) -> None:
        """Wait until all jobs are done. Each has a limit of time (`evaluate.minutes`)."""
        try:
            while self.jobs and (self._pipe is not None or self._again):
                self.attend()
                time.sleep(0.1)
        finally:
            self.end()

    def end(self) -> None:
        """End the side process at once. Jobs that are not finished stay in the queue, for a resumed run."""
        if self._pipe is not None:
            self._pipe.end()
            self._pipe = None

    def attend(self) -> None:
        """Take the answers that have come; start the side process again if it ended or hangs."""
        if self._pipe is None:
            if self._again and time.monotonic() >= self._again:
                self._start()
            return
        for answer in self._pipe.answers():
            job = self.jobs.get(answer.get("step", -1))
            if job is not None:
                self._heard(job, answer)
        if problem := self._pipe.problem():
            self._restart(problem)

    def _checkpointed(self, trainer: Trainer, folder: Path, step: int) -> None:
        todo = [task for task, clock in self.clocks.items() if clock(step)]
        if not todo or step == trainer.steps:  # the last checkpoint is evaluated and published after training
            return
        if todo == ["publish"] and self.evaluates_published:
            todo = ["evaluate", "publish"]
        job = Queued(step, _save(folder), todo, self._protect(folder))
        self.jobs[step] = job
        self._append(self._line(job))
        self._send(job)
        waiting = sorted(step for step, job in self.jobs.items() if not job.begun)
        for old in waiting[:-WAITING]:
            if self._pipe is not None:
                self._pipe.say({"withdraw": old})
            self._finish(self.jobs[old])
            say(f"step {old}: neither evaluated nor published, because newer checkpoints go first")

    def _heard(self, job: Queued, answer: Mapping[str, Any]) -> None:
        event = answer.get("event")
        self._pause = 1.0
        if event == "begun":
            job.begun = True
            job.attempts += 1
        elif event == "exported":
            job.release()
        elif event == "evaluated":
            self._done(job, "evaluate")
            tasks = {name: _scores(found) for name, found in answer["result"]["tasks"].items()}
            self.writer.write(
                {"kind": "evaluation", "step": job.step, "seconds": round(answer["seconds"], 1), "tasks": tasks}
            )
            known = [t["expert_normalized"] for t in tasks.values() if t["expert_normalized"] is not None]
            mean = f", normalised score {sum(known) / len(known):.2f}" if known else ""
            say(f"step {job.step}  evaluated: {counted(len(tasks), 'task')}{mean}")
        elif event == "published":
            self._done(job, "publish")
            said = printable(" ".join(answer["said"].split()))
            self.writer.write({"kind": "publication", "step": job.step, "said": said})
            say(f"step {job.step}  {said}")
        elif event == "failed":
            self._failed(job, answer["task"], answer["why"])
        elif event == "finished":
            self._finish(job)

    def _failed(self, job: Queued, task: str, why: str) -> None:
        why = redacted(printable(why))
        self.writer.write({"kind": "aside", "step": job.step, "failed": task, "why": why})
        say(f"step {job.step}: {_FAILED[task]}: {why}; training continues")

    def _done(self, job: Queued, task: str) -> None:
        job.todo = [other for other in job.todo if other != task]
        job.evaluated = job.evaluated or task == "evaluate"
        self._append(to_json({"step": job.step, "save": job.save, "done": task}))

    def _finish(self, job: Queued) -> None:
        job.release()
        self.jobs.pop(job.step, None)
        self._append(to_json({"step": job.step, "save": job.save, "finished": True}))

    def _start(self) -> None:
        self._again = 0.0
        try:
            self._pipe = Pipe.start(self.run_dir)
        except OSError as error:
            self._later(f"cannot be started ({error})")
            return
        for job in self.jobs.values():
            self._send(job)

    def _restart(self, problem: str) -> None:
        self.end()
        for job in [job for job in self.jobs.values() if job.begun]:
            job.begun = False
            if job.attempts >= ATTEMPTS or not (folder_of(self.run_dir, job.step) / MANIFEST).is_file():
                self._failed(job, job.todo[0], f"the side process {problem}")
                self._finish(job)
        self._later(problem)

    def _later(self, problem: str) -> None:
        """Start the side process again after a pause, which doubles each time."""
        say(f"the side process {problem}; it is started again in {self._pause:.0f} s. Training continues")
        self._again = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _send(self, job: Queued) -> None:
        if self._pipe is not None:
            self._pipe.say({"job": job.step, "do": job.todo, "evaluated": job.evaluated})

    def _protect(self, folder: Path) -> Callable[[], None]:
        release: Callable[[], None] | None = self.checkpointer.protect(folder)

        def once() -> None:
            nonlocal release
            if release is not None:
                release()
                release = None

        return once

    def _line(self, job: Queued) -> str:
        return to_json({"step": job.step, "save": job.save, "todo": job.todo, "evaluated": job.evaluated})

    def _append(self, line: str) -> None:
        """Add a line to the queue. If that is impossible (a full disk), only a resumed run would miss it."""
        with contextlib.suppress(OSError), open(self.run_dir / QUEUE, "a", encoding="utf-8") as file:
            file.write(line + "\n")


_FAILED = {"export": "not exported", "evaluate": "not evaluated", "publish": "not published"}


def unfinished(run_dir: Path, step: int) -> list[Queued]:
    """The jobs of the queue that are not finished, of checkpoints up to `step` that still exist. The newest ones, oldest first.

    A checkpoint after `step` belongs to steps that are done again.
    """
    jobs: dict[int, Queued] = {}
    file = run_dir / QUEUE
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a crash cut the line off
            line = json.loads(text)
            if "todo" in line:
                todo = [str(task) for task in line["todo"]]
                jobs[line["step"]] = Queued(int(line["step"]), str(line["save"]), todo, evaluated=line["evaluated"])
            elif "done" in line:
                jobs[line["step"]].todo.remove(line["done"])
                jobs[line["step"]].evaluated |= line["done"] == "evaluate"
            else:
                jobs.pop(line["step"], None)
    left = [job for _, job in sorted(jobs.items()) if job.step <= step and job.todo]
    return [job for job in left if _save(folder_of(run_dir, job.step)) == job.save][-WAITING:]


def _save(folder: Path) -> str:
    """What identifies the save of a checkpoint; empty if there is none."""
    try:
        return str(read_json(folder / MANIFEST).get("save", ""))
    except CheckpointError:
        return ""


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a task, without pictures."""
    return {name: value for name, value in found.items() if name != "pictures"}
