"""Philox4x32-10: random words as a pure function of (seed, step, row, slot, attempt, purpose).

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Any process can compute any word, at any time and in any
order.

The counter's four 32-bit words:

| word | bits | holds |
|---|---|---|
| 0 | 0–31 | step, low 32 bits |
| 1 | 0–15 | step, high 16 bits |
| 1 | 16–31 | attempt (redraws of a quarantined or unreadable episode) |
| 2 | 0–31 | row of the global batch |
| 3 | 0–15 | slot: the window's number in its row |
| 3 | 16–31 | purpose, one of the constants below |

The key's two words are the seed's low and high 32 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Purposes keep streams apart: two different purposes never share a counter.
WINDOW, BUCKET, PROMPT, EPOCH, PLACE, HIDE, TASK_DROPOUT, DEPTH, NEGATIVE, VALIDATION = range(10)
# HIDE: what a window hides. Attempt 0 chooses the scheme and its numbers, the attempts after it are for the parts of the steps
FRAMES = 10  # episodes that statistics of relative actions are computed from
# NOISE, TIME: of flow matching. The slot is the position in the row, the attempt a block of four words, or the draw
NOISE, TIME = 11, 12
AUGMENT = 13  # how the pictures of a window are changed; the attempt tells cameras apart
SAMPLE = 32  # actions that a policy draws
SAY = 33  # tokens of texts that a policy draws
# BOOTSTRAP: transitions that a policy draws; the step is the window, the row the draw, the attempt a column
BOOTSTRAP = 35
ACTING_NOISE = 34  # chunks of actions that a policy draws; the row is the stream, the attempt a block of four words

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = NDArray[np.uint64]


def philox(counter: tuple[Words, Words, Words, Words], seed: int) -> tuple[Words, Words, Words, Words]:
    """Ten rounds. All arrays, given and returned, are uint64 and hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(
    seed: int, step: ArrayLike, row: ArrayLike = 0, slot: ArrayLike = 0, attempt: ArrayLike = 0, purpose: int = WINDOW
) -> tuple[Words, Words, Words, Words]:
    """Four words for each (step, row, slot, attempt); the arguments broadcast against each other."""
    s, r, o, a = np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) for x in (step, row, slot, attempt)))
    counter = (
        s & _LOW,
        ((s >> _32) & np.uint64(0xFFFF)) | (a << np.uint64(16)),
        r & _LOW,
        (o & np.uint64(0xFFFF)) | np.uint64(purpose << 16),
    )
    return philox(counter, seed)


def uniform32(word: Words) -> NDArray[np.float64]:
    """A word as a float in (0, 1): the middle of its interval of width 2⁻³²."""
    return (word.astype(np.float64) + 0.5) * 2.0**-32


def uniform53(high: Words, low: Words) -> NDArray[np.float64]:
    """Two words as a float in [0, 1) with 53 random bits."""
    return ((high << _32 | low) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(
    seed: int, step: ArrayLike, row: ArrayLike, slot: ArrayLike, count: int, first: ArrayLike = 0, purpose: int = NOISE
) -> NDArray[np.float32]:
    """Standard normal numbers [n, count] for each (step, row, slot) [n], by Box and Muller 1958.

    They take the attempts from `first` on, one for each four numbers. Raises ValueError if these are more than 16 bits hold.
    """
    blocks = -(-count // 4)
    if blocks and int(np.max(first, initial=0)) + blocks > 1 << 16:
        raise ValueError(f"{count} normal numbers for one slot need more than {1 << 16} blocks of four words")
    s, r, o, f = (np.atleast_1d(np.asarray(x, np.uint64))[:, None] for x in (step, row, slot, first))
    parts = words(seed, s, r, o, f + np.arange(blocks, dtype=np.uint64), purpose)
    a, b, c, d = map(uniform32, parts)
    radius = np.sqrt(-2 * np.log([a, c]))
    angle = 2 * np.pi * np.stack([b, d])
    found = np.stack([radius * np.cos(angle), radius * np.sin(angle)])  # [2, 2, n, blocks]
    return np.moveaxis(found, (0, 1), (3, 2)).reshape(len(a), blocks * 4)[:, :count].astype(np.float32)


def generator(seed: int, step: int, row: int, purpose: int, slot: int = 0) -> np.random.Generator:
    """NumPy's generator for one row, for purposes that need more than a few words. It depends on the arguments alone."""
    key = [seed & (2**64 - 1), (step & (2**48 - 1)) | purpose << 48]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, row, slot]))
