"""PlanIndex: the drawable episodes of a mixture, sorted by bucket and kind, with running sums that make a draw one bisection.

A *stratum* is one task of one entry of the mixture; a *bucket* is a residue of the episodes' hashes, which knows nothing of
processes; a *cell* is a stratum within a bucket. Built once from all episodes (or opened memory-mapped); a change of the
mixture's weights needs none of it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from tiphys.dataio.plan.entries import PlanEntry

_GUIDED, _MANY, _LARGE = 16, 512, 1 << 17  # see PlanIndex.find
_FORMAT = 2  # of the saved arrays
_CHUNK = 1 << 22  # episodes worked on at once
_LEVEL_WORK = 5e7  # multiplications of one pass of the renewal calculation: some 50 ms


@dataclass(frozen=True)
class Strata:
    """One element a stratum: entry, task of the entry's index, most units of a window, tokens a unit, prompts, and `least`,
    the tokens that must be left in a row for a window of the stratum to be begun: one unit beside the largest fixed part."""

    entry: NDArray[np.int64]
    task: NDArray[np.int64]
    window: NDArray[np.int64]
    per_unit: NDArray[np.int64]
    prompt: NDArray[np.float64]
    prompt_units: NDArray[np.int64]
    least: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.entry)


@dataclass(frozen=True)
class PlanIndex:
    """Arrays over the drawable episodes in the order of (cell, number in their index); cell = bucket · strata + stratum.

    episode   int32 [n]: number in the entry's index
    units     int32 [n]
    fixed     int32 [n]
    mass      float64 [n + 1]: running sum of mass, that is, windows (or tiles) × priority
    tokens    float64 [n + 1]: running sum of tokens of all tiles; only for epochs, else empty
    guide     int32: what `find` says of 0, 1, 2, … times `_spacing`, up to the whole mass and once beyond
    first     int64 [cells + 1]: first episode of each cell
    level_cell, level, level_mass: histogram of window mass over tokens a window, where it is not 0; tokens are `level · grain`
    square    float64 [cells]: sum of squared masses
    prompt_cost  float64 [strata]: mean tokens of a prompt
    too_long  int64 [entries]: episodes left out because one unit with their fixed tokens exceeds a row
    """

    buckets: int
    grain: int
    strata: Strata
    episode: NDArray[np.int32]
    units: NDArray[np.int32]
    fixed: NDArray[np.int32]
    mass: NDArray[np.float64]
    guide: NDArray[np.int32]
    tokens: NDArray[np.float64]
    first: NDArray[np.int64]
    level_cell: NDArray[np.int64]
    level: NDArray[np.int64]
    level_mass: NDArray[np.float64]
    square: NDArray[np.float64]
    prompt_cost: NDArray[np.float64]
    too_long: NDArray[np.int64]

    @property
    def cells(self) -> int:
        return self.buckets * len(self.strata)

    @property
    def cell_mass(self) -> NDArray[np.float64]:
        """[buckets, strata]"""
        return np.diff(self.mass[self.first]).reshape(self.buckets, -1)

    def find(self, point: NDArray[np.float64]) -> NDArray[np.int64]:
        """The episode in whose part of the running mass each point lies: the last place where `mass` is at most the point.

        Many points in a large index are looked up all at once: `guide` (Chen and Asau 1974) leaves few places for each, which
        are halved; the processor fetches for many points what a bisection of one after the other would wait for.
        """
        if len(point) < _MANY or len(self.mass) < _LARGE:
            return np.searchsorted(self.mass, point, side="right") - 1
        cell = (point / _spacing(self.mass)).astype(np.int64)  # exact, because the spacing is a power of two
        place = self.guide[cell].astype(np.int64)
        most, further, mass = int((self.guide[cell + 1] - place).max()), np.empty_like(place), np.empty_like(point)
        step = 1 << most.bit_length() >> 1
        while step:
            np.add(place, step, out=further)
            np.take(self.mass, further, out=mass, mode="clip")
            np.copyto(place, further, where=mass <= point)
            step //= 2
        return np.minimum(place, len(self.mass) - 1)

    @classmethod
    def open(
        cls,
        entries: Sequence[PlanEntry],
        *,
        buckets: int,
        budget: int,
        validation: float,
        held_out: bool,
        tiles: bool,
        cache_dir: str = "",
    ) -> PlanIndex:
        """Builds the index, or, with a folder, builds it there once and maps it into memory."""
        if not cache_dir:
            return _build(entries, buckets, budget, validation, held_out, tiles)
        key = digest(entries, [_FORMAT, buckets, budget, validation, held_out, tiles])
        folder = os.path.join(cache_dir, f"plan-{key[:24]}")
        if not os.path.exists(os.path.join(folder, "plan.json")):
            _build(entries, buckets, budget, validation, held_out, tiles).save(folder)
        return cls.load(folder)

    def save(self, folder: str) -> None:
        """Writes the arrays; another process that did the same a moment earlier wins."""
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".plan-", dir=os.path.dirname(folder))
        try:
            for name, array in self._arrays().items():
                np.save(os.path.join(temporary, f"{name}.npy"), array)
            with open(os.path.join(temporary, "plan.json"), "w") as file:
                json.dump({"buckets": self.buckets, "grain": self.grain}, file)
            os.rename(temporary, folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.exists(os.path.join(folder, "plan.json")):
                raise

    @classmethod
    def load(cls, folder: str) -> PlanIndex:
        with open(os.path.join(folder, "plan.json")) as file:
            numbers = json.load(file)

        def read(name: str) -> NDArray[Any]:
            return np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)

        strata = Strata(**{f.name: np.array(read(f"strata.{f.name}")) for f in fields(Strata)})
        arrays: dict[str, Any] = {
            f.name: read(f.name) for f in fields(cls) if f.name not in ("buckets", "grain", "strata")
        }
        return cls(strata=strata, **numbers, **arrays)

    def _arrays(self) -> dict[str, NDArray]:
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("buckets", "grain", "strata")}
        return out | {f"strata.{f.name}": getattr(self.strata, f.name) for f in fields(Strata)}


def digest(entries: Sequence[PlanEntry], numbers: Sequence[object]) -> str:
    """Names everything that a plan's draws depend on beside seed and weights: the data, lengths, priorities and these numbers."""
    out = hashlib.sha256(json.dumps(numbers).encode())
    for entry in entries:
        lengths = entry.lengths
        out.update(json.dumps([entry.index.fingerprint, [int(t) for t in entry.tasks], float(lengths.prompt)]).encode())
        arrays = (lengths.units, lengths.window, lengths.per_unit, lengths.fixed, lengths.prompt_units, entry.priority)
        for given in arrays:
            if given is None:
                out.update(b"none")
            else:
                array: NDArray[Any] = np.ascontiguousarray(given)
                out.update(f"{array.dtype.str}{array.shape}".encode())
                out.update(array.data)
    return out.hexdigest()


def sums(where: NDArray[np.int64], values: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """Sum of the values at each of the places 0 … number − 1."""
    return np.bincount(where, values, number).astype(np.float64, copy=False)


def _spacing(mass: NDArray[np.float64]) -> float:
    """A power of two of which there are about as many in the whole mass as groups of _GUIDED places."""
    places = max(len(mass) // _GUIDED, 1)
    return float(2.0 ** np.ceil(np.log2(mass[-1] / places))) if mass[-1] > 0 else 1.0


def _guide(mass: NDArray[np.float64]) -> NDArray[np.int32]:
    spacing = _spacing(mass)
    points = np.arange(int(mass[-1] / spacing) + 2) * spacing
    return (np.searchsorted(mass, points, side="right") - 1).astype(np.int32)


def tile_count(units: NDArray, window: NDArray) -> NDArray[np.int64]:
    """Disjoint tiles of at most `window` units that cover each episode."""
    count: NDArray[np.int64] = -(-units.astype(np.int64) // window)
    return count


def _strata(entries: Sequence[PlanEntry], budget: int) -> dict[str, NDArray]:
    rows = [(i, int(t)) for i, entry in enumerate(entries) for t in entry.tasks]
    entry, task = (np.array(x, np.int64) for x in (zip(*rows) if rows else ([], [])))

    def of(name: str) -> NDArray[np.int64]:
        return np.array([int(getattr(entries[i].lengths, name)[t]) for i, t in rows], np.int64)

    out = {
        "entry": entry,
        "task": task,
        "window": of("window"),
        "per_unit": of("per_unit"),
        "prompt": np.array([entries[i].lengths.prompt for i, _ in rows], np.float64),
        "prompt_units": of("prompt_units"),
    }
    for (i, t), window, tokens in zip(rows, out["window"], out["per_unit"]):
        if window < 1 or tokens < 1 or tokens > budget:
            raise DataError(
                f"entry {entries[i].name!r}, task {t}: windows of at most {window} units of {tokens} tokens do not fit rows of "
                f"{budget} tokens; a longer context, or fewer tokens a step, is needed"
            )
    return out


class _Columns:
    """The drawable episodes of all entries: entry by entry, then sorted by cell."""

    def __init__(self) -> None:
        self.parts: dict[str, list[NDArray[Any]]] = {k: [] for k in ("episode", "cell", "units", "fixed", "priority")}
        self.episode = self.units = self.fixed = np.zeros(0, np.int32)
        self.cell, self.priority = np.zeros(0, np.uint32), np.zeros(0, np.float32)

    def add(self, entry: PlanEntry, chosen: NDArray[np.int64], cell: NDArray[np.int64]) -> None:
        some = {
            "episode": chosen.astype(np.int32),
            "cell": cell.astype(np.uint32),
            "units": np.asarray(entry.lengths.units[chosen], np.int32),
            "fixed": np.asarray(entry.lengths.fixed[chosen], np.int32),
        }
        if entry.priority is None:
            some["priority"] = np.broadcast_to(np.float32(1), len(chosen))
        else:
            some["priority"] = np.asarray(entry.priority[chosen], np.float32)
        for name, array in some.items():
            self.parts[name].append(array)

    def sort(self, plain: bool) -> None:
        """Stable, by cell: two passes of NumPy's radix sort, which exists for 16 bits only. `plain`: no priorities."""
        cell = np.concatenate(self.parts["cell"] or [self.cell])
        order = np.argsort(cell.astype(np.uint16), kind="stable")
        high = (cell >> 16).astype(np.uint16)
        if high.any():
            order = order[np.argsort(high[order], kind="stable")]
        del high
        self.cell = cell[order]
        for name in ("episode", "units", "fixed") if plain else ("episode", "units", "fixed", "priority"):
            setattr(self, name, np.concatenate(self.parts.pop(name) or [getattr(self, name)])[order])
        self.parts.clear()


def _build(
    entries: Sequence[PlanEntry], buckets: int, budget: int, validation: float, held_out: bool, tiles: bool
) -> PlanIndex:
    strata = _strata(entries, budget)
    number = len(strata["entry"])
    columns, too_long = _Columns(), np.zeros(len(entries), np.int64)
    for i, entry in enumerate(entries):
        held = entry.index.held_out(validation)
        mine = np.flatnonzero(strata["entry"] == i)
        most = max(int(np.max(entry.index.task, initial=0)), max(entry.tasks, default=0))
        lookup = np.full(most + 1, -1, np.int64)
        lookup[strata["task"][mine]] = mine
        for part in _parts(entry.index.episodes):
            stratum = lookup[entry.index.task[part]]
            drawable, long = _drawable(entry, part, stratum, strata, budget, held[part] == held_out)
            too_long[i] += long
            chosen = np.flatnonzero(drawable)
            bucket = (entry.index.hash[part][chosen] % np.uint64(buckets)).astype(np.int64)
            columns.add(entry, chosen + part.start, bucket * number + stratum[chosen])
    # Without replacement every tile comes once an epoch: of priorities, 0 alone has a meaning.
    plain = tiles or all(e.priority is None for e in entries)
    columns.sort(plain)
    return _sums(columns, strata, buckets, budget, tiles, plain, too_long)


def _parts(episodes: int) -> list[slice]:
    return [slice(a, min(a + _CHUNK, episodes)) for a in range(0, episodes, _CHUNK)]


def _drawable(
    entry: PlanEntry,
    part: slice,
    stratum: NDArray[np.int64],
    strata: dict[str, NDArray[Any]],
    budget: int,
    keep: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], int]:
    """Which of some episodes can be drawn at all, and how many are left out as too long for a row."""
    lengths = entry.lengths
    keep = keep & (stratum >= 0) & (lengths.units[part] > 0)
    if entry.priority is not None:
        priority = entry.priority[part]
        if not (np.isfinite(priority) & (priority >= 0)).all():
            raise DataError(f"entry {entry.name!r}: priorities must be finite and at least 0")
        keep &= priority > 0
    fits = lengths.fixed[part] + strata["per_unit"][stratum] <= budget
    return keep & fits, int((keep & ~fits).sum())


def _sums(
    columns: _Columns,
    strata: dict[str, NDArray[Any]],
    buckets: int,
    budget: int,
    tiles: bool,
    plain: bool,
    too_long: NDArray[np.int64],
) -> PlanIndex:
    """Running sums over the sorted episodes, in parts, so that a hundred million of them need no more than they must."""
    number, episodes = len(strata["entry"]), len(columns.cell)
    cells, window, per_unit = buckets * number, strata["window"], strata["per_unit"]
    largest, present, first = np.zeros(number, np.int64), np.zeros(budget + 1, bool), np.zeros(cells + 1, np.int64)
    mass, tokens = np.zeros(episodes + 1), np.zeros(episodes + 1 if tiles else 0)
    for part in _parts(episodes):
        cell, units, fixed = columns.cell[part], columns.units[part].astype(np.int64), columns.fixed[part]
        s = cell % np.uint32(number)
        np.maximum.at(largest, s, fixed)
        present[np.minimum(fixed + np.minimum(units, window[s]) * per_unit[s], budget)] = True
        first[1:] += np.bincount(cell, minlength=cells)
        after = slice(part.start + 1, part.stop + 1)
        if tiles:
            count = tile_count(units, window[s])
            np.cumsum(units * per_unit[s] + count * fixed, out=tokens[after])
            tokens[after] += tokens[part.start]
        else:
            count = np.maximum(units - window[s] + 1, 1)
        np.cumsum(count if plain else count * columns.priority[part].astype(np.float64), out=mass[after])
        mass[after] += mass[part.start]
    least = per_unit + largest
    grain, top = _grain(int(present.sum()), buckets, budget)
    square, weight, prompts = np.zeros(cells), np.zeros(number), np.zeros(number)
    levels = []
    for part in _parts(episodes):
        place, units = columns.cell[part].astype(np.int64), columns.units[part].astype(np.int64)
        stratum = place % number
        each = np.diff(mass[part.start : part.stop + 1])
        full = np.minimum(columns.fixed[part] + np.minimum(units, window[stratum]) * per_unit[stratum], budget)
        levels.append(_levels(place, full, each, grain, top))
        square += sums(place, each * each, cells)
        weight += sums(stratum, each, number)
        prompt = np.minimum(
            np.minimum(units, strata["prompt_units"][stratum]) * per_unit[stratum], (budget - least)[stratum]
        )
        prompts += sums(stratum, each * prompt, number)
    keys, inverse = np.unique(np.concatenate([k for k, _ in levels] or [np.zeros(0, np.int64)]), return_inverse=True)
    level_mass = sums(inverse, np.concatenate([v for _, v in levels] or [np.zeros(0)]), len(keys))
    return PlanIndex(
        buckets=buckets,
        grain=grain,
        strata=Strata(**strata, least=least),
        episode=columns.episode,
        units=columns.units,
        fixed=columns.fixed,
        mass=mass,
        guide=_guide(mass),
        tokens=tokens,
        first=np.cumsum(first),
        level_cell=keys // (top + 2),
        level=keys % (top + 2),
        level_mass=level_mass,
        square=square,
        prompt_cost=prompts / np.maximum(weight, 1e-300),
        too_long=too_long,
    )


def _grain(distinct: int, buckets: int, budget: int) -> tuple[int, int]:
    """Tokens of one position of the renewal calculation, so that it stays quick, and positions of a row."""
    grain = 1
    while grain < budget and min(distinct, budget / grain) * (budget / grain) * buckets > _LEVEL_WORK:
        grain += 1
    return grain, -(-budget // grain)


def _levels(
    cell: NDArray[np.int64], cost: NDArray[np.int64], mass: NDArray[np.float64], grain: int, top: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mass by cell · (top + 2) + level. A cost between two multiples of the grain goes to both, so that its mean stays."""
    low = cost // grain
    part = np.where(low < 1, 0.0, cost / grain - low)
    low = np.maximum(low, 1)  # a window takes at least one position
    begin = int(cell.min(initial=0)) * (top + 2)
    key = cell * (top + 2) + low - begin
    size = int(key.max(initial=0)) + 2
    if size <= 2**24:
        dense = sums(key, mass * (1 - part), size) + (sums(key + 1, mass * part, size) if grain > 1 else 0.0)
        where = np.flatnonzero(dense)
        return where + begin, dense[where]
    where, inverse = np.unique(np.concatenate([key, key + 1]), return_inverse=True)
    values = sums(inverse, np.concatenate([mass * (1 - part), mass * part]), len(where))
    return where[values > 0] + begin, values[values > 0]
