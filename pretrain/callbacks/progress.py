"""How far training is, for a person."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.metrics import Smoothed

if TYPE_CHECKING:
    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer


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


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
