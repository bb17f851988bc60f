"""D4RL HDF5: flat arrays over all steps, split into episodes at `terminals` and `timeouts`.
https://github.com/Farama-Foundation/D4RL

If a file has no `timeouts`, an episode also ends where `next_observations` differs from the `observations` of the next
row. The option `max_steps` cuts longer episodes; without it, a file in which no end is found is one episode. If a file
has `next_observations`, the last one of each episode is appended to the episode's observations as row T + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert import hdf5
from tiphys.dataio.convert.converter import Converter, Item, Piece, cut, read_each, whole_number
from tiphys.dataio.convert.infer import channels_last, infer_task
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec

_SCAN_ROWS = 1 << 20  # rows that are searched for episode ends at a time
_PIECE_ROWS = 200_000
_INSPECTED = 4  # episodes of a file from which its fields are inferred
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

    def tasks(self) -> list[TaskSpec]:
        """One task for each file, inferred from its first episodes."""
        out = []
        first = {p.data["files"][0]: p for p in reversed(self.pieces())}
        for path in self._files:
            items = list(islice(self.episodes(first[path]), _INSPECTED)) if path in first else []
            found = [i for i in items if isinstance(i, Episode)]
            if found:
                out.append(infer_task(self._task_name(path), found))
            elif items:
                raise DataError(f"the fields cannot be inferred, because no episode could be read ({items[0]})")
        if not out:
            raise DataError(f"{self.source.url}: has no steps")
        return out

    def pieces(self) -> list[Piece]:
        """Consecutive episodes, about 200,000 rows in each piece."""
        out: list[Piece] = []
        for path, (bounds, _) in self._scanned.items():
            first = begin = 0
            for number, end in enumerate(bounds[1:], 1):
                if end - bounds[begin] >= _PIECE_ROWS or number == len(bounds) - 1:
                    part = bounds[begin : number + 1]
                    out.append(Piece(f"{len(out):06d}", {"files": [path], "first": first, "bounds": part}))
                    first = begin = number
        return out

    def notes(self) -> list[str]:
        return [note for _, note in self._scanned.values() if note]

    @cached_property
    def _scanned(self) -> dict[str, tuple[list[int], str]]:
        """File -> the rows at which its episodes begin, and the end of the last; and what is unclear about them."""
        out: dict[str, tuple[list[int], str]] = {}
        max_steps = whole_number(self.options, "max_steps")
        for path in self._files:
            where = self.source.where(path)
            with hdf5.open_hdf5(self.source, path) as file:
                rows = hdf5.length(hdf5.member(file, "actions", where), f"{where}, actions")
                ends, unclear = self._ends(file, rows, where)
            bounds = np.unique([0, *ends.tolist(), rows]).tolist() if rows else []
            note = f"{path}: {unclear}; to cut after N steps, set `options: {{max_steps: N}}` in the mapping file"
            out[path] = cut(bounds, max_steps), note if unclear and not max_steps else ""
        return out

    def _ends(self, file: Any, rows: int, where: str) -> tuple[np.ndarray, str]:
        """The row after each step that ends an episode, ascending; and why some ends may be missing, or nothing."""
        flags = [n for n in ("terminals", "timeouts") if hdf5.has(file, n)]
        compare = "timeouts" not in flags and hdf5.has(file, "next_observations")
        compare = compare and not hasattr(hdf5.member(file, "next_observations", where), "keys")
        found = [np.zeros(0, np.int64)]
        for start in range(0, rows, _SCAN_ROWS):
            stop = min(rows, start + _SCAN_ROWS)
            ends = np.zeros(stop - start, bool)
            for name in flags:
                values = hdf5.read(hdf5.member(file, name, where), f"{where}, {name}", start, stop)
                if values.size != stop - start:
                    raise DataError(
                        f"{where}: `{name}` does not have one value for each of the {rows:,} rows of `actions`"
                    )
                ends |= checked_flags(values.reshape(-1), f"{where}, {name}")
            if compare:
                breaks = _breaks(file, start, stop, where)
                ends[: len(breaks)] |= breaks
            found.append(np.flatnonzero(ends) + start + 1)
        ends = np.concatenate(found)
        if not len(ends):
            looked = " and ".join(f"`{n}`" for n in [*flags, *(["next_observations"] if compare else [])])
            reason = f"{looked} mark none" if looked else "there is neither `terminals` nor `timeouts`"
            return ends, f"no end of an episode was found ({reason}), so all {rows:,} steps are one episode"
        if "timeouts" not in flags and not compare:
            return (
                ends,
                "there is no `timeouts`, so an episode that ended at its time limit is joined with the next one",
            )
        return ends, ""

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


def _breaks(file: Any, start: int, stop: int, where: str) -> np.ndarray:
    """Whether the next observation of each row differs from the observation of the row after it; NaN equals NaN."""
    following = hdf5.read(hdf5.member(file, "next_observations", where), f"{where}, next_observations", start, stop)
    observations = hdf5.read(hdf5.member(file, "observations", where), f"{where}, observations", start + 1, stop + 1)
    both = min(len(following), len(observations))
    following, observations = following[:both].reshape(both, -1), observations[:both].reshape(both, -1)
    if following.shape != observations.shape:
        raise DataError(f"{where}: the rows of `next_observations` have another shape than those of `observations`")
    same = (following == observations) | ((following != following) & (observations != observations))
    return ~same.all(axis=1)


def _is_by_step(key: str, dataset: Any, rows: int) -> bool:
    """Whether the dataset becomes a field. A required array that is too short does, so that its episodes are malformed."""
    head = key.partition(".")[0]
    if head in _NAMES or head == "next_observations":
        return True
    return head != "metadata" and bool(dataset.shape) and dataset.shape[0] >= rows


def _usual_name(key: str) -> str:
    head, dot, rest = key.partition(".")
    return _NAMES.get(head, "info" if head == "infos" else f"info.{head}") + dot + rest
