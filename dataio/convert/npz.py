"""NPZ files: one episode each, or several in flat arrays with `episode_ends`; also what `tiphys export --to npz`
writes.

Names follow the conventions (`observations`, `obs.image`, `actions`, `rewards`, `terminals`, …). In a file with
`episode_ends` (or `episode_lengths`, or flags `terminals`/`dones`/`timeouts` of which more than the last is set) all
arrays are flat over its steps. A member `_tiphys.json` (as bytes), written by the export, says everything that arrays
cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from tiphys.dataio.convert.archive import open_member, open_zip
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt, group_files
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

_PIECE_BYTES = 256 << 20
TASKS = "tasks.json"  # of an export
ABOUT = "_tiphys.json"
_ENDS, _LENGTHS = "episode_ends", ("episode_lengths", "lengths")
_FLAGS = ("terminated", "truncated")


class Npz(Converter):
    name = "npz"

    @classmethod
    def recognise(cls, source: Source) -> float:
        return 0.8 if any(p.endswith(".npz") for p in source.files) else 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = [p for p in self.source.files if p.endswith(".npz")]
        if not found:
            raise DataError(f"{self.source.url}: no *.npz")
        return found

    @cached_property
    def _exported(self) -> list[TaskSpec]:
        """The tasks, where the folder is an export of ours."""
        if self.source.single or TASKS not in self.source.files:
            return []
        known = self.source.json(TASKS)
        return tasks_of(known.get("tasks") if isinstance(known, dict) else None, self.source.where(TASKS))

    def tasks(self) -> list[TaskSpec]:
        return self._exported or super().tasks()

    def pieces(self) -> list[Piece]:
        return group_files(self.source, self._files, _PIECE_BYTES)

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        number = 0
        for path in piece.data["files"]:
            where = self.source.where(path)
            read = attempt(partial(self._file, path, where), where)
            if isinstance(read, BadEpisode):
                if number >= start:
                    yield read
                number += 1
                continue
            for one in read:
                if number >= start:
                    yield attempt(one, where)
                number += 1

    def _file(self, path: str, where: str) -> list[Any]:
        """What makes each episode of the file."""
        arrays: dict[str, np.ndarray] = {}
        about: dict[str, Any] | None = None
        total = 0
        with self.source.open(path) as stream, open_zip(stream, where) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
            if len(members) > FIELDS:
                raise DataError(f"{where}: {len(members)} members, over {FIELDS}")
            for name in members:
                limit = JSON_BYTES if name == ABOUT else EPISODE_BYTES
                with open_member(archive, name, where, limit) as (member, size):
                    total = check_size(total + size, EPISODE_BYTES, where)
                    if name == ABOUT:
                        about = parse_json(member.read(size), f"{where}, {name}")
                    elif name.endswith(".npy"):
                        arrays[name[:-4]] = read_npy(member, size, f"{where}, {name}")
        if about is not None:
            return [partial(_exported, arrays, about, self._exported, where)]
        base = path.removesuffix(".npz")
        identity = f"{self.source.name}/{base}" if not self.source.single else base
        fields = {canonical(k.replace("/", ".")): v for k, v in arrays.items()}
        bounds = _bounds(fields, where)
        if bounds is None:
            return [lambda: self._episode(fields, identity, where)]
        return [
            lambda i=i: self._episode(
                _cut(fields, bounds[i], bounds[i + 1], bounds[-1]), f"{identity}/{i:06d}", f"{where}, episode {i}"
            )
            for i in range(len(bounds) - 1)
        ]

    def _episode(self, fields: dict[str, np.ndarray], identity: str, where: str) -> Episode:
        steps = _steps(fields, where)
        out: dict[str, Any] = {}
        info: dict[str, Any] = {}
        for name, value in fields.items():
            if value.dtype.kind in "US":
                words = texts(value.reshape(-1).tolist(), f"{where}, {name}")
                out[name] = str(words[0]) if value.ndim == 0 else words
            elif value.ndim == 0:
                info[name] = value.item()
            else:
                flat = name in ("reward", *_FLAGS) and value.ndim == 2 and value.shape[1] == 1
                value = channels_last(value.reshape(len(value)) if flat else value)
                out[name] = value.astype(bool) if name in _FLAGS else value
        return Episode(identity, self.source.name, out, steps, info=info)


def _steps(fields: dict[str, np.ndarray], where: str) -> int:
    """Number of actions: the rows of the actions, else of the rewards, else of the observations."""
    for head in ("action", "reward", "observation"):
        rows = {len(v) for k, v in fields.items() if k.partition(".")[0] == head and v.ndim}
        if len(rows) > 1:
            raise DataError(f"{where}: its {head}s have different numbers of rows ({sorted(rows)[:5]})")
        if rows:
            steps = rows.pop()
            if not 0 < steps <= EPISODE_STEPS:
                raise DataError(f"{where}: an episode of {steps:,} steps")
            return steps
    raise DataError(f"{where}: no array called actions, rewards or observations; name them in a mapping file")


def _bounds(fields: dict[str, np.ndarray], where: str) -> list[int] | None:
    """Rows at which the episodes of a flat file begin and end; None where the file is one episode."""
    lengths = next((fields.pop(n) for n in _LENGTHS if n in fields), None)
    ends = fields.pop(_ENDS, None)
    if ends is None and lengths is not None:
        ends = np.cumsum(lengths.reshape(-1).astype(np.int64))
    if ends is None:
        flags = [fields[n].reshape(-1).astype(bool) for n in _FLAGS if n in fields]
        if not flags or len({len(f) for f in flags}) != 1:
            return None
        done = np.flatnonzero(np.logical_or.reduce(flags)) + 1
        rows = len(flags[0])
        if not len(done) or done[0] == rows:
            return None
        ends = np.unique(np.append(done, rows))
    if ends.dtype.kind not in "iu" or ends.ndim != 1 or not len(ends):
        raise DataError(f"{where}: `{_ENDS}` must be a list of ascending row numbers")
    bounds = [0, *ends.astype(np.int64).tolist()]
    if any(b <= a for a, b in pairwise(bounds)):
        raise DataError(f"{where}: `{_ENDS}` does not ascend")
    steps = _steps(fields, where)
    if bounds[-1] > steps:
        raise DataError(f"{where}: `{_ENDS}` speaks of {bounds[-1]:,} rows, and there are {steps:,}")
    return bounds


def _cut(fields: dict[str, np.ndarray], begin: int, end: int, rows: int) -> dict[str, np.ndarray]:
    return {k: v[begin:end] if v.ndim and len(v) >= rows else v for k, v in fields.items()}


def _exported(arrays: dict[str, np.ndarray], about: Any, tasks: list[TaskSpec], where: str) -> Episode:
    """An episode that `tiphys.dataio.export.npz` wrote."""
    words = about.get("words") if isinstance(about, dict) else None
    task = next((t for t in tasks if isinstance(about, dict) and t.name == about.get("task")), None)
    if task is None or not isinstance(words, dict):
        raise DataError(f"{where}: {ABOUT} is not what an export writes, or {TASKS} lacks its task")
    spoken = {k: texts(v, f"{where}, {k}") for k, v in words.items()}
    return restore(about, {**arrays, **spoken}, task, where)
