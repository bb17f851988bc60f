"""What torch's allocator of the CPU does while code runs: the oracle of the counted bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
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


def tensor_bytes() -> int:
    """Bytes of all tensors on the CPU that there are now."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type == "cpu"}.values())
