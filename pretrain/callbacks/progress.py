"""Shows a person how far training is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import say
from tiphys.dataio.plan.log import described
from tiphys.pretrain.callbacks.base import Callback
from tiphys.pretrain.metrics import Smoothed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from tiphys.pretrain.metrics import StepMetrics
    from tiphys.pretrain.trainer import Trainer

SHORTEST_BAR, LONGEST_BAR = 10, 40  # terminal columns


class Progress(Callback):
    """Rank 0 shows a line that is updated in place on a terminal, or prints plain lines elsewhere.

    The line has step, ETA, loss, tokens/s, data wait, MFU and cache hits. Rates are means over the last steps; the loss is
    that of the last step. A terminal also has a bar, and lacks the last items if it is narrow.
    """

    def __init__(self, *, terminal: bool | None = None, seconds: float = 2.0) -> None:
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.seconds, self._printed = seconds, float("-inf")
        self.rate, self.speed, self.wait = Smoothed(), Smoothed(), Smoothed()
        self.prints = False
        self._live: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self.prints = trainer.world.rank == 0
        if self.prints and trainer.resumed is not None:
            say(f"resumed from {trainer.resumed.path} after step {trainer.step}")
        if self.prints and self.terminal:
            from rich.live import Live

            self._live = Live(ProgressLine([f"step {trainer.step}/{trainer.steps}"], trainer.step, trainer.steps))
            self._live.start()

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.rate.add(metrics.seconds)
        self.speed.add(metrics.tokens_per_second)
        self.wait.add(metrics.wait)
        if not self.prints:
            return
        if self._live is not None:
            self._live.update(ProgressLine(self.items(trainer, metrics), trainer.step, trainer.steps))
            return
        now = time.monotonic()
        if now - self._printed >= self.seconds or trainer.step == trainer.steps:
            self._printed = now
            say("  ".join(self.items(trainer, metrics)))

    def on_change(self, trainer: Trainer, events: Sequence[dict[str, Any]]) -> None:
        if self.prints:
            for event in events:
                say(f"from step {event['step']} on: {described(event)}")

    def items(self, trainer: Trainer, metrics: StepMetrics) -> list[str]:
        """The items of the line, the most important ones first."""
        mfu = metrics.result.flops / (self.rate.value * metrics.peak) if metrics.peak else 0.0
        hits = metrics.counters.get("cache_hit_rate")
        return [
            f"step {trainer.step}/{trainer.steps}",
            f"ETA {_duration((trainer.steps - trainer.step) * self.rate.value)}",
            f"loss {metrics.result.loss:.4f}",
            f"{_short(self.speed.value)} tokens/s",
            f"data wait {self.wait.value / self.rate.value:.1%}",
            f"MFU {mfu:.1%}",
            *([] if hits is None else [f"cache {hits:.0%}"]),
        ]

    def close(self, trainer: Trainer) -> None:
        if self._live is not None:
            self._live.stop()


@dataclass(frozen=True)
class ProgressLine:
    """One line for a `rich` console: the items that fit its width, then a bar if there is room."""

    items: Sequence[str]  # the most important ones first
    completed: int
    total: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown, bar = fit(self.items, options.max_width)
        cells: list[Any] = [Text("  ".join(shown), no_wrap=True, overflow="ellipsis")]
        if bar:
            cells.append(ProgressBar(self.total, self.completed, width=bar))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(*cells)
        yield grid


def fit(items: Sequence[str], width: int) -> tuple[list[str], int]:
    """The items that fit `width` columns, and the width of the bar (0: no bar).

    The first three items are more important than a bar of `SHORTEST_BAR` columns, the others less. The first item is always
    shown.
    """
    used, shown = len(items[0]), [items[0]]
    for place, item in enumerate(items[1:], 1):
        needed = used + 2 + len(item)
        if needed + (0 if place < 3 else 2 + SHORTEST_BAR) > width:
            break
        used, shown = needed, [*shown, item]
    left = width - used - 2
    return shown, min(left, LONGEST_BAR) if left >= SHORTEST_BAR else 0


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
