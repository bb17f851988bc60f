"""From the bytes of units to `Window`s: every row's CRC is checked, and the windows of a step are decoded task by task.

The rows of `steps.npy` of all windows of a task are decoded together: one pass of CRC and one copy of each column. Large fields
that are stored raw become views of the bytes that arrived; a window with anything else goes through `EpisodeIndex.decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from dataio.encodings import KINDS
from dataio.episode import DataError, FieldSpec, Needs, TaskSpec, Window
from dataio.index import STEPS
from dataio.rows import broken_row, is_large, is_small, row_dtype
from dataio.units import Span, UnitMap, UnitRanges

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dataio.index import EpisodeIndex
    from dataio.sampling import PlannedWindows

Get = Callable[[int], "memoryview | None"]
_ZEROS = bytes(1 << 16)
_RAW = KINDS.index("raw")


class TaskFields(NamedTuple):
    """What a line of the mixture wants of one task: column names, texts and values by episode, large fields."""

    dtype: np.dtype
    columns: tuple[str, ...]
    episodic: tuple[FieldSpec, ...]
    large: tuple[tuple[FieldSpec, int], ...]  # with the bytes of a step; 0 where that is no fixed number
    names: tuple[str, ...]


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
        self, planned: PlannedWindows, spans: Sequence[Span], ranges: Sequence[UnitRanges], get: Get
    ) -> list[Window | DataError]:
        """One a planned window: the Window, or what is wrong with its bytes.

        spans   of the step (UnitMap.spans); ranges: those of each span's units; get: a unit's bytes, None where it has none
        """
        first, count = self.units.rows(planned)
        out: list[Any] = [None] * len(planned.row)
        pieces: dict[tuple[int, str], list[Buffer] | None] = {}
        sizes: dict[tuple[int, str], int] = {}
        for span, where in zip(spans, ranges, strict=True):
            field = self.units.columns[span.column].field
            for window, parts, size in _pieces(span, where, get):
                pieces[window, field], sizes[window, field] = parts, size
        together: dict[tuple[int, int], list[int]] = {}
        for i, (entry, task) in enumerate(zip(planned.entry.tolist(), planned.task.tolist(), strict=True)):
            wanted = self.wanted(entry, task)
            parts = pieces.get((i, STEPS))
            if parts is None or not self._is_raw(planned, i, wanted):
                out[i] = self._one(planned, i, int(first[i]), int(count[i]), wanted, pieces)
            else:
                together.setdefault((entry, task), []).append(i)
        for (entry, task), members in together.items():
            self._many(planned, members, first, count, self.wanted(entry, task), pieces, sizes, out)
        return out

    def _many(
        self,
        planned: PlannedWindows,
        members: Sequence[int],
        first: np.ndarray,
        count: np.ndarray,
        wanted: TaskFields,
        pieces: dict[tuple[int, str], Any],
        sizes: dict[tuple[int, str], int],
        out: list[Any],
    ) -> None:
        """Windows of one entry and task, in one array."""
        row_bytes = wanted.dtype.itemsize
        data = b"".join([part for i in members for part in pieces[i, STEPS]])
        if len(data) != row_bytes * int(sum(count[i] for i in members)) or broken_row(memoryview(data), row_bytes) >= 0:
            for i in members:  # one of them is damaged: each alone says which and where
                out[i] = self._one(planned, i, int(first[i]), int(count[i]), wanted, pieces)
            return
        table = np.frombuffer(data, wanted.dtype)
        raw = {i: self._raw_fields(planned, i, int(first[i]), int(count[i]), wanted, pieces) for i in members}
        columns = [(name, np.ascontiguousarray(table[name])) for name in wanted.columns]
        step = table["_step"].astype(np.int64)
        returns = np.ascontiguousarray(table["_return_to_go"])
        valid = table["_valid"] != 0
        at = 0
        for i in members:
            here = slice(at, at + sizes[i, STEPS] // row_bytes)
            at = here.stop
            large = raw[i]
            if large is None:
                out[i] = self._one(planned, i, int(first[i]), int(count[i]), wanted, pieces)
                continue
            fields: dict[str, Any] = {name: array[here] for name, array in columns} | large
            out[i] = self._window(planned, i, fields, step[here], returns[here], valid[here], wanted)

    def _is_raw(self, planned: PlannedWindows, i: int, wanted: TaskFields) -> bool:
        """Whether all large fields of a window are stored as they are in memory."""
        if not wanted.large:
            return True
        arrays, episode = self._index(planned, i).arrays, planned.episode[i]
        return all(size and arrays[f"chunks.{spec.name}.kind"][episode] == _RAW for spec, size in wanted.large)

    def _raw_fields(
        self,
        planned: PlannedWindows,
        i: int,
        first: int,
        count: int,
        wanted: TaskFields,
        pieces: dict[tuple[int, str], Any],
    ) -> dict[str, np.ndarray] | None:
        """The large fields of a window, from raw chunks that lie side by side; None where that is not so or a CRC differs."""
        out: dict[str, np.ndarray] = {}
        arrays, episode = self._index(planned, i).arrays, int(planned.episode[i])
        for spec, row_bytes in wanted.large:
            name, parts = f"chunks.{spec.name}", pieces.get((i, spec.name))
            frames = int(arrays[f"{name}.rows"][episode])
            begin, end = arrays[f"{name}.first"][episode : episode + 2].tolist()
            low, high = begin + first // frames, min(end, begin + -(-(first + count) // frames))
            if parts is None or high <= low:
                return None
            data = memoryview(b"".join(parts))  # a copy: the pieces may be the cache's own memory
            at = 0
            for size, crc in zip(arrays[f"{name}.size"][low:high].tolist(), arrays[f"{name}.crc"][low:high].tolist()):
                if crc32c(data[at : at + size]) != crc:
                    return None
                at += size
            if at != len(data) or at % row_bytes:
                return None
            rows = np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<")).reshape(at // row_bytes, *spec.shape)
            skip = first - (low - begin) * frames
            rows = rows[skip : skip + count]
            if len(rows) < count:  # the last, observation-only row of a field that has none there
                rows = np.concatenate([rows, np.zeros((count - len(rows), *spec.shape), rows.dtype)])
            out[spec.name] = rows
        return out

    def _one(
        self,
        planned: PlannedWindows,
        i: int,
        first: int,
        count: int,
        wanted: TaskFields,
        pieces: dict[tuple[int, str], Any],
    ) -> Window | DataError:
        """A window by itself, through the index's own decoder."""
        index, episode = self._index(planned, i), int(planned.episode[i])
        try:
            buffers = []
            for part in index.ranges(episode, first, count, wanted.names):
                got = pieces.get((i, part.field))
                if got is None:
                    name = index.shard_name(part.shard)
                    raise DataError(f"{index.url}/{name}, bytes {part.offset}–{part.offset + part.size}: not read")
                buffers.append(got[0] if len(got) == 1 else b"".join(got))
            decoded = index.decode(episode, first, count, wanted.names, buffers)
        except DataError as error:
            return error
        return self._window(
            planned, i, decoded["fields"], decoded["step"], decoded["returns_to_go"], decoded["valid"], None
        )

    def _window(
        self,
        planned: PlannedWindows,
        i: int,
        fields: dict[str, Any],
        step: np.ndarray,
        returns: np.ndarray,
        valid: np.ndarray,
        wanted: TaskFields | None,
    ) -> Window:
        index, entry, episode = self._index(planned, i), int(planned.entry[i]), int(planned.episode[i])
        if wanted is not None:
            for spec in wanted.episodic:
                value = index._episode_value(episode, spec)
                if value is not None:
                    fields[spec.name] = value
        task = int(planned.task[i])
        return Window(
            entry=entry,
            task=task if self.tasks is None else int(self.tasks[entry][task]),
            episode=index.id(episode),
            start=int(planned.start[i]),
            steps=int(planned.units[i]),
            episode_steps=int(index.steps[episode]),
            fields=fields,
            step=step,
            returns_to_go=returns,
            valid=valid,
            prompt=bool(planned.prompt[i]),
            tokens=int(planned.tokens[i]),
        )

    def _index(self, planned: PlannedWindows, i: int) -> EpisodeIndex:
        return self.units.datasets[self.units.entry_dataset[int(planned.entry[i])]]


def _pieces(span: Span, where: UnitRanges, get: Get) -> list[tuple[int, list[Buffer] | None, int]]:
    """(window, its bytes in pieces, their size) for each window of a span; None for the bytes where a unit has none."""
    units, offsets, sizes = span.units.tolist(), where.offset.tolist(), where.size.tolist()
    out: list[tuple[int, list[Buffer] | None, int]] = []
    k = 0
    for window, low, high, begin, end in zip(
        span.window.tolist(), span.low.tolist(), span.high.tolist(), span.begin.tolist(), span.end.tolist(), strict=True
    ):
        parts: list[Buffer] | None = []
        at = begin
        for j in range(k, k + high - low):
            view = get(units[j])
            if view is None or parts is None:
                parts = None
                continue
            offset, size = offsets[j], sizes[j]
            if offset > at:  # between two members lies a tar header, which is in no unit
                parts.append(_ZEROS[: offset - at] if offset - at <= len(_ZEROS) else bytes(offset - at))
                at = offset
            stop = min(offset + size, end)
            parts.append(view if at == offset and stop == offset + size else view[at - offset : stop - offset])
            at = stop
        k += high - low
        out.append((window, parts, end - begin))
    return out


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
