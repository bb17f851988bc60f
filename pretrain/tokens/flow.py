"""The noise and the times at which flow matching learns chunks of actions. They depend on
the seed, the step and the row alone.

At time 1 all is noise, at time 0 nothing is (the convention of Black et al. 2024, with time reversed). Times are drawn as
.999 · Beta(1.5, 1) + .001, which prefers much noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiphys.dataio.philox import NOISE, TIME, normals, uniform32, words


def times(shares: np.ndarray) -> np.ndarray:
    """The times whose distribution function is `shares`, in (0, 1): that of Beta(1.5, 1) is x^1.5."""
    return 0.999 * np.asarray(shares) ** (2 / 3) + 0.001


def drawn(
    head: Mapping[str, Any], size: int, seed: int, step: int, row: np.ndarray, position: np.ndarray, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Noise and times of chunks.

    Parameters
    ----------
    head : mapping
        `Vocabulary.chunks` of their head.
    size : int
        Numbers of a chunk.
    seed, step : int
        Those of the batch.
    row, position : ndarray, int64 [n]
        Row of the global batch, and position in it, of each chunk.
    training : bool
        False: the times are a fixed grid, and the noise is that of step 0.

    Returns
    -------
    ndarray, float32 [n, draws, size]
        Standard normal.
    ndarray, float32 [n, draws]
    """
    draws = int(head.get("draws", 0))
    if not draws or not len(row):
        return np.zeros((len(row), draws, size), np.float32), np.zeros((len(row), draws), np.float32)
    step = step if training else 0
    row = np.maximum(row, 0)
    blocks = -(-size // 4)
    noise = [normals(seed, step, row, position, size, first=draw * blocks, purpose=NOISE) for draw in range(draws)]
    if training:
        share = uniform32(words(seed, step, row[:, None], position[:, None], np.arange(draws), purpose=TIME)[0])
    else:
        share = np.broadcast_to((np.arange(draws) + 0.5) / draws, (len(row), draws))
    return np.stack(noise, axis=1), times(share).astype(np.float32)
