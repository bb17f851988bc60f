"""Units: the pieces in which data is fetched and cached, numbered over all datasets of a plan.

A unit of `steps.npy` is `unit_rows` consecutive rows. A unit of a large field is as many of its chunks as hold about
`unit_rows` rows, at least one. Episodes are cut from their first row on, so a unit's byte range follows from its number by
arithmetic and two bisections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.bounds import expand
from tiphys.dataio.episode import DataError, Needs
from tiphys.dataio.format.places import STEPS

if TYPE_CHECKING:
    from tiphys.dataio.format.packet_table import PacketTable
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import PlannedWindows

Ints = NDArray[np.int64]


class UnitRanges(NamedTuple):
    """Where units lie: one element for each unit."""

    dataset: Ints  # number in UnitMap.datasets
    shard: Ints
    offset: Ints
    size: Ints


class Span(NamedTuple):
    """The bytes of one column that some windows of a training step need. All arrays have one element for each window.

    column      number in UnitMap.columns
    window      the window's number in the step
    low, high   its units [low, high)
    begin, end  its bytes [begin, end) within the shard; its first and last unit may hold more than that
    needed      bool: which of the units of all windows hold a row that is needed; None: all of them. Others are not fetched
    """

    column: int
    window: Ints
    low: Ints
    high: Ints
    begin: Ints
    end: Ints
    needed: NDArray[np.bool_] | None = None

    @property
    def units(self) -> Ints:
        """The units that are needed, window by window."""
        units = expand(self.low, self.high)
        return units if self.needed is None else units[self.needed]

    @property
    def owner(self) -> Ints:
        """For each of `units`, the position of its window in `window`."""
        owner = np.repeat(np.arange(len(self.low)), self.high - self.low)
        return owner if self.needed is None else owner[self.needed]


class UnitMap:
    """The units of the datasets that a plan's entries draw from.

    indexes, needs  one for each mixture entry; entries of the same dataset share its units
    unit_rows       rows of a unit, or a function from a row's bytes to that number

    Raises ValueError if there are not as many needs as indexes.
    """

    def __init__(
        self, indexes: Sequence[EpisodeIndex], needs: Sequence[Needs], unit_rows: int | Callable[[float], int] = 2
    ):
        if len(indexes) != len(needs):
            raise ValueError(f"units: {len(indexes)} mixture entries, but {len(needs)} needs; give one for each entry")
        self.needs = tuple(needs)
        rows_of: Callable[[float], int] = unit_rows if callable(unit_rows) else lambda row_bytes: unit_rows
        self.datasets: list[EpisodeIndex] = []
        self.entry_dataset: list[int] = []
        for index in indexes:
            same = [i for i, d in enumerate(self.datasets) if (d.url, d.fingerprint) == (index.url, index.fingerprint)]
            self.entry_dataset.append(same[0] if same else len(self.datasets))
            if not same:
                self.datasets.append(index)
        self.columns: list[StepsColumn | ChunksColumn] = []
        self._by_entry: list[list[int]] = [[] for _ in needs]
        self.units = 0
        for number, index in enumerate(self.datasets):
            mine = [e for e, d in enumerate(self.entry_dataset) if d == number]
            wanted = sorted({f for e in mine for f in needs[e].fields})
            row_bytes = max((index.row_bytes(t) for t in range(len(index.tasks))), default=1)
            self._add(StepsColumn(number, index, self.units, rows_of(row_bytes)), mine)
            for field in wanted:
                users = [e for e in mine if field in needs[e].fields]
                if index.has_chunks(field):
                    self._add(ChunksColumn(number, index, field, self.units, rows_of), users)
                if index.packets(field) is not None:
                    self._add(PacketsColumn(number, index, field, self.units, rows_of), users)
        self._firsts = np.array([c.first_unit for c in self.columns], np.int64)

    def _add(self, column: StepsColumn | ChunksColumn, entries: Sequence[int]) -> None:
        self.columns.append(column)
        self.units += column.units
        for entry in entries:
            self._by_entry[entry].append(len(self.columns) - 1)

    def rows(self, planned: PlannedWindows) -> tuple[Ints, Ints]:
        """(first row, number of rows) of each planned window with the rows after it that are needed, cut at its episode's end.

        An episode without actions (an image with its caption, a document) is always read whole. Raises DataError if a window
        lies outside its episode.
        """
        first = np.asarray(planned.start, np.int64).copy()
        count = np.asarray(planned.units, np.int64).copy()
        for entry in np.unique(planned.entry).tolist():
            index, here = self.datasets[self.entry_dataset[entry]], np.flatnonzero(planned.entry == entry)
            episode = planned.episode[here]
            still = index.steps[episode] == 0
            first[here] = np.where(still, 0, first[here])
            all_rows = index.rows[episode].astype(np.int64)
            count[here] = np.where(
                still, all_rows, np.minimum(count[here] + self.needs[entry].after, all_rows - first[here])
            )
        if len(count) and count.min() <= 0:
            bad = int(np.argmin(count))
            raise DataError(
                f"entry {int(planned.entry[bad])}, episode {int(planned.episode[bad])}: the plan's window starts at row "
                f"{int(first[bad])}, after the episode's end; plan and dataset do not belong together"
            )
        return first, count

    def spans(self, planned: PlannedWindows) -> list[Span]:
        """What the windows need, column by column. Windows that need nothing of a column are absent there."""
        first, count = self.rows(planned)
        out = []
        for number, column in enumerate(self.columns):
            entries = [e for e, columns in enumerate(self._by_entry) if number in columns]
            window = np.flatnonzero(np.isin(planned.entry, entries))
            if len(window):
                low, high, begin, end = column.span(planned.episode[window], first[window], count[window])
                some = high > low
                span = Span(
                    column=number,
                    window=window[some],
                    low=low[some],
                    high=high[some],
                    begin=begin[some],
                    end=end[some],
                )
                stride = self._strides(column.field, planned.entry[span.window])
                if isinstance(column, PacketsColumn) and (stride > 1).any():
                    rows = first[span.window], first[span.window] + count[span.window]
                    span = span._replace(needed=column.needed(span, *rows, stride))
                out.append(span)
        return out

    def _strides(self, field: str, entry: Ints) -> Ints:
        """int64: the stride of a field for each of some windows."""
        known = np.array([dict(needs.strides).get(field, 1) for needs in self.needs], np.int64)
        return known[entry]

    def sizes(self, units: Ints) -> Ints:
        """Bytes of each unit."""
        return self.ranges(units).size

    def episodes(self, units: Ints) -> tuple[Ints, Ints]:
        """(dataset, episode) of each unit, as numbers in `datasets` and in its index."""
        dataset, episode = np.zeros(len(units), np.int64), np.zeros(len(units), np.int64)
        which = np.searchsorted(self._firsts, units, side="right") - 1
        for number in np.unique(which).tolist():
            here, column = np.flatnonzero(which == number), self.columns[number]
            dataset[here] = column.dataset
            episode[here] = np.searchsorted(column.base, units[here] - column.first_unit, side="right") - 1
        return dataset, episode

    def ranges(self, units: Ints) -> UnitRanges:
        """Where each unit lies."""
        units = np.asarray(units, np.int64)
        out = UnitRanges(*(np.zeros(len(units), np.int64) for _ in range(4)))
        which = np.searchsorted(self._firsts, units, side="right") - 1
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            column = self.columns[number]
            out.dataset[here] = column.dataset
            out.shard[here], out.offset[here], out.size[here] = column.ranges(units[here])
        return out


class StepsColumn:
    """The units of a dataset's `steps.npy` members."""

    def __init__(self, dataset: int, index: EpisodeIndex, first_unit: int, unit_rows: int):
        self.dataset, self.index, self.first_unit, self.field = dataset, index, first_unit, STEPS
        self.unit_rows = unit_rows
        has = index.rows_offset >= 0
        self.base = _bases(np.where(has, -(-np.asarray(index.rows, np.int64) // unit_rows), 0))
        self.units = int(self.base[-1])
        self.total = int(self.bytes_of_episodes().sum())

    def bytes_of_episodes(self) -> Ints:
        """int64 [E]: bytes of each episode's rows."""
        everything = np.arange(self.index.episodes)
        return self.index.row_ranges(everything, np.zeros(1, np.int64), self.index.rows)[2]

    def span(self, episode: Ints, first: Ints, count: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(low, high, begin, end) of each window, as in Span."""
        _, begin, size = self.index.row_ranges(episode, first, count)
        base = self.base[episode] + self.first_unit
        low = base + first // self.unit_rows
        return low, np.where(size > 0, base + (first + count - 1) // self.unit_rows + 1, low), begin, begin + size

    def ranges(self, units: Ints) -> tuple[Ints, Ints, Ints]:
        """(shard, offset, size) of each unit."""
        local = units - self.first_unit
        episode = np.searchsorted(self.base, local, side="right") - 1
        first = (local - self.base[episode]) * self.unit_rows
        return self.index.row_ranges(episode, first, np.full(len(units), self.unit_rows))


class ChunksColumn:
    """The units of one large field of a dataset."""

    def __init__(self, dataset: int, index: EpisodeIndex, field: str, first_unit: int, rows_of: Callable[[float], int]):
        self.dataset, self.index, self.first_unit, self.field = dataset, index, first_unit, field
        table = self._table = self._open()
        self.first = np.asarray(table.first, np.int64)
        self.frames = self._frames()
        self.offset, self.size = table.offset, table.size
        frames = int((np.diff(self.first) * self.frames).sum())
        self.unit_rows = rows_of(float(np.asarray(self.size, np.int64).sum()) / max(frames, 1))
        self.group = np.maximum(1, self.unit_rows // self.frames)  # chunks of a unit
        self.base = _bases(-(-np.diff(self.first) // self.group))
        self.units = int(self.base[-1])
        self.total = int(self.bytes_of_episodes().sum())
        whole = {t.name: {f.name for f in t.fields if f.per == "episode"} for t in index.tasks}
        self._whole = np.array([field in whole[t.name] for t in index.tasks] or [False])

    def _open(self) -> Any:
        return self.index.chunk_table(self.field)

    def _frames(self) -> Ints:
        """int64 [E]: rows of a chunk."""
        return np.maximum(np.asarray(self._table.rows, np.int64), 1)

    def _chunks(self, episode: Ints, first: Ints, count: Ints) -> tuple[Ints, Ints]:
        """The chunks [low, high) of each window, counted from its episode's first one."""
        frames, chunks = self.frames[episode], self.first[episode + 1] - self.first[episode]
        return np.minimum(first // frames, chunks), np.minimum(-(-(first + count) // frames), chunks)

    def _shards(self, episode: Ints) -> Ints:
        return self.index.shard[episode]

    def bytes_of_episodes(self) -> Ints:
        """int64 [E]: from each episode's first chunk to its last one."""
        out = np.zeros(len(self.first) - 1, np.int64)
        has = np.flatnonzero(np.diff(self.first) > 0)
        last = self.first[has + 1] - 1
        out[has] = self.offset[last].astype(np.int64) + self.size[last] - self.offset[self.first[has]]
        return out

    def span(self, episode: Ints, first: Ints, count: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(low, high, begin, end) of each window, as in Span."""
        one = self._whole[self.index.task[episode]]
        first, count = np.where(one, 0, first), np.where(one, 1, count)
        group = self.group[episode]
        low, high = self._chunks(episode, first, count)
        some = high > low
        base = self.base[episode] + self.first_unit
        a, z = np.where(some, self.first[episode] + low, 0), np.where(some, self.first[episode] + high - 1, 0)
        end = self.offset[z].astype(np.int64) + self.size[z] if len(self.offset) else a
        begin = self.offset[a].astype(np.int64) if len(self.offset) else a
        return base + low // group, np.where(some, base + -(-high // group), base + low // group), begin, end

    def ranges(self, units: Ints) -> tuple[Ints, Ints, Ints]:
        """(shard, offset, size) of each unit."""
        local = units - self.first_unit
        episode = np.searchsorted(self.base, local, side="right") - 1
        a = self.first[episode] + (local - self.base[episode]) * self.group[episode]
        z = np.minimum(a + self.group[episode], self.first[episode + 1]) - 1
        offset = self.offset[a].astype(np.int64)
        return self._shards(episode), offset, self.offset[z] + self.size[z] - offset


class PacketsColumn(ChunksColumn):
    """The units of one field whose video samples lie in files of their own. A chunk is a group of pictures."""

    _table: PacketTable

    def _open(self) -> PacketTable:
        table = self.index.packets(self.field)
        assert table is not None
        return table

    def _frames(self) -> Ints:
        chunks = np.maximum(np.diff(np.asarray(self._table.first, np.int64)), 1)
        return np.maximum(np.asarray(self.index.rows, np.int64) // chunks, 1)

    def _chunks(self, episode: Ints, first: Ints, count: Ints) -> tuple[Ints, Ints]:
        low, high = np.zeros(len(episode), np.int64), np.zeros(len(episode), np.int64)
        some = np.flatnonzero((np.asarray(self._table.stream[episode]) >= 0) & (count > 0))
        if len(some):
            e, base = episode[some], self.first[episode[some]]
            low[some] = self._table.chunk_of(e, first[some]) - base
            high[some] = self._table.chunk_of(e, first[some] + count[some] - 1) - base + 1
        return low, high

    def needed(self, span: Span, first: Ints, end: Ints, stride: Ints) -> NDArray[np.bool_]:
        """Which units of a span hold a row of [first, end), for each window, whose number is a multiple of its stride."""
        local, owner = span.units - self.first_unit, span.owner
        episode = np.searchsorted(self.base, local, side="right") - 1
        a = self.first[episode] + (local - self.base[episode]) * self.group[episode]
        z = a + self.group[episode]
        last = z >= self.first[episode + 1]
        rows = np.asarray(self._table.row, np.int64)
        stop = np.where(last, self.index.rows[episode], rows[np.where(last, 0, z)])
        low, n = np.maximum(rows[a], first[owner]), stride[owner]
        return -(-low // n) * n < np.minimum(stop, end[owner])

    def _shards(self, episode: Ints) -> Ints:
        shard = np.asarray(self._table.shard[episode])
        return np.where(shard >= 0, shard, self.index.shard[episode])


def _bases(units: Ints) -> Ints:
    """int64 [E + 1]: number of units before each episode."""
    return np.concatenate([[0], np.cumsum(units)]).astype(np.int64)
