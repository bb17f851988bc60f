"""What torch's allocator of the CPU does while code runs: the oracle of the counted bytes."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest number of bytes that `work` had allocated at one time, above those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    live = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
