"""Swaps of texts between the windows of a row, so that a model learns which texts fit (Abramson et al. 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tiphys.dataio.philox import NEGATIVE, uniform32, words


def swaps(
    texts: Sequence[bytes], row_of: np.ndarray, share: float, keys: tuple[int, int, np.ndarray, np.ndarray]
) -> np.ndarray:
    """int64 [G]: for each of G windows of one task, the window whose text it gets; itself if its text is not swapped.

    A swapped text never equals the window's own. Texts only change places within a row, so that its length stays the same.

    Parameters
    ----------
    texts : sequence of bytes
        The text of each window.
    row_of : ndarray, int64 [G]
        The row of each window, ascending.
    share : float
        Share of the windows whose texts are swapped, if the row has enough different texts.
    keys : (int, int, ndarray int64 [G], ndarray int64 [G])
        Seed and training step, and the row and slot of each window: the keys of the random words.
    """
    coin, order, *_ = words(*keys, 0, NEGATIVE)
    out = np.arange(len(texts))
    for row in np.unique(row_of):
        mine = np.flatnonzero((row_of == row) & (uniform32(coin) < share))
        mine = mine[np.argsort(order[mine], kind="stable")]
        given = _deranged([texts[i] for i in mine.tolist()])
        out[mine] = mine[given]
    return out


def _deranged(texts: Sequence[bytes]) -> np.ndarray:
    """A permutation that gives each element a text that differs from its own, or leaves it in its place.

    Elements that are sorted by their texts and shifted by the largest number of equal texts get different ones. If that number
    is more than half of all, some elements with that text stay in their places.
    """
    out = np.arange(len(texts))
    counts = Counter(texts)
    if len(counts) < 2:
        return out
    frequent, most = counts.most_common(1)[0]
    spare = max(2 * most - len(texts), 0)
    seen = {text: number for number, text in enumerate(counts)}
    kept = [i for i, text in enumerate(texts) if text == frequent][spare:]
    moved = sorted({*kept, *(i for i, text in enumerate(texts) if text != frequent)}, key=lambda i: (seen[texts[i]], i))
    out[moved] = np.roll(moved, -(most - spare))
    return out
