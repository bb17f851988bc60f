"""From the bytes of units to `Window`s: every row's CRC is checked, and the windows of a step are decoded task by task.

The rows of `steps.npy` of all windows of a task are decoded together: one pass of CRC and one copy of each column. Large fields
that are stored raw become views of the bytes that arrived; a window with anything else goes through `EpisodeIndex.decode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError, FieldSpec, Needs, TaskSpec, Window
from tiphys.dataio.format.encodings import KINDS
from tiphys.dataio.format.rows import broken_row, is_large, is_small, row_dtype
from tiphys.dataio.index import STEPS
from tiphys.dataio.loading.gather import UNWANTED, Copy, Gathered, gather
from tiphys.dataio.loading.units import Span, UnitMap, UnitRanges, expand

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import PlannedWindows

_RAW = KINDS.index("raw")


class TaskFields(NamedTuple):
    """What a line of the mixture wants of one task: column names, texts and values by episode, large fields."""

    dtype: np.dtype
    columns: tuple[str, ...]
    episodic: tuple[FieldSpec, ...]
    large: tuple[tuple[FieldSpec, int], ...]  # with the bytes of a step; 0 where that is no fixed number
    names: tuple[str, ...]


_Head = tuple[int, int, str, int, int, int]  # the elements of a Window before its fields
_Tail = tuple[bool, int]  # and after its arrays


class _Step(NamedTuple):
    """The windows of a step: first row and rows of each, and their bytes."""

    planned: PlannedWindows
    first: np.ndarray
    rows: np.ndarray
    gathered: Gathered


class Assembler:
    """Decodes the windows of a plan.

    tasks  entry -> task of its dataset -> the task's number in the run's list (None: the dataset's own numbers)
    """

    def __init__(self, units: UnitMap, tasks: Sequence[np.ndarray] | None = None):
        self.units, self.tasks = units, tasks
        self._wanted: dict[tuple[int, int], TaskFields] = {}

    def wanted(self, entry: int, task: int) -> TaskFields:
        known = self._wanted.get((entry, task))
        if known is None:
            index = self.units.datasets[self.units.entry_dataset[entry]]
            known = self._wanted[entry, task] = _task_fields(index.tasks[task], self.units.needs[entry])
        return known

    def windows(
        self, planned: PlannedWindows, spans: Sequence[Span], ranges: Sequence[UnitRanges], copy: Copy
    ) -> list[Window | DataError]:
        """One a planned window: the Window, or what is wrong with its bytes.

        spans  of the step (UnitMap.spans); ranges: those of each span's units; copy: where their bytes come from
        """
        first, count = self.units.rows(planned)
        step = _Step(planned, first, count, gather(planned, self.units, spans, ranges, copy))
        out: list[Any] = [None] * len(planned.row)
        for entry, task in sorted(set(zip(planned.entry.tolist(), planned.task.tolist(), strict=True))):
            here, wanted = np.flatnonzero((planned.entry == entry) & (planned.task == task)), self.wanted(entry, task)
            simple = self._simple(step, here, entry, wanted)
            self._many(step, here[simple], entry, wanted, out)
            for i in here[~simple].tolist():
                out[i] = self._one(step, i, wanted)
        return out

    def _simple(self, step: _Step, here: np.ndarray, entry: int, wanted: TaskFields) -> np.ndarray:
        """Mask of windows with rows of `steps.npy`, whose bytes are all here and whose large fields are stored raw."""
        index, episode = self._index(entry), step.planned.episode[here]
        none = np.full(len(here), UNWANTED)
        begins = {name: begin[here] for name, begin in step.gathered.begin.items()}
        simple = np.asarray(begins.get(STEPS, none) >= 0)
        for spec, row_bytes in wanted.large:
            raw = index.chunk_table(spec.name).kind[episode] == _RAW if row_bytes else none == 0
            simple &= raw & (begins.get(spec.name, none) >= 0)
        return simple

    def _many(self, step: _Step, here: np.ndarray, entry: int, wanted: TaskFields, out: list[Any]) -> None:
        """Windows of one entry and task whose rows lie one after the other, decoded together."""
        if not len(here):
            return
        row_bytes = wanted.dtype.itemsize
        begin, size = step.gathered.begin[STEPS][here], step.gathered.size[STEPS][here]
        order = np.argsort(begin)
        here, begin, size = here[order], begin[order], size[order]
        low, high = int(begin[0]), int(begin[-1] + size[-1])
        data = step.gathered.data[low:high]
        together = high - low == int(size.sum()) and (size == step.rows[here] * row_bytes).all()
        table = data.view(wanted.dtype) if together and broken_row(data.data, row_bytes) < 0 else None
        asked = expand(step.first[here], step.first[here] + step.rows[here])
        if table is None or not np.array_equal(table["_step"], asked):  # sound rows may still be others
            for i in here.tolist():  # one of them is damaged, or not here: each alone says which and where
                out[i] = self._one(step, i, wanted)
            return
        large = [(spec.name, self._raw_field(step, here, entry, spec, row_bytes)) for spec, row_bytes in wanted.large]
        columns = [(name, np.ascontiguousarray(table[name])) for name in wanted.columns]
        steps, valid = asked, table["_valid"] != 0
        returns = np.ascontiguousarray(table["_return_to_go"])
        facts, at = self._facts(step.planned, here), 0
        for k, (i, count, (head, tail)) in enumerate(zip(here.tolist(), step.rows[here].tolist(), facts, strict=True)):
            part = slice(at, at + count)
            at += count
            fields: dict[str, Any] = {name: array[part] for name, array in columns}
            for name, arrays in large:
                fields[name] = arrays[k]
            if any(arrays[k] is None for _, arrays in large):
                out[i] = self._one(step, i, wanted)
            else:
                fields |= self._episodic(step.planned, i, wanted)
                out[i] = Window(*head, fields, steps[part], returns[part], valid[part], *tail)

    def _raw_field(
        self, step: _Step, here: np.ndarray, entry: int, spec: FieldSpec, row_bytes: int
    ) -> list[np.ndarray | None]:
        """A large field of some windows, from raw chunks that lie side by side; None where that is not so or a CRC differs."""
        table, episode = self._index(entry).chunk_table(spec.name), step.planned.episode[here]
        first, count = step.first[here], step.rows[here]
        frames = np.maximum(table.rows[episode].astype(np.int64), 1)
        low = table.first[episode] + first // frames
        high = np.minimum(table.first[episode + 1], table.first[episode] - (-(first + count) // frames))
        every = expand(low, np.maximum(low, high))
        sizes, crcs = table.size[every].tolist(), table.crc[every].tolist()
        skips = (first - (low - table.first[episode]) * frames).tolist()
        dtype, view = np.dtype(spec.dtype).newbyteorder("<"), step.gathered.data.data
        out: list[np.ndarray | None] = []
        k = 0
        for begin, size, n, skip, rows_wanted in zip(
            step.gathered.begin[spec.name][here].tolist(),
            step.gathered.size[spec.name][here].tolist(),
            (high - low).tolist(),
            skips,
            count.tolist(),
        ):
            at, good = begin, n > 0 and size % row_bytes == 0
            for chunk in range(k, k + n):
                end = at + sizes[chunk]
                good = good and crc32c(view[at:end]) == crcs[chunk]
                at = end
            k += max(n, 0)
            if not good or at != begin + size:
                out.append(None)
                continue
            rows = step.gathered.data[begin:at].view(dtype).reshape(size // row_bytes, *spec.shape)
            rows = rows[skip : skip + rows_wanted]
            if len(rows) < rows_wanted:  # the last, observation-only row of a field that has none there
                rows = np.concatenate([rows, np.zeros((rows_wanted - len(rows), *spec.shape), rows.dtype)])
            out.append(rows)
        return out

    def _one(self, step: _Step, i: int, wanted: TaskFields) -> Window | DataError:
        """A window by itself, through the index's own decoder."""
        planned = step.planned
        index, episode = self._index(int(planned.entry[i])), int(planned.episode[i])
        first, count = int(step.first[i]), int(step.rows[i])
        try:
            buffers = []
            for part in index.ranges(episode, first, count, wanted.names):
                got = step.gathered.part(part.field, i)
                if got is None:
                    name = index.shard_name(part.shard)
                    raise DataError(f"{index.url}/{name}, bytes {part.offset}–{part.offset + part.size}: not read")
                buffers.append(got)
            decoded = index.decode(episode, first, count, wanted.names, buffers)
        except DataError as error:
            return error
        return self.window(planned, i, decoded)

    def window(self, planned: PlannedWindows, i: int, decoded: Mapping[str, Any]) -> Window:
        """A window from what `EpisodeIndex.decode` gave of it."""
        ((head, tail),) = self._facts(planned, np.array([i]))
        return Window(*head, decoded["fields"], decoded["step"], decoded["returns_to_go"], decoded["valid"], *tail)

    def _facts(self, planned: PlannedWindows, here: np.ndarray) -> list[tuple[_Head, _Tail]]:
        """The first and the last elements of some Windows of one entry: what is known without their bytes."""
        entry, episode, task = int(planned.entry[here[0]]), planned.episode[here], planned.task[here]
        index = self._index(entry)
        task = task if self.tasks is None else self.tasks[entry][task]
        starts, units, steps = planned.start[here], planned.units[here], index.steps[episode]
        lists = (a.tolist() for a in (task, starts, units, steps, planned.prompt[here], planned.tokens[here]))
        return [
            ((entry, t, name, start, length, of), (prompt, tokens))
            for name, t, start, length, of, prompt, tokens in zip(index.ids.many(episode), *lists, strict=True)
        ]

    def _episodic(self, planned: PlannedWindows, i: int, wanted: TaskFields) -> dict[str, Any]:
        """Fields with one value for the whole episode, where it has them."""
        if not wanted.episodic:
            return {}
        index, episode = self._index(int(planned.entry[i])), int(planned.episode[i])
        values = ((spec.name, index.episode_value(episode, spec)) for spec in wanted.episodic)
        return {name: value for name, value in values if value is not None}

    def _index(self, entry: int) -> EpisodeIndex:
        return self.units.datasets[self.units.entry_dataset[entry]]


def _fixed_bytes(field: FieldSpec) -> int:
    return field.bytes_per_step if field.per == "step" and 0 not in field.shape else 0


def _task_fields(task: TaskSpec, needs: Needs) -> TaskFields:
    known = {f.name: f for f in task.fields}
    names = tuple(n for n in needs.fields if n in known)  # one line of a mixture may hold tasks of several shapes
    chosen = [known[n] for n in names]
    return TaskFields(
        row_dtype(task),
        tuple(f.name for f in chosen if is_small(f)),
        tuple(f for f in chosen if not is_small(f) and not is_large(f)),
        tuple((f, _fixed_bytes(f)) for f in chosen if is_large(f)),
        names,
    )
