"""The rows of one episode in a Parquet file of LeRobot, found by `episode_index`, in whatever order the file has them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.convert.limits import EPISODE_STEPS
from tiphys.dataio.convert.parquet import batches, to_rows
from tiphys.dataio.episode import DataError

_BATCH_ROWS = 256
_NUMBER, _FRAME = "episode_index", "frame_index"


class EpisodeRows:
    """Reads episodes from an open Parquet file. Consecutive episodes are read forward, without decoding a row twice.

    file     a pyarrow ParquetFile
    wanted   columns to read, if the file has them
    where    the file's name, for messages

    Raises DataError if the file has no column `episode_index`, or is damaged.
    """

    def __init__(self, file: Any, wanted: Collection[str], where: str):
        names = file.schema_arrow.names
        if _NUMBER not in names:
            raise DataError(f"{where}: lacks the column {_NUMBER}")
        self._file, self._where = file, where
        self._columns = [n for n in names if n in wanted or n in (_NUMBER, _FRAME)]
        numbers = (to_rows(b.column(0), f"{where}, {_NUMBER}", ()) for b in batches(file, [_NUMBER], where))
        self._runs = _runs(numbers, where)
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])  # first row of each row group
        self._reader: Iterator[Any] = iter(())
        self._batch: Any = None  # rows that were read, but not yet used
        self._position = int(self._starts[-1])  # row at which `_batch`, or else the next batch, begins

    def of(self, number: int, length: int, where: str) -> Any:
        """The rows of episode `number` as an Arrow table, in the order of their `frame_index`.

        Raises DataError if there are not `length` of them.
        """
        import pyarrow as pa

        runs = self._runs[self._runs[:, 0] == number, 1:]
        count = int((runs[:, 1] - runs[:, 0]).sum())
        if count != length:
            raise DataError(f"{where}: has {count:,} rows with this {_NUMBER}, but the metadata lists {length:,}")
        table = pa.Table.from_batches([b for first, end in runs.tolist() for b in self._read(first, end)])
        return _in_order(table, where)

    def _read(self, first: int, end: int) -> Iterator[Any]:
        """Record batches of the rows [first, end)."""
        group = int(np.searchsorted(self._starts, first, side="right")) - 1
        if first < self._position or self._starts[group] > self._position:
            groups = range(group, len(self._starts) - 1)
            self._reader = batches(self._file, self._columns, self._where, _BATCH_ROWS, groups)
            self._batch, self._position = None, int(self._starts[group])
        while self._position < end:
            batch = next(self._reader, None) if self._batch is None else self._batch
            if batch is None:
                raise DataError(f"{self._where}: the columns have different numbers of rows")
            begin, stop = self._position, self._position + len(batch)
            if first < stop:
                yield batch.slice(max(first - begin, 0), min(end, stop) - max(first, begin))
            self._batch = batch.slice(end - begin) if end < stop else None
            self._position = min(end, stop)


def _runs(parts: Iterable[np.ndarray], where: str) -> np.ndarray:
    """int64 [runs, 3]: number of an episode, first row and end of consecutive rows with it. Few even in a large file."""
    found, row, count = [np.zeros((0, 3), np.int64)], 0, 0
    for numbers in parts:
        first = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1]) if len(numbers) else np.zeros(0, np.int64)
        end = np.append(first[1:], len(numbers))[: len(first)]
        found.append(np.stack([checked_cast(numbers[first], np.int64, where), first + row, end + row], axis=1))
        row, count = row + len(numbers), count + len(first)
        if count > EPISODE_STEPS:
            raise DataError(f"{where}: its rows change more than {EPISODE_STEPS:,} times from episode to episode")
    return np.concatenate(found)


def _in_order(table: Any, where: str) -> Any:
    """The rows sorted by `frame_index`. Where that does not tell rows apart, they stay in the order of the file."""
    if _FRAME not in table.schema.names:
        return table
    frames = to_rows(table.column(_FRAME), f"{where}, {_FRAME}", ())
    if bool(np.all(np.diff(frames) > 0)) or len(np.unique(frames)) != len(frames):
        return table
    return table.take(np.argsort(frames))
