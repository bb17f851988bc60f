"""D4RL HDF5: flat arrays over all steps, split into episodes at `terminals` and `timeouts`.
https://github.com/Farama-Foundation/D4RL

If a file has no `timeouts`, an episode also ends where `next_observations` differs from the `observations` of the next
row. The option `max_steps` splits longer episodes. If a file has `next_observations`, the last one of each episode is
appended to the episode's observations as row T + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert import hdf5
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import channels_last
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode

_SCAN_ROWS = 1 << 20  # rows that are searched for episode ends at a time
_PIECE_ROWS = 200_000
_NAMES = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    "terminals": "terminated",
    "timeouts": "truncated",
}


class D4rl(Converter):
    name = "d4rl"
    options_known = frozenset({"max_steps"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in hdf5.hdf5_files(source):
            if hdf5.is_hdf5(source, path):
                with hdf5.open_hdf5(source, path) as file:
                    return 0.9 if {"observations", "actions", "rewards"} <= set(file) else 0.0
        return 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = hdf5.hdf5_files(self.source)
        if not found:
            raise DataError(f"{self.source.url}: has no *.hdf5 or *.h5 file")
        return found

    def _task_name(self, path: str) -> str:
        return re.sub(r"\.(hdf5|h5)$", "", path)

    def pieces(self) -> list[Piece]:
        """Consecutive episodes, about 200,000 rows in each piece."""
        out: list[Piece] = []
        for path in self._files:
            with hdf5.open_hdf5(self.source, path) as file:
                ends = self._ends(file, self.source.where(path))
            first = begin = 0
            for number, end in enumerate(ends.tolist(), 1):
                if end - begin >= _PIECE_ROWS or number == len(ends):
                    bounds = [begin, *ends[first:number].tolist()]
                    out.append(Piece(f"{len(out):06d}", {"files": [path], "first": first, "bounds": bounds}))
                    first, begin = number, end
        return out

    def _ends(self, file: Any, where: str) -> np.ndarray:
        """The row after the last row of each episode, ascending. The last end is the number of rows."""
        rows = hdf5.length(hdf5.member(file, "actions", where), f"{where}, actions")
        names = [n for n in ("terminals", "timeouts") if hdf5.has(file, n)]
        max_steps = int(self.options.get("max_steps") or 0)
        if not names:
            raise DataError(f"{where}: has neither `terminals` nor `timeouts`, so the ends of its episodes are unknown")
        compare_next = (
            "timeouts" not in names
            and hdf5.has(file, "next_observations")
            and not hasattr(hdf5.member(file, "next_observations", where), "keys")
        )
        found = []
        for start in range(0, rows, _SCAN_ROWS):
            stop = min(rows, start + _SCAN_ROWS)
            flags = np.zeros(stop - start, bool)
            for name in names:
                values = hdf5.read(hdf5.member(file, name, where), f"{where}, {name}", start, stop)
                if values.size != stop - start:
                    raise DataError(
                        f"{where}: `{name}` does not have one value for each of the {rows:,} rows of `actions`"
                    )
                flags |= checked_flags(values.reshape(-1), f"{where}, {name}")
            if compare_next:
                next_observations = hdf5.read(hdf5.member(file, "next_observations", where), where, start, stop)
                observations = hdf5.read(hdf5.member(file, "observations", where), where, start + 1, stop + 1)
                both = min(len(next_observations), len(observations))
                breaks = (next_observations[:both] != observations[:both]).reshape(both, -1).any(axis=1)
                flags[:both] |= breaks
            found.append(np.flatnonzero(flags) + start + 1)
        ends = np.concatenate([*found, [rows]]) if rows else np.zeros(0, np.int64)
        ends = np.unique(ends)
        if max_steps > 0:
            begins = np.concatenate([[0], ends[:-1]])
            ends = np.concatenate(
                [np.append(np.arange(b + max_steps, e, max_steps), e) for b, e in zip(begins, ends, strict=True)]
            )
        return ends.astype(np.int64)

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        path, first, bounds = piece.data["files"][0], piece.data["first"], piece.data["bounds"]
        where = self.source.where(path)
        with hdf5.open_hdf5(self.source, path) as file:
            found = hdf5.datasets(file, where)
            rows = hdf5.length(hdf5.member(file, "actions", where), f"{where}, actions")
            columns = {k: d for k, d in found.items() if _is_by_step(k, d, rows)}
            for key in sorted(found.keys() - columns.keys()):
                self.leave_out(key, "not an array with one row per step")
            usual = {k: _usual_name(k) for k in columns if k.partition(".")[0] != "next_observations"}
            names = self.names.fields(usual, where)

            def place(i: int) -> str:
                return f"{where}, episode {first + i} (rows {bounds[i]}–{bounds[i + 1]})"

            yield from read_each(
                range(len(bounds) - 1),
                lambda i: self._read(columns, names, path, first + i, bounds[i], bounds[i + 1], place(i)),
                place,
                start,
            )

    def _read(
        self,
        columns: dict[str, Any],
        names: dict[str, str],
        path: str,
        number: int,
        begin: int,
        end: int,
        where: str,
    ) -> Episode:
        task = self._task_name(path)
        fields: dict[str, Any] = {}
        steps = end - begin
        for key, name in names.items():
            value = hdf5.read(columns[key], f"{where}, {key}", begin, end)
            if name in ("reward", "terminated", "truncated"):
                if value.size != steps:
                    raise DataError(f"{where}: `{key}` has shape {value.shape}, one number per step is expected")
                value = value.reshape(steps)
            flag = name in ("terminated", "truncated")
            fields[name] = checked_flags(value, f"{where}, {key}") if flag else channels_last(value)
        for key, dataset in columns.items():  # the observation after the last action
            head, dot, rest = key.partition(".")
            name = names.get(f"observations{dot}{rest}", "")
            if head == "next_observations" and name:
                last = channels_last(hdf5.read(dataset, f"{where}, {key}", end - 1, end))
                if last.shape != (1, *fields[name].shape[1:]):
                    raise DataError(
                        f"{where}: `{key}` has fewer rows than `actions`, or rows of another shape than `observations`"
                    )
                fields[name] = np.concatenate([fields[name], checked_cast(last, fields[name].dtype, f"{where}, {key}")])
        return Episode(id=f"{task}/{number:08d}", task=task, fields=fields, steps=steps)


def _is_by_step(key: str, dataset: Any, rows: int) -> bool:
    """Whether the dataset becomes a field. A required array that is too short does, so that its episodes are malformed."""
    head = key.partition(".")[0]
    if head in _NAMES or head == "next_observations":
        return True
    return head != "metadata" and bool(dataset.shape) and dataset.shape[0] >= rows


def _usual_name(key: str) -> str:
    head, dot, rest = key.partition(".")
    return _NAMES.get(head, "info" if head == "infos" else f"info.{head}") + dot + rest
