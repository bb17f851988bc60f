"""Statistics of discounted returns: at each step, the discounted sum of the rewards after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.sampled_statistics import sampled_statistics
from tiphys.dataio.statistics import FieldStatistics

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

FOLDER = "returns"
REWARD = "reward"


def return_statistics(
    index: EpisodeIndex, task: int, discount: float, later: tuple[str, int] | None = None
) -> FieldStatistics:
    """Statistics of r[t + 1] + γ r[t + 2] + γ² r[t + 3] + … over the steps of a task (Janner et al. 2021, sec. 3.2).

    Parameters
    ----------
    index : EpisodeIndex
        The dataset.
    task : int
        Number of the task in it. It has a field `reward` with one number at each step.
    discount : float
        γ, from 0 to 1.
    later : (str, int), optional
        A field of the episode, and its element that holds the discounted sum of the rewards after the last step. Default: none
        are after it.

    Returns
    -------
    FieldStatistics
        Its arrays have the shape (). Returns that are not finite are not counted.

    Raises
    ------
    DataError
        If an episode cannot be read, or no return is finite.
    """

    def values(episode: int) -> np.ndarray:
        from tiphys.dataio.dataset import read_field

        steps = int(index.steps[episode])
        rewards = np.asarray(read_field(index, episode, REWARD)[:steps], np.float64).reshape(steps)
        after = 0.0 if later is None else float(np.asarray(read_field(index, episode, later[0])).reshape(-1)[later[1]])
        return discounted_sums(rewards, discount, after)[:, None]

    asked = [REWARD, discount, list(later or ())]
    what = f"returns discounted by {discount:g}"
    return sampled_statistics(index, task, what, asked, values, entries=0, folder=FOLDER)


def discounted_sums(rewards: np.ndarray, discount: float, after: float = 0.0) -> np.ndarray:
    """float64 [steps]: at each step the discounted sum of the rewards after it; `after`: that of the last step."""
    out, value = np.empty(len(rewards)), after
    for t in range(len(rewards) - 1, -1, -1):
        out[t] = value
        value = float(rewards[t]) + discount * value
    return out
