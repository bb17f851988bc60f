"""What happens beside the loop, at its stages: checkpoints, metrics, progress, validation, evaluation, publication.

Stages: `on_start` once training can begin (after a resume), `on_step` after every step, `on_checkpoint` when one is whole
(on rank 0 alone), `on_end` after the last step or a stop, `close` at last, after an error too. All ranks run the same
callbacks in the same order; what is collective in one must be reached by all.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tiphys.pretrain import checkpoint_files
from tiphys.pretrain.checkpoint import Writer
from tiphys.pretrain.metrics import Smoothed, StepMetrics

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.pretrain.trainer import Trainer


class Callback:
    """Does nothing at every stage."""

    def on_start(self, trainer: Trainer) -> None: ...
    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None: ...
    def on_checkpoint(self, trainer: Trainer, folder: Path, step: int) -> None: ...
    def on_end(self, trainer: Trainer) -> None: ...
    def close(self, trainer: Trainer) -> None: ...


@dataclass(frozen=True)
class Every:
    """A clock: true at every n-th step; 0 never."""

    steps: int

    def __call__(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0


class Checkpointer(Callback):
    """Saves every n steps and at the end, keeps the newest few.

    also    further clocks at which a checkpoint is wanted (an evaluation's, a publication's)
    """

    def __init__(
        self, run_dir: str | Path, every: int, keep: int = 3, *, asynchronous: bool = True, also: Sequence[Every] = ()
    ) -> None:
        self.run_dir, self.keep, self.asynchronous = Path(run_dir), keep, asynchronous
        self.clocks = (Every(every), *also)
        self.protected: dict[Path, int] = {}
        self._saved = -1
        self._committed: list[Path] = []

    def on_start(self, trainer: Trainer) -> None:
        launch = str(trainer.world.gather(secrets.token_hex(8))[0])
        self.writer = Writer(self.run_dir, launch, asynchronous=self.asynchronous)
        if trainer.resumed is not None:
            self._saved = trainer.step

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.writer.check()
        if any(clock(trainer.step) for clock in self.clocks):
            self.save(trainer)
        self._tell(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._saved != trainer.step:
            self.save(trainer)
        self.writer.wait()
        self._tell(trainer)
        if trainer.stopped and trainer.world.rank == 0:
            print(f"stopped after step {trainer.step}, which is saved; the same command resumes from there", flush=True)

    def save(self, trainer: Trainer) -> None:
        self.writer.save(trainer.engine, trainer.state(), self._committed.append)
        self._saved = trainer.step

    def protect(self, folder: Path) -> Callable[[], None]:
        """Keep a checkpoint from being removed until the returned function is called."""
        self.protected[folder] = self.protected.get(folder, 0) + 1

        def release() -> None:
            self.protected[folder] -= 1
            if not self.protected[folder]:
                del self.protected[folder]

        return release

    def _tell(self, trainer: Trainer) -> None:
        while self._committed:
            folder = self._committed.pop(0)
            if trainer.world.rank == 0:
                trainer.saved(folder, checkpoint_files.step_of(folder))
                checkpoint_files.prune(self.run_dir, self.keep, frozenset(self.protected))


class MetricsWriter(Callback):
    """`metrics.jsonl` and TensorBoard under the run's folder, by rank 0.

    A training line has `step` and `loss` (of the global batch); other lines say what they are under `kind`. After a resume,
    lines of steps that are done again are dropped.
    """

    def __init__(
        self, run_dir: str | Path, every: int = 1, tasks: Sequence[str] = (), *, tensorboard: bool = True
    ) -> None:
        self.folder, self.clock, self.tasks = Path(run_dir), Every(every), tuple(tasks)
        self.tensorboard, self.experts = tensorboard, Every(max(50, every))
        self._file: Any = None
        self._board: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _drop_later(path, trainer.step)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed at the end)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.step + 1)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._file is None:
            return
        step, last = metrics.result.step, metrics.result.step == trainer.steps
        if self.clock(step) or last:
            self.write(metrics.to_json(self.tasks))
        if (self.experts(step) or last) and metrics.result.task_counts.size:
            by_task = {t: c.astype(int).tolist() for t, c in zip(self.tasks, metrics.result.task_counts.swapaxes(0, 1))}
            self.write({"kind": "experts", "step": step, "tokens_by_task": by_task})

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, and its numbers to TensorBoard. Nothing on other ranks than 0."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None and "step" in line:
            prefix = f"{line['kind']}/" if "kind" in line else "train/"
            for name, value in _numbers(line):
                if name not in ("step",):
                    self._board.add_scalar(prefix + name, value, line["step"])

    def close(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()


class Progress(Callback):
    """A bar on a terminal, plain lines elsewhere, by rank 0: loss, tokens/s, MFU, data wait, cache hits, ETA."""

    def __init__(self, *, terminal: bool | None = None, seconds: float = 2.0) -> None:
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.seconds, self._printed = seconds, float("-inf")
        self.rate, self.speed, self.wait = Smoothed(), Smoothed(), Smoothed()
        self._bar: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self.speaks = trainer.world.rank == 0
        if self.speaks and trainer.resumed is not None:
            print(f"resumed from {trainer.resumed.path} after step {trainer.step}", flush=True)
        if self.speaks and self.terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._task = self._bar.add_task("", total=trainer.steps, completed=trainer.step)
            self._bar.start()

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        seconds = self.rate.add(metrics.seconds)
        self.speed.add(metrics.tokens_per_second)
        self.wait.add(metrics.wait)
        if not self.speaks:
            return
        text = self.describe(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.step, description=text)
            return
        now = time.monotonic()
        if now - self._printed >= self.seconds or trainer.step == trainer.steps:
            self._printed = now
            left = _duration((trainer.steps - trainer.step) * seconds)
            print(f"step {trainer.step}/{trainer.steps}  {text}  ETA {left}", flush=True)

    def describe(self, metrics: StepMetrics) -> str:
        """Rates are means over the last steps; the loss is this step's."""
        share = self.wait.value / self.rate.value
        mfu = metrics.result.flops / (self.rate.value * metrics.peak) if metrics.peak else 0.0
        text = (
            f"loss {metrics.result.loss:.4f}  {_short(self.speed.value)} tokens/s  MFU {mfu:.1%}  data wait {share:.1%}"
        )
        hits = metrics.counters.get("cache_hit_rate")
        return text if hits is None else f"{text}  cache {hits:.0%}"

    def close(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()


class Validator(Callback):
    """Loss on held-out rows, every n steps and at the end, on all ranks together.

    batches    gives this rank's held-out batches; called once, when first needed; every rank must have as many
    """

    def __init__(self, every: int, batches: Callable[[], Iterable[TokenBatch]], write: MetricsWriter | None) -> None:
        self.clock, self._load, self._writer = Every(every), batches, write
        self._batches: list[TokenBatch] | None = None
        self._done = -1

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.clock(trainer.step) or (trainer.step == trainer.steps and self._done != trainer.step):
            self.run(trainer)

    def run(self, trainer: Trainer) -> None:
        from tiphys.pretrain.validate import validate

        if self._batches is None:
            self._batches = list(self._load())
        result = validate(trainer.engine, self._batches)
        self._done = trainer.step
        if trainer.world.rank == 0:
            tasks = self._writer.tasks if self._writer is not None else ()
            line = {"kind": "validation", "step": trainer.step, **result.to_json(tasks)}
            print(f"step {trainer.step}  held-out loss {result.loss:.4f}", flush=True)
            if self._writer is not None:
                self._writer.write(line)


class Running(Protocol):
    """Work outside this process: `poll()` is None while it runs, then its exit status."""

    def poll(self) -> int | None: ...


class Evaluator(Callback):
    """Starts an evaluation of a checkpoint in its own process; one at a time, training does not wait.

    start    start(checkpoint folder, step) -> a handle with `poll()`
    """

    def __init__(self, every: int, start: Callable[[Path, int], Running], checkpointer: Checkpointer) -> None:
        self.clock, self.start, self.checkpointer = Every(every), start, checkpointer
        self._running: tuple[Running, Callable[[], None], int] | None = None

    def on_checkpoint(self, trainer: Trainer, folder: Path, step: int) -> None:
        if (
            not self.clock(step) or step == trainer.steps
        ):  # the last one is evaluated after training, by whoever waits for it
            return
        self._collect()
        if self._running is not None:
            print(
                f"step {step}: the evaluation of step {self._running[2]} still runs; this one is left out", flush=True
            )
            return
        release = self.checkpointer.protect(folder)
        self._running = (self.start(folder, step), release, step)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._collect()

    def on_end(self, trainer: Trainer) -> None:
        while self._running is not None:
            self._collect()
            time.sleep(0.05)

    def _collect(self) -> None:
        if self._running is None:
            return
        handle, release, step = self._running
        status = handle.poll()
        if status is not None:
            release()
            self._running = None
            if status:
                print(f"the evaluation of step {step} failed with status {status}; training goes on", flush=True)


class Publisher(Callback):
    """Calls publish(checkpoint folder, step) in a thread, every n steps; an error there is told and does not stop training."""

    def __init__(self, every: int, publish: Callable[[Path, int], None], checkpointer: Checkpointer) -> None:
        self.clock, self.publish, self.checkpointer = Every(every), publish, checkpointer
        self._thread: threading.Thread | None = None

    def on_checkpoint(self, trainer: Trainer, folder: Path, step: int) -> None:
        if (
            not self.clock(step) or step == trainer.steps
        ):  # the last one is published after training, with its evaluation
            return
        if self._thread is not None and self._thread.is_alive():
            print(f"step {step}: the publication before still runs; this one is left out", flush=True)
            return
        release = self.checkpointer.protect(folder)
        self._thread = threading.Thread(target=self._run, args=(folder, step, release), name="publish")
        self._thread.start()

    def _run(self, folder: Path, step: int, release: Callable[[], None]) -> None:
        try:
            self.publish(folder, step)
        except Exception as error:
            print(f"step {step} was not published: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            release()

    def on_end(self, trainer: Trainer) -> None:
        if self._thread is not None:
            self._thread.join()


def _drop_later(path: Path, step: int) -> None:
    """Keep the lines up to `step`, and none that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except ValueError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _numbers(line: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
