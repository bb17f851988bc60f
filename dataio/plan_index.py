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

from .episode import DataError

if TYPE_CHECKING:
    from .sampling import PlanEntry

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
        key = digest(entries, [buckets, budget, validation, held_out, tiles])
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


def tile_count(units: NDArray, window: NDArray) -> NDArray[np.int64]:
    """Disjoint tiles of at most `window` units that cover each episode."""
    return -(-units.astype(np.int64) // window)


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


def _drawable(
    entry: PlanEntry,
    stratum: NDArray[np.int64],
    strata: dict[str, NDArray],
    budget: int,
    validation: float,
    held_out: bool,
) -> tuple[NDArray[np.int64], int]:
    """Numbers of the entry's episodes that can be drawn at all, and how many are left out as too long for a row."""
    lengths, index = entry.lengths, entry.index
    keep = (stratum >= 0) & (lengths.units > 0)
    keep &= index.held_out(validation) if held_out else ~index.held_out(validation)
    if entry.priority is not None:
        if not (np.isfinite(entry.priority) & (entry.priority >= 0)).all():
            raise DataError(f"entry {entry.name!r}: priorities must be finite and at least 0")
        keep &= entry.priority > 0
    fits = lengths.fixed + strata["per_unit"][stratum] <= budget
    return np.flatnonzero(keep & fits), int((keep & ~fits).sum())


def _build(
    entries: Sequence[PlanEntry], buckets: int, budget: int, validation: float, held_out: bool, tiles: bool
) -> PlanIndex:
    strata = _strata(entries, budget)
    number = len(strata["entry"])
    parts: dict[str, list[NDArray]] = {k: [] for k in ("episode", "cell", "units", "fixed", "mass")}
    too_long = []
    for i, entry in enumerate(entries):
        lookup = np.full(1 + max(int(np.max(entry.index.task, initial=0)), max(entry.tasks, default=0)), -1, np.int64)
        for s in np.flatnonzero(strata["entry"] == i):
            lookup[strata["task"][s]] = s
        stratum = lookup[entry.index.task]
        chosen, long = _drawable(entry, stratum, strata, budget, validation, held_out)
        too_long.append(long)
        s = stratum[chosen]
        units = np.asarray(entry.lengths.units[chosen], np.int64)
        windows = tile_count(units, strata["window"][s]) if tiles else np.maximum(units - strata["window"][s] + 1, 1)
        bucket = (entry.index.hash[chosen] % np.uint64(buckets)).astype(np.int64)
        parts["episode"].append(chosen.astype(np.int32))
        parts["cell"].append(bucket * number + s)
        parts["units"].append(units.astype(np.int32))
        parts["fixed"].append(np.asarray(entry.lengths.fixed[chosen], np.int32))
        priority: NDArray[np.float64] | float = 1.0
        if entry.priority is not None and not tiles:  # an epoch visits every tile once: there, 0 alone has a meaning
            priority = entry.priority[chosen].astype(np.float64)
        parts["mass"].append(windows * priority)
    flat = {k: np.concatenate(v) if v else np.zeros(0, np.int64) for k, v in parts.items()}
    order = _stable_order(flat["cell"])
    flat = {k: v[order] for k, v in flat.items()}
    del order
    return _finish(flat, strata, buckets, budget, tiles, np.array(too_long, np.int64))


def _stable_order(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stable argsort of numbers below 2^32 by two passes of NumPy's radix sort, which exists for 16 bits only."""
    order = np.argsort((key & 0xFFFF).astype(np.uint16), kind="stable")
    high = (key >> 16).astype(np.uint16)
    return order if not high.any() else order[np.argsort(high[order], kind="stable")]


def _finish(
    flat: dict[str, NDArray],
    strata: dict[str, NDArray],
    buckets: int,
    budget: int,
    tiles: bool,
    too_long: NDArray[np.int64],
) -> PlanIndex:
    number = len(strata["entry"])
    cells = buckets * number
    cell, units, fixed, mass = (
        flat["cell"],
        flat["units"].astype(np.int64),
        flat["fixed"].astype(np.int64),
        flat["mass"],
    )
    s = cell % max(number, 1)
    largest = np.zeros(number, np.int64)
    np.maximum.at(largest, s, fixed)
    least = strata["per_unit"] + largest
    full = fixed + np.minimum(units, strata["window"][s]) * strata["per_unit"][s]
    running = np.concatenate([[0.0], np.cumsum(mass)])
    total_tokens = np.zeros(0)
    if tiles:
        each = units * strata["per_unit"][s] + tile_count(units, strata["window"][s]) * fixed
        total_tokens = np.concatenate([[0.0], np.cumsum(each, dtype=np.float64)])
    grain, level_cell, level, level_mass = _histogram(cell, np.minimum(full, budget), mass, cells, buckets, budget)
    room = np.maximum(budget - least, 0)
    prompt = np.minimum(np.minimum(units, strata["prompt_units"][s]) * strata["per_unit"][s], room[s])
    weight = sums(s, mass, number)
    return PlanIndex(
        buckets=buckets,
        grain=grain,
        strata=Strata(**strata, least=least),
        episode=flat["episode"].astype(np.int32),
        units=flat["units"].astype(np.int32),
        fixed=flat["fixed"].astype(np.int32),
        mass=running,
        tokens=total_tokens,
        first=np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=cells))]).astype(np.int64),
        level_cell=level_cell,
        level=level,
        level_mass=level_mass,
        square=sums(cell, mass * mass, cells),
        prompt_cost=sums(s, mass * prompt, number) / np.maximum(weight, 1e-300),
        too_long=too_long,
    )


def _histogram(
    cell: NDArray[np.int64], cost: NDArray[np.int64], mass: NDArray[np.float64], cells: int, buckets: int, budget: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Mass by (cell, level of tokens). Where costs are too many for an exact calculation, tokens are rounded to multiples of a
    grain so that each cost keeps its mean: part of its mass goes to the multiple below and part to the one above."""
    present = np.bincount(cost, minlength=budget + 1) > 0
    distinct, grain = int(present.sum()), 1
    while grain < budget and min(distinct, budget / grain) * (budget / grain) * buckets > _LEVEL_WORK:
        grain += 1
    top = -(-budget // grain)
    low = cost // grain
    part = cost / grain - low
    low, part = np.where(low < 1, 1, low), np.where(low < 1, 0.0, part)  # a window takes at least one position
    sizes = cells * (top + 2)
    key = cell * (top + 2) + low
    if sizes <= max(2**24, 2 * len(cell)):
        dense = sums(key, mass * (1 - part), sizes)
        if grain > 1:
            dense += sums(key + 1, mass * part, sizes)
        where = np.flatnonzero(dense)
        values = dense[where]
    else:
        where, inverse = np.unique(np.concatenate([key, key + 1]), return_inverse=True)
        values = sums(inverse, np.concatenate([mass * (1 - part), mass * part]), len(where))
        where, values = where[values > 0], values[values > 0]
    return grain, where // (top + 2), where % (top + 2), values
