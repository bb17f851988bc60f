"""float32 values as int32 with the same bits: between pipeline stages every float tensor must carry a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_bits(values: Any) -> np.ndarray:
    """float32 values as int32 with the same bits."""
    return np.ascontiguousarray(values, np.float32).view(np.int32)


def from_bits(values: Tensor) -> Tensor:
    """The inverse of `to_bits`."""
    return values.contiguous().view(torch.float32)
