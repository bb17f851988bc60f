"""The accelerators of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def devices() -> int:
    """Number of CUDA devices of this machine. Does not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
