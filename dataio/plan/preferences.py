"""Priorities of episodes, from `prefer` in a recipe or from a `priority` event of the plan's log."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

RULES = ("uniform", "return", "top", "success")
TOP_OF = ("episodes", "steps")


def preference(
    index: EpisodeIndex, prefer: str, top: float = 1.0, top_of: str = "episodes", *, leave_out: bool = False
) -> NDArray[np.float32] | None:
    """Priorities by a rule: float32 [E], or None if all are 1.

    Parameters
    ----------
    index : EpisodeIndex
        The E episodes.
    prefer : str
        `uniform`: None. `return`: rank of the episode's return among the returns of its task, divided by their number, so the
        best has 1 and the worst is near 0; equal returns share their mean rank. `top`: 1 for those episodes of each task that
        have the highest returns, 0 for the others. `success`: 1 for episodes that are known to have succeeded, 0 for the others.
    top : float
        For `prefer="top"`: share of the best of each task (at least one episode). Of equal returns, the first in the index
        are taken.
    top_of : str
        What `top` is a share of. `episodes`: their number. `steps`: as many of the best episodes as have together at most this
        share of the task's steps, as %BC counts (Chen et al. 2021, section 5.1).
    leave_out : bool
        Episodes whose return is not finite get 0 where a rule needs returns. False: they are an error.

    Raises DataError if the rule is unknown, `top` is out of range, or a return that the rule needs is not finite.
    """
    if prefer == "uniform":
        return None
    if prefer == "success":
        return (np.asarray(index.success) == 1).astype(np.float32)
    if prefer not in RULES:
        raise DataError(f"prefer: {prefer!r} is none of {', '.join(RULES)}")
    if not 0 < top <= 1:
        raise DataError(f"top: must be above 0 and at most 1, not {top}")
    if top_of not in TOP_OF:
        raise DataError(f"top_of: {top_of!r} is none of {', '.join(TOP_OF)}")
    returns, task = np.asarray(index.total_return, np.float64), np.asarray(index.task)
    finite = np.isfinite(returns)
    if not finite.all() and not leave_out:
        bad = int(np.flatnonzero(~np.isfinite(returns))[0])
        raise DataError(
            f"{index.url}: episode {index.id(bad)!r} has the return {returns[bad]}; `prefer: {prefer}` needs finite returns"
        )
    out = np.zeros(len(returns), np.float32)
    for t in np.unique(task):
        of_task = np.flatnonzero((task == t) & finite)
        n = len(of_task)
        if prefer == "top":
            best = of_task[np.argsort(-returns[of_task], kind="stable")]
            steps = np.cumsum(np.asarray(index.steps, np.int64)[best])
            many = int((steps <= top * steps[-1]).sum()) if top_of == "steps" else round(top * n)
            out[best[: max(1, many)]] = 1.0
        else:
            _, inverse, counts = np.unique(returns[of_task], return_inverse=True, return_counts=True)
            mean_rank = np.cumsum(counts) - (counts - 1) / 2
            out[of_task] = mean_rank[inverse] / n
    return out


def priority_of(event: Mapping[str, Any], index: EpisodeIndex) -> NDArray[np.float32] | None:
    """Priorities of a `priority` event: by a rule, or from a `.npy` file with the SHA-256 that the event names."""
    if "prefer" in event:
        return preference(index, event["prefer"], float(event.get("top", 1.0)), event.get("top_of", "episodes"))
    with open(event["file"], "rb") as file:
        data = file.read(index.episodes * 8 + 4096)
    if hashlib.sha256(data).hexdigest() != event["digest"]:
        raise DataError(
            f"{event['file']}: its SHA-256 is not {event['digest']}, as the plan's log says; restore the file"
        )
    priority = np.load(io.BytesIO(data), allow_pickle=False)
    if priority.shape != (index.episodes,) or priority.dtype.kind != "f":
        raise DataError(
            f"{event['file']}: priorities must be floats of shape ({index.episodes},), not {priority.dtype} {priority.shape}"
        )
    return priority.astype(np.float32)
