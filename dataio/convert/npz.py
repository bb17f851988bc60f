"""NPZ files, including those that `tiphys export --to npz` writes.

A file holds one episode, or several episodes one after another in flat arrays. It holds several if it has
`episode_ends` or `episode_lengths`, or if a flag (`terminals`, `dones`, `timeouts`, …) is set before the last row.
Names follow the conventions of `infer.canonical` (`observations`, `obs.image`, `actions`, `rewards`, …). The export
adds a member `_tiphys.json` with everything that arrays cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert.archive import open_member, open_zip
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt, cut, group_files, whole_number
from tiphys.dataio.convert.exported import restore, tasks_of
from tiphys.dataio.convert.infer import canonical, channels_last, texts
from tiphys.dataio.convert.limits import (
    EPISODE_BYTES,
    EPISODE_STEPS,
    FIELDS,
    JSON_BYTES,
    check_size,
    parse_json,
    read_npy,
)
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec

_PIECE_BYTES = 256 << 20  # approximate size of a piece
TASKS = "tasks.json"  # written by the export: the tasks of all files
EPISODE_JSON = "_tiphys.json"  # written by the export into each file
_ENDS, _LENGTHS = "episode_ends", ("episode_lengths", "lengths")
_WHOLE = "numbers of rows must be whole numbers; correct the source"
_FLAGS = ("terminated", "truncated")
_BY_STEP = ("observation", "action", "reward", *_FLAGS)  # an array below these that is too short is an error


class Npz(Converter):
    name = "npz"
    options_known = frozenset({"max_steps"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        return 0.8 if any(p.endswith(".npz") for p in source.files) else 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = [p for p in self.source.files if p.endswith(".npz")]
        if not found:
            raise DataError(f"{self.source.url}: there is no file *.npz")
        return found

    @cached_property
    def _exported_tasks(self) -> list[TaskSpec]:
        """The tasks of the export; empty if the folder is not one of our exports."""
        if self.source.single or TASKS not in self.source.files:
            return []
        known = self.source.json(TASKS)
        return tasks_of(known.get("tasks") if isinstance(known, dict) else None, self.source.where(TASKS))

    def tasks(self) -> list[TaskSpec]:
        return self._exported_tasks or super().tasks()

    @cached_property
    def _without_ends(self) -> dict[str, int]:
        """File -> its steps, if it is the only one of the source and was read as one episode."""
        return {}

    def notes(self) -> list[str]:
        return [
            f"{path}: no end of an episode was found, so all {steps:,} steps are one episode; to cut after N steps, set "
            "`options: {max_steps: N}` in the mapping file"
            for path, steps in self._without_ends.items()
        ]

    def pieces(self) -> list[Piece]:
        return group_files(self.source, self._files, _PIECE_BYTES)

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        number = 0
        for path in piece.data["files"]:
            where = self.source.where(path)
            readers = attempt(partial(self._read_file, path, where), where)
            if isinstance(readers, BadEpisode):
                if number >= start:
                    yield readers
                number += 1
                continue
            for read in readers:
                if number >= start:
                    yield attempt(read, where)
                number += 1

    def _read_file(self, path: str, where: str) -> list[Callable[[], Episode]]:
        """One function for each episode of the file, which builds that episode."""
        arrays: dict[str, np.ndarray] = {}
        metadata: dict[str, Any] | None = None
        total = 0
        with self.source.open(path) as stream, open_zip(stream, where) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
            if len(members) > FIELDS:
                raise DataError(f"{where}: {len(members)} members; the limit is {FIELDS}")
            for name in members:
                limit = JSON_BYTES if name == EPISODE_JSON else EPISODE_BYTES
                with open_member(archive, name, where, limit) as (member, size):
                    total = check_size(total + size, EPISODE_BYTES, where)
                    if name == EPISODE_JSON:
                        metadata = parse_json(member.read(size), f"{where}, {name}")
                    elif name.endswith(".npy"):
                        arrays[name[:-4]] = read_npy(member, size, f"{where}, {name}")
                    else:
                        self.leave_out(f"member {name}", "not an array of NumPy")
        if metadata is not None:
            return [partial(_exported_episode, arrays, metadata, self._exported_tasks, where)]
        base = path.removesuffix(".npz")
        identity = f"{self.source.name}/{base}" if not self.source.single else base
        names = self.names.fields({k: canonical(k.replace("/", ".")) for k in arrays}, where)
        fields = {name: arrays[k] for k, name in names.items()}
        bounds = _bounds(fields, where)
        max_steps = whole_number(self.options, "max_steps")
        if bounds is None and not max_steps:
            if len(self._files) == 1 and not any(fields[n].any() for n in _FLAGS if n in fields):
                self._without_ends[path] = _steps(fields, where)
            return [lambda: self._episode(fields, identity, where)]
        total = bounds[-1] if bounds is not None else _steps(fields, where)
        extra = bounds is None  # then observations may have a row after the last action, and so has each part
        bounds = cut(bounds or [0, total], max_steps)

        values = self._by_episode(fields, bounds)

        def read(i: int) -> Episode:
            begin, end = bounds[i], bounds[i + 1]
            rows = {k: v[begin : end + (extra and len(v) == total + 1)] for k, v in fields.items() if v.ndim}
            constant = {k: v for k, v in fields.items() if not v.ndim} | {k: v[i, ...] for k, v in values.items()}
            return self._episode(rows | constant, f"{identity}/{i:06d}", f"{where}, episode {i}")

        return [partial(read, i) for i in range(len(bounds) - 1)]

    def _by_episode(self, fields: dict[str, np.ndarray], bounds: list[int]) -> dict[str, np.ndarray]:
        """Take the arrays out of a flat file's fields that have no row for each step.

        Those with one number or text for each episode are returned; the others are left out.
        """
        found = [k for k, v in fields.items() if v.ndim and len(v) < bounds[-1] and k.partition(".")[0] not in _BY_STEP]
        out = {k: fields.pop(k) for k in found}
        for name in [k for k, v in out.items() if v.shape != (len(bounds) - 1,)]:
            self.leave_out(
                name, f"shape {out.pop(name).shape} has neither a row for each step nor a value for each episode"
            )
        return out

    def _episode(self, fields: dict[str, np.ndarray], identity: str, where: str) -> Episode:
        steps = _steps(fields, where)
        out: dict[str, Any] = {}
        info: dict[str, Any] = {}
        for name, value in fields.items():
            if value.dtype.kind in "US":
                strings = texts(value.reshape(-1).tolist(), f"{where}, {name}")
                out[name] = str(strings[0]) if value.ndim == 0 else strings
            elif value.ndim == 0:
                info[name] = value.item()
            else:
                is_column = name in ("reward", *_FLAGS) and value.ndim == 2 and value.shape[1] == 1
                value = channels_last(value.reshape(len(value)) if is_column else value)
                out[name] = checked_flags(value, f"{where}, {name}") if name in _FLAGS else value
        return Episode(identity, self.source.name, out, steps, info=info)


def _steps(fields: dict[str, np.ndarray], where: str) -> int:
    """Number of steps: the rows of the actions. Without actions, those of the rewards, else of the observations."""
    for kind in ("action", "reward", "observation"):
        rows = {len(v) for k, v in fields.items() if k.partition(".")[0] == kind and v.ndim}
        if len(rows) > 1:
            raise DataError(f"{where}: the arrays of {kind}s have different numbers of rows ({sorted(rows)[:5]})")
        if rows:
            steps = rows.pop()
            if not 0 < steps <= EPISODE_STEPS:
                raise DataError(f"{where}: {steps:,} steps; an episode has 1 to {EPISODE_STEPS:,}")
            return steps
    raise DataError(f"{where}: no array is called actions, rewards or observations; rename the arrays of the file")


def _bounds(fields: dict[str, np.ndarray], where: str) -> list[int] | None:
    """The rows at which the episodes of a flat file begin, and the end of the last; None if the file is one episode."""
    lengths = next((fields.pop(n) for n in _LENGTHS if n in fields), None)
    ends = fields.pop(_ENDS, None)
    if ends is None and lengths is not None:
        ends = np.cumsum(checked_cast(lengths.reshape(-1), np.int64, f"{where}, the lengths of the episodes", _WHOLE))
    if ends is None:
        flags = [checked_flags(fields[n].reshape(-1), f"{where}, {n}") for n in _FLAGS if n in fields]
        if not flags or len({len(f) for f in flags}) != 1:
            return None
        done = np.flatnonzero(np.logical_or.reduce(flags)) + 1
        rows = len(flags[0])
        if not len(done) or done[0] == rows:
            return None
        ends = np.unique(np.append(done, rows))
    if ends.dtype.kind not in "iu" or ends.ndim != 1 or not len(ends):
        raise DataError(f"{where}: `{_ENDS}` must be a one-dimensional list of row numbers")
    bounds = [0, *checked_cast(ends, np.int64, f"{where}, {_ENDS}", _WHOLE).tolist()]
    if any(b <= a for a, b in pairwise(bounds)):
        raise DataError(f"{where}: `{_ENDS}` must ascend, and no episode may have length 0")
    steps = _steps(fields, where)
    if bounds[-1] > steps:
        raise DataError(f"{where}: `{_ENDS}` ends at row {bounds[-1]:,}, but the arrays have {steps:,} rows")
    return bounds


def _exported_episode(arrays: dict[str, np.ndarray], metadata: Any, tasks: list[TaskSpec], where: str) -> Episode:
    """An episode that `tiphys.dataio.export.npz` wrote."""
    words = metadata.get("words") if isinstance(metadata, dict) else None
    task = next((t for t in tasks if isinstance(metadata, dict) and t.name == metadata.get("task")), None)
    if task is None or not isinstance(words, dict):
        raise DataError(
            f"{where}: {EPISODE_JSON} was not written by an export, or {TASKS} lacks the task of the episode"
        )
    step_texts = {k: texts(v, f"{where}, {k}") for k, v in words.items()}
    return restore(metadata, {**arrays, **step_texts}, task, where)
