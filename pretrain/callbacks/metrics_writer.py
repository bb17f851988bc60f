"""Writes `metrics.jsonl` and TensorBoard files."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import to_json, write_text
from tiphys.pretrain.callbacks.base import Callback, Every

if TYPE_CHECKING:
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer


_MOST_WAITING = 64 << 20  # bytes of lines that wait for a full disk


class MetricsWriter(Callback):
    """Rank 0 writes `metrics.jsonl` and TensorBoard files in the run's folder.

    A line of a training step has `step` and `loss` (of the global batch), and no `kind`; all other lines have a `kind`. When
    a run resumes, the lines of the steps that it repeats are removed. A line may come late, such as that of an evaluation: what
    counts is its `step`, not its place.
    """

    def __init__(
        self, run_dir: str | Path, every: int = 1, tasks: Sequence[str] = (), *, tensorboard: bool = True
    ) -> None:
        self.folder, self.clock, self.tasks = Path(run_dir), Every(every), tuple(tasks)
        self.tensorboard, self.experts = tensorboard, Every(max(50, every))
        self._file: Any = None
        self._waiting = bytearray()
        self._board: Any = None
        self._writes = False  # only rank 0 does, also after training

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.rank:
            return
        self._writes = True
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _drop_later(path, trainer.step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed at the end)
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

    def on_change(self, trainer: Trainer, events: Sequence[dict[str, Any]]) -> None:
        for event in events if self._file is not None else ():
            # `step`: steps done when this step ends, so that a resume keeps the lines of what its checkpoint contains
            self._append(json.dumps({"kind": "change", "step": trainer.step, "event": event}))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, and send its numbers to TensorBoard. Does nothing on ranks other than 0."""
        if not self._writes:
            return
        if self._file is not None:
            self._append(to_json(line))
        else:  # the result of something that ran beside training and ended after it
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")
        if self._board is not None and "step" in line:
            prefix = f"{line['kind']}/" if "kind" in line else "train/"
            for name, value in numbers(line):
                if name != "step":
                    with suppress(OSError):  # a full disk
                        self._board.add_scalar(prefix + name, value, line["step"])

    def _append(self, line: str) -> None:
        """Add a line to the file. While the disk is full, lines wait in memory."""
        self._waiting += line.encode() + b"\n"
        try:
            written = self._file.write(self._waiting) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(self._waiting) > _MOST_WAITING:
                raise
        else:
            del self._waiting[:written]

    def close(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
            self._board = None


def _drop_later(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a line that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, AttributeError, TypeError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def numbers(line: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """(name, value) of the numbers of a line; the names of nested ones are joined by `/`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
