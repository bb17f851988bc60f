"""The accelerators of this machine, and the memory of each."""

from __future__ import annotations

import os
from pathlib import Path


def devices() -> int:
    """Number of CUDA devices of this machine. Does not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def device_memory(processes: int) -> int:
    """Bytes that one process may use: the memory of a GPU, or the machine's divided among so many processes."""
    if devices():
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, processes)
