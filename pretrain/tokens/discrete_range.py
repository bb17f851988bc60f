"""Which values each entry of a discrete field can have: as declared, else as in the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.bounds import MOST_VALUES
from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.tokens.vocabulary import DISCRETE_VALUES

if TYPE_CHECKING:
    from tiphys.dataio.statistics import FieldStatistics

_MEND = "correct `low`, `high` or `values` in the mapping file and convert again"


def discrete_range(
    field: FieldSpec, found: FieldStatistics | None, where: str, *, exact: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The number of values of each entry, and the lowest value of each. A tuple has one number if all entries are alike.

    A field that declares neither `high` nor `values` has the values below DISCRETE_VALUES or, if its data have others, the
    range of the data.

    Parameters
    ----------
    field : FieldSpec
        A discrete field, or an image that is encoded like one.
    found : FieldStatistics or None
        Statistics of its data.
    where : str
        Task and field, for messages.
    exact : bool
        The statistics describe the data themselves, not those of a dataset from which the data were filtered.

    Raises
    ------
    DataError
        If the data lie outside the declared range, or if the range is empty or larger than MOST_VALUES.
    """
    known = found if found is not None and found.count else None
    low = _whole(field, field.low, where) if field.low is not None else np.zeros(1, np.int64)
    if field.high is not None:
        values = _whole(field, field.high, where) - low + 1
    else:
        values = np.array([field.values or DISCRETE_VALUES])
        if not field.values and known and not _inside(known, low, values):
            low = np.minimum(low, _flat(np.floor(known.min)))
            values = _flat(np.floor(known.max)) - low + 1
    if values.max() > MOST_VALUES or values.min() < 1:
        raise DataError(
            f"{where}: its values go from {low.min()} to {(low + values).max() - 1}, but an entry must have 1 to {MOST_VALUES} "
            f"values; {_MEND}, or set `encoding: vector` (an observation) or `encoding: skip` for it"
        )
    if known and exact and not _inside(known, low, values):
        raise DataError(
            f"{where}: its data go from {np.min(known.min):g} to {np.max(known.max):g}, but its entries have the range "
            f"{low.tolist()} to {(low + values - 1).tolist()}; {_MEND}"
        )
    return tuple(values.tolist()), tuple(low.tolist())


def _whole(field: FieldSpec, bound: tuple[float, ...], where: str) -> np.ndarray:
    """A bound, int64: one number, or one for each entry."""
    array = np.asarray(bound if len(bound) == 1 else field.entries(bound), np.float64).reshape(-1)
    if not np.array_equal(array, np.rint(array)) or not (np.abs(array) < 2.0**62).all():
        raise DataError(f"{where}: low and high of a discrete field must be whole numbers, not {bound}; {_MEND}")
    return array.astype(np.int64)


def _inside(found: FieldStatistics, low: np.ndarray, values: np.ndarray) -> bool:
    """Whether the data lie in the range. Statistics of a large field are those of all its entries together."""
    least, most, high = np.reshape(found.min, -1), np.reshape(found.max, -1), low + values - 1
    if least.size == 1:
        return bool(least[0] >= low.min() and most[0] <= high.max())
    return bool(np.all(least >= low) and np.all(most <= high))


def _flat(array: np.ndarray) -> np.ndarray:
    return np.reshape(array, -1).astype(np.int64)
