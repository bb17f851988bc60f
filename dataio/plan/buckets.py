"""The number of buckets, chosen from episodes and rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiphys.dataio.plan.entries import PlanEntry
from tiphys.dataio.plan.index import drawable_episodes


def choose_buckets(episodes: int, rows: int, prompted: int | None = None) -> int:
    """Number of buckets: the largest power of two that is at most `rows` and leaves 400 episodes of each task in a bucket (1,000
    of a task with prompts). With fewer episodes in a bucket, gradients would vary more than with independent draws.

    Parameters
    ----------
    episodes : int
        Drawable episodes of the smallest task. Only entries with a weight above 0 count.
    rows : int
        Rows of the global batch.
    prompted : int, optional
        Drawable episodes of the smallest task with prompts; None: no task has prompts.

    Returns
    -------
    int
        At least 1.
    """
    most = min(rows, episodes // 400, rows if prompted is None else prompted // 1000)
    return 1 << (max(most, 1).bit_length() - 1)


def buckets_of(entries: Sequence[PlanEntry], rows: int, validation: float, held_out: bool) -> int:
    """`choose_buckets` for the smallest tasks of the entries with a weight above 0."""
    smallest, prompted = 2**62, None
    for entry in entries:
        counts = drawable_episodes(entry, validation, held_out)
        share = np.asarray(entry.lengths.prompt)[list(entry.tasks)]
        if entry.lengths.every is not None:
            share = share + np.asarray(entry.lengths.every)[list(entry.tasks)]
        if entry.weight > 0 and (counts > 0).any():
            smallest = min(smallest, int(counts[counts > 0].min()))
            if (with_prompts := counts[(counts > 0) & (share > 0)]).size:
                prompted = min(prompted or 2**62, int(with_prompts.min()))
    return choose_buckets(smallest, rows, prompted)
