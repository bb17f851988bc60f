"""Statistics of values that follow from several steps of an episode, such as relative actions and discounted returns.

One pass over the episodes makes a sketch that merges. The result lies beside the dataset, under a hash of its fingerprint and of
what was asked, so that it is never used for something else.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger, say
from tiphys.dataio.philox import FRAMES, words
from tiphys.dataio.statistics import FieldStatistics, Sketch, Statistics
from tiphys.dataio.storage import Store, StoreError

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

MOST_VALUES = 2_000_000  # that are counted; of a larger dataset, a sample of its episodes
_BYTES = 64 << 20
_VERSION = 2


def sampled_statistics(
    index: EpisodeIndex,
    task: int,
    what: str,
    asked: Sequence[Any],
    values: Callable[[int], np.ndarray],
    *,
    entries: int,
    each: int = 1,
    folder: str,
) -> FieldStatistics:
    """Statistics of values that are computed from whole episodes of a task.

    Parameters
    ----------
    index : EpisodeIndex
        The dataset.
    task : int
        Number of the task in it.
    what : str
        What the values are, for messages.
    asked : sequence
        What the values depend on besides dataset and task, as JSON values.
    values : callable
        Episode -> float64 [n, entries]. Rows that are not finite are not counted.
    entries : int
        Elements of the statistics' arrays; 0: the arrays have the shape ().
    each : int
        Values of a step.
    folder : str
        Where they are kept, beside the dataset.

    Returns
    -------
    FieldStatistics
        With a histogram.

    Raises
    ------
    DataError
        If an episode cannot be read, or there is no finite value.
    """
    name = index.tasks[task].name
    key = json.dumps([index.fingerprint, name, *asked, MOST_VALUES, _VERSION]).encode()
    path, store = f"{folder}/{hashlib.sha256(key).hexdigest()[:32]}.parquet", Store(index.url)
    if store.exists(path):
        return _read(store, path, name, what)
    chosen, steps = _chosen(index, task, each), np.maximum(index.steps, 0)
    mine = np.flatnonzero(np.asarray(index.task) == task)
    if len(chosen) < len(mine):
        say(
            f"{index.url}: statistics of {what} come from {int(steps[chosen].sum())} of {int(steps[mine].sum())} steps, a random "
            f"sample of {len(chosen)} episodes"
        )
    found = Statistics()
    sketch = found.sketches[name, what] = Sketch((entries,) if entries else ())
    for episode in chosen.tolist():
        sketch.add(values(episode))
    if not sketch.count:
        raise DataError(f"{index.url}: task {name!r} has no finite {what}")
    try:
        with tempfile.TemporaryDirectory(prefix="tiphys-statistics-") as scratch:
            file = Path(scratch) / "statistics"
            found.write(file)
            store.write(path, file.read_bytes())
    except (StoreError, OSError) as error:
        logger(__name__).warning(
            "%s/%s cannot be written, so each process computes it again: %s", index.url, path, error
        )
    return sketch.result()


def _read(store: Store, path: str, task: str, what: str) -> FieldStatistics:
    from tiphys.dataio.format.limited import read_statistics

    where = f"{store.url}/{path}"
    with tempfile.TemporaryDirectory(prefix="tiphys-statistics-") as scratch:
        file = Path(scratch) / "statistics"
        file.write_bytes(store.read(path, _BYTES))
        try:
            return read_statistics(file, where).sketches[task, what].result()
        except (DataError, KeyError):
            raise DataError(f"{where}: not statistics of {what}; delete it, and it is computed again") from None


def _chosen(index: EpisodeIndex, task: int, each: int) -> np.ndarray:
    """Episodes that are counted, ascending: all, or so many of a random order that there are MOST_VALUES."""
    mine = np.flatnonzero((np.asarray(index.task) == task) & (np.asarray(index.steps) > 0))
    order = mine[np.argsort(words(0, mine, purpose=FRAMES)[0], kind="stable")]
    values = np.cumsum(np.asarray(index.steps, np.int64)[order]) * each
    return np.sort(order[: int(np.searchsorted(values, MOST_VALUES)) + 1]) if len(order) else order
