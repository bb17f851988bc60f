"""Statistics of actions counted from the state of an observed step, over the steps and the actions that follow each.

For a step t and k < horizon, the value is the action of step t + k minus entries of the state at t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.sampled_statistics import sampled_statistics
from tiphys.dataio.statistics import FieldStatistics

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

FOLDER = "frames"
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
    what = f"{action!r} relative to {state!r}"
    origin = np.asarray(columns)
    return sampled_statistics(
        index,
        task,
        what,
        [action, state, list(columns), horizon],
        lambda episode: _values(index, episode, action, state, origin, horizon),
        entries=len(columns),
        each=horizon,
        folder=FOLDER,
    )


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
