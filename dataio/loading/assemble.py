"""From the bytes of units to `Window`s: every row's CRC is checked, and the windows of a step are decoded task by task.

The rows of `steps.npy` of all windows of a task are decoded together, with one pass of CRC and one copy of each column. Large
fields that are stored raw become views of the bytes that arrived. All other windows go through `EpisodeIndex.decode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from tiphys.dataio.bounds import expand
from tiphys.dataio.episode import DataError, FieldSpec, Needs, TaskSpec, Window
from tiphys.dataio.format.encodings import KINDS
from tiphys.dataio.format.places import STEPS
from tiphys.dataio.format.rows import broken_row, is_large, is_small, row_dtype
from tiphys.dataio.loading.decode_note import DecodeNote, Decoding
from tiphys.dataio.loading.gather import UNWANTED, Copy, Gathered, gather
from tiphys.dataio.loading.units import Span, UnitMap, UnitRanges

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import PlannedWindows

_RAW = KINDS.index("raw")


class TaskFields(NamedTuple):
    """The fields of one task that a mixture entry needs: columns of `steps.npy`, values of whole episodes, large fields."""

    dtype: np.dtype
    columns: tuple[str, ...]
    episodic: tuple[FieldSpec, ...]
    large: tuple[tuple[FieldSpec, int], ...]  # with the bytes of a step; 0 if these vary
    names: tuple[str, ...]
    strides: Mapping[str, int]  # see Needs


# Of a Window: task, episode, start, steps, episode_steps, prompt, tokens
_Facts = tuple[int, str, int, int, int, bool, int]


class _Step(NamedTuple):
    """The windows of a training step: first row and number of rows of each, and their bytes."""

    planned: PlannedWindows
    first: np.ndarray
    rows: np.ndarray
    gathered: Gathered


class Assembler:
    """Decodes the windows of a plan.

    tasks   entry -> task of its dataset -> the task's number in the run's list; None: the dataset's own numbers
    note    where to note what is being decoded
    deadly  (fingerprint of a dataset, episode) -> what happened when it was decoded; never decoded again
    """

    def __init__(
        self,
        units: UnitMap,
        tasks: Sequence[np.ndarray] | None = None,
        note: DecodeNote | None = None,
        deadly: Mapping[tuple[str, int], str] | None = None,
    ):
        self.units, self.tasks, self.note, self.deadly = units, tasks, note, deadly or {}
        self._wanted: dict[tuple[int, int], TaskFields] = {}

    def wanted(self, entry: int, task: int) -> TaskFields:
        """The fields of a task of the entry's dataset that the entry needs."""
        known = self._wanted.get((entry, task))
        if known is None:
            index = self.units.datasets[self.units.entry_dataset[entry]]
            known = self._wanted[entry, task] = _task_fields(index.tasks[task], self.units.needs[entry])
        return known

    def windows(
        self, planned: PlannedWindows, spans: Sequence[Span], ranges: Sequence[UnitRanges], copy: Copy
    ) -> list[Window | DataError]:
        """For each planned window: the Window, or a DataError that says what is wrong with its bytes.

        spans   of the step (UnitMap.spans)
        ranges  of each span's units
        copy    gives the units' bytes
        """
        first, count = self.units.rows(planned)
        gathered = gather(planned, self.units, spans, ranges, copy)
        step = _Step(planned=planned, first=first, rows=count, gathered=gathered)
        out: list[Any] = [None] * len(planned.row)
        for entry, task in sorted(set(zip(planned.entry.tolist(), planned.task.tolist(), strict=True))):
            here, wanted = np.flatnonzero((planned.entry == entry) & (planned.task == task)), self.wanted(entry, task)
            simple = self._simple(step, here, entry, wanted)
            self._many(step, here[simple], entry, wanted, out)
            for i in here[~simple].tolist():
                out[i] = self._one(step, i, wanted)
        return out

    def _simple(self, step: _Step, here: np.ndarray, entry: int, wanted: TaskFields) -> np.ndarray:
        """Mask of the windows that have rows of `steps.npy`, whose bytes are all here, and whose large fields are stored raw."""
        index, episode = self._index(entry), step.planned.episode[here]
        none = np.full(len(here), UNWANTED)
        begins = {name: begin[here] for name, begin in step.gathered.begin.items()}
        simple = np.asarray(begins.get(STEPS, none) >= 0)
        for spec, row_bytes in wanted.large:
            if not index.has_chunks(spec.name):  # packets only
                return np.zeros(len(here), bool)
            raw = index.chunk_table(spec.name).kind[episode] == _RAW if row_bytes else none == 0
            simple &= raw & (begins.get(spec.name, none) >= 0)
        return simple

    def _many(self, step: _Step, here: np.ndarray, entry: int, wanted: TaskFields, out: list[Any]) -> None:
        """Decode windows of one entry and task together. Their rows lie one after the other."""
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
        if table is None or not np.array_equal(table["_step"], asked):  # valid rows can still be the wrong ones
            for i in here.tolist():  # one window is damaged or absent: decoded alone, each says whether and where
                out[i] = self._one(step, i, wanted)
            return
        large = [(spec.name, self._raw_field(step, here, entry, spec, row_bytes)) for spec, row_bytes in wanted.large]
        columns = [(name, np.ascontiguousarray(table[name])) for name in wanted.columns]
        steps, valid = asked, table["_valid"] != 0
        returns = np.ascontiguousarray(table["_return_to_go"])
        at, each = 0, zip(here.tolist(), step.rows[here].tolist(), self._facts(step.planned, here), strict=True)
        for k, (i, count, (number, episode, start, length, episode_steps, prompt, tokens)) in enumerate(each):
            part = slice(at, at + count)
            at += count
            fields: dict[str, Any] = {name: array[part] for name, array in columns}
            for name, arrays in large:
                fields[name] = arrays[k]
            if any(arrays[k] is None for _, arrays in large):
                out[i] = self._one(step, i, wanted)
            else:
                fields |= self._episodic(step.planned, i, wanted)
                out[i] = Window(
                    entry=entry,
                    task=number,
                    episode=episode,
                    start=start,
                    steps=length,
                    episode_steps=episode_steps,
                    fields=fields,
                    step=steps[part],
                    returns_to_go=returns[part],
                    valid=valid[part],
                    prompt=prompt,
                    tokens=tokens,
                )

    def _raw_field(
        self, step: _Step, here: np.ndarray, entry: int, spec: FieldSpec, row_bytes: int
    ) -> list[np.ndarray | None]:
        """A large field of some windows, from raw chunks. None for a window whose chunks do not lie side by side, or if a CRC
        differs."""
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
            if len(rows) < rows_wanted:  # the episode's last row holds only an observation, without this field
                rows = np.concatenate([rows, np.zeros((rows_wanted - len(rows), *spec.shape), rows.dtype)])
            out.append(rows)
        return out

    def _one(self, step: _Step, i: int, wanted: TaskFields) -> Window | DataError:
        """Decode one window alone, through the index's own decoder."""
        planned = step.planned
        index, episode = self._index(int(planned.entry[i])), int(planned.episode[i])
        first, count = int(step.first[i]), int(step.rows[i])
        try:
            buffers = []
            for part in index.ranges(episode, first, count, wanted.names):
                got = step.gathered.part(part.field, i)
                if got is None:
                    name = index.shard_name(part.shard)
                    raise DataError(
                        f"{index.url}/{name}, bytes {part.offset}–{part.offset + part.size}: could not be read"
                    )
                buffers.append(got)
            decoded = self._decoded(index, episode, first, count, wanted, buffers)
        except DataError as error:
            return error
        return self.window(planned, i, decoded)

    def _decoded(
        self, index: EpisodeIndex, episode: int, first: int, count: int, wanted: TaskFields, buffers: Sequence[Any]
    ) -> dict[str, Any]:
        """`EpisodeIndex.decode`, with a note for our parent if a decoder of pictures may crash."""
        known = self.deadly.get((index.fingerprint, episode))
        if known is not None:
            raise DataError(known)
        note = self.note
        if note is None:
            return index.decode(episode, first, count, wanted.names, buffers, strides=wanted.strides)
        try:
            return index.decode(
                episode,
                first,
                count,
                wanted.names,
                buffers,
                lambda part: note.write(Decoding(index.fingerprint, episode, index.place(episode, part))),
                wanted.strides,
            )
        finally:
            note.clear()

    def window(self, planned: PlannedWindows, i: int, decoded: Mapping[str, Any]) -> Window:
        """The i-th planned window, from what `EpisodeIndex.decode` returned for it."""
        ((task, episode, start, length, episode_steps, prompt, tokens),) = self._facts(planned, np.array([i]))
        return Window(
            entry=int(planned.entry[i]),
            task=task,
            episode=episode,
            start=start,
            steps=length,
            episode_steps=episode_steps,
            fields=decoded["fields"],
            step=decoded["step"],
            returns_to_go=decoded["returns_to_go"],
            valid=decoded["valid"],
            prompt=prompt,
            tokens=tokens,
        )

    def _facts(self, planned: PlannedWindows, here: np.ndarray) -> Iterator[_Facts]:
        """What is known of some windows of one entry without their bytes."""
        entry, episode, task = int(planned.entry[here[0]]), planned.episode[here], planned.task[here]
        index = self._index(entry)
        task = task if self.tasks is None else self.tasks[entry][task]
        starts, units, steps = planned.start[here], planned.units[here], index.steps[episode]
        lists = (a.tolist() for a in (starts, units, steps, planned.prompt[here], planned.tokens[here]))
        return zip(task.tolist(), index.ids.many(episode), *lists, strict=True)

    def _episodic(self, planned: PlannedWindows, i: int, wanted: TaskFields) -> dict[str, Any]:
        """The fields with one value for the whole episode, as far as the episode has them."""
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
    names = tuple(n for n in needs.fields if n in known)  # the tasks of one mixture entry may have different fields
    chosen = [known[n] for n in names]
    return TaskFields(
        row_dtype(task),
        tuple(f.name for f in chosen if is_small(f)),
        tuple(f for f in chosen if not is_small(f) and not is_large(f)),
        tuple((f, _fixed_bytes(f)) for f in chosen if is_large(f)),
        names,
        dict(needs.strides),
    )
