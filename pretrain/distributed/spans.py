"""Measures of a device: seconds spent inside marked spans of its work, and peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Mark = Any  # a point in time: seconds on a CPU, an event of the stream on CUDA


class Spans:
    """Seconds inside `with spans.span():` blocks since the last `take`. On CUDA the stream's events are timed, without a wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Mark, Mark]] = []
        self._start: Mark = None

    def mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self) -> Iterator[None]:
        start = self.mark()
        yield
        self._spans.append((start, self.mark()))

    def take(self, since: Mark = None) -> tuple[float, float]:
        """(seconds inside spans, seconds from `since` to the end of the last span); then start again. Waits for the last span."""
        spans, self._spans = self._spans, []
        if not spans:
            return 0.0, 0.0
        if self._cuda:
            spans[-1][1].synchronize()
        inside = sum(self._seconds(start, stop) for start, stop in spans)
        return inside, 0.0 if since is None else self._seconds(since, spans[-1][1])

    def _seconds(self, start: Mark, stop: Mark) -> float:
        return start.elapsed_time(stop) / 1000 if self._cuda else stop - start


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of its tensors on the device, or resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="ascii") as lines:  # ru_maxrss would start with the parent's value
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
