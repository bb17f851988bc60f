"""Statistics of actions counted from the state of an observed step, over the steps and the actions that follow each.

For a step t and k < horizon, the value is the action of step t + k minus entries of the state at t. One pass over the episodes
makes a sketch that merges; the result lies beside the dataset, under a hash of its fingerprint and of what was asked, so that it
is never used for something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger, say
from tiphys.dataio.philox import FRAMES, words
from tiphys.dataio.statistics import FieldStatistics, Sketch
from tiphys.dataio.storage import Store, StoreError

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

FOLDER = "frames"
MOST_VALUES = 2_000_000  # (step, k) that are counted; of a larger dataset, a sample of its episodes
_BYTES = 64 << 20
ABSOLUTE = -1


def frame_statistics(
    index: EpisodeIndex, task: int, action: str, state: str, columns: Sequence[int], horizon: int
) -> FieldStatistics:
    """Statistics of the entries of the relative action.

    Parameters
    ----------
    index : EpisodeIndex
        The dataset.
    task : int
        Number of the task in it.
    action, state : str
        Their fields.
    columns : sequence of int
        The entry of the state that is subtracted from each entry of the action; ABSOLUTE: none.
    horizon : int
        Actions that follow an observed step, itself included.

    Returns
    -------
    FieldStatistics
        Its arrays have an element for each entry of the action. Steps whose values are not finite are not counted.

    Raises
    ------
    DataError
        If an episode cannot be read, or there is no finite value.
    """
    asked = [index.fingerprint, index.tasks[task].name, action, state, list(columns), horizon, MOST_VALUES, 1]
    path = f"{FOLDER}/{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    store = Store(index.url)
    if store.exists(path):
        try:
            return FieldStatistics.from_dict(json.loads(store.read(path, _BYTES)))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{index.url}/{path}: not statistics of an action; delete it, and it is computed again"
            ) from None
    sketch, chosen, steps = Sketch((len(columns),)), _chosen(index, task, horizon), np.maximum(index.steps, 0)
    mine = np.flatnonzero(np.asarray(index.task) == task)
    if len(chosen) < len(mine):
        say(
            f"{index.url}: statistics of {action!r} relative to {state!r} come from {int(steps[chosen].sum())} of "
            f"{int(steps[mine].sum())} steps, a random sample of {len(chosen)} episodes"
        )
    for episode in chosen.tolist():
        sketch.add(_values(index, episode, action, state, np.asarray(columns), horizon))
    if not sketch.count:
        raise DataError(f"{index.url}: task {index.tasks[task].name!r} has no finite {action!r} relative to {state!r}")
    found = sketch.result()
    try:
        store.write(path, json.dumps(found.to_dict()).encode())
    except (StoreError, OSError) as error:
        logger(__name__).warning(
            "%s/%s cannot be written, so each process computes it again: %s", index.url, path, error
        )
    return FieldStatistics.from_dict(
        json.loads(json.dumps(found.to_dict()))
    )  # the same whether it was read or computed


def _chosen(index: EpisodeIndex, task: int, horizon: int) -> np.ndarray:
    """Episodes that are counted, ascending: all, or so many of a random order that there are MOST_VALUES."""
    mine = np.flatnonzero((np.asarray(index.task) == task) & (np.asarray(index.steps) > 0))
    order = mine[np.argsort(words(0, mine, purpose=FRAMES)[0], kind="stable")]
    values = np.cumsum(np.asarray(index.steps, np.int64)[order]) * horizon
    return np.sort(order[: int(np.searchsorted(values, MOST_VALUES)) + 1]) if len(order) else order


def _values(
    index: EpisodeIndex, episode: int, action: str, state: str, columns: np.ndarray, horizon: int
) -> np.ndarray:
    """float64 [values, entries] of one episode."""
    from tiphys.dataio.dataset import read_field

    steps = int(index.steps[episode])
    did, saw = (
        np.asarray(read_field(index, episode, name)[:steps], np.float64).reshape(steps, -1) for name in (action, state)
    )
    origin = np.where(columns == ABSOLUTE, 0.0, saw[:, np.maximum(columns, 0)])
    return np.concatenate([did[k:] - origin[: steps - k] for k in range(min(horizon, steps))])
