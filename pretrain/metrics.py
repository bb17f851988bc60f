"""Measurements of a step: times, rates, and MFU (model FLOP/s ÷ the FLOP/s that the devices could reach)."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tiphys.pretrain.engine import StepResult

# Dense bf16 tensor-core peak of one device in FLOP/s, from the vendor's data sheets (without sparsity).
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass
class StepMetrics:
    """One step as the trainer measured it.

    seconds    from the end of the previous step to the end of this one
    wait       seconds of these that the loaders were waited for, mean over the loaders
    peak       FLOP/s that all processes together could reach
    counters   numbers from the loaders: sums over the ranks, means of rates
    phases     seconds of this rank by phase (`tiphys.pretrain.phases`), since the previous step's callbacks began
    """

    result: StepResult
    seconds: float
    wait: float
    peak: float
    counters: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.result.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (forward and backward, without padding) ÷ FLOPs that the devices could have done in the same time."""
        return self.result.flops / (self.seconds * self.peak)

    def to_json(self, tasks: tuple[str, ...] | list[str] = ()) -> dict[str, Any]:
        """The line of metrics.jsonl. `loss_by_task` is the unweighted mean over the targets of each task, as in validation."""
        r = self.result
        by_task = {tasks[t] if t < len(tasks) else str(t): s / n for t, (s, n) in r.loss_by_task.items() if n}
        return {
            "step": r.step,
            "loss": r.loss,
            "auxiliary": r.auxiliary,
            "gradient_norm": r.gradient_norm,
            "learning_rate": r.learning_rate,
            "rows": r.rows,
            "tokens": r.tokens,
            "targets": r.targets,
            "flops": r.flops,
            "seconds": round(self.seconds, 6),
            "data_wait": round(self.wait, 6),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "mfu": round(self.mfu, 5),
            "peak_memory": r.memory,
            **{name: round(share, 5) for name, share in self.shares().items()},
            "phases": {name: round(seconds, 5) for name, seconds in self.phases.items()},
            "loss_by_task": by_task,
            **({"gradient_by_line": r.gradient_by_line} if r.gradient_by_line else {}),
            **({"loss_weights": r.loss_weights} if r.loss_weights else {}),
            "loader": dict(self.counters),
        }

    def shares(self) -> dict[str, float]:
        """Costs of the layout, if it has them: `all_to_all` as a share of the step; `bubble` and its bound."""
        r = self.result
        parts = {
            "all_to_all": None if r.all_to_all is None else r.all_to_all / self.seconds,
            "bubble": r.bubble,
            "bubble_bound": r.bubble_bound,
        }
        return {name: share for name, share in parts.items() if share is not None}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one process could reach: from the device's data sheet if it is in `PEAKS`, otherwise measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    return matrix_rate(device, dtype)


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 0, seconds: float = 0.15) -> float:
    """FLOP/s of square matrix products, the best of several within `seconds`. Measured once in each process.

    The best and not the mean, because other processes on the same cores do not lower what the machine could reach.
    """
    size = size or (768 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        _synchronise(device, a @ b)
        while best == float("inf") or time.perf_counter() < end:  # at least once, however busy the machine is
            start = time.perf_counter()
            _synchronise(device, a @ b)
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronise(device: torch.device, _: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Measures the seconds since the last `lap`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return max(elapsed, 1e-9)


class Smoothed:
    """An exponential mean over about the last `steps` values, without a bias at the start."""

    def __init__(self, steps: float = 20.0) -> None:
        self._keep, self._sum, self._weight = 1.0 - 1.0 / steps, 0.0, 0.0

    def add(self, value: float) -> float:
        self._sum = self._sum * self._keep + value
        self._weight = self._weight * self._keep + 1.0
        return self.value

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0
