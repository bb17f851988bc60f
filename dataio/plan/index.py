"""PlanIndex: the drawable episodes of a mixture, sorted by bucket and stratum, with running sums: a draw is one bisection.

A *stratum* is one task of one mixture entry. A *bucket* holds the episodes whose hash has the same remainder; it does not depend
on the number of processes. A *cell* is a stratum within a bucket. The index is built once from all episodes, or mapped into
memory from a folder. A change of the mixture's weights needs no new index.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.cost import Costs, StepCost
from tiphys.dataio.private import private_folder

if TYPE_CHECKING:
    from tiphys.dataio.plan.entries import PlanEntry

_GUIDED, _MANY, _LARGE = 16, 512, 1 << 17  # see PlanIndex.find
_FORMAT = 5  # format of the saved arrays
_CHUNK = 1 << 22  # episodes worked on at once
STARTS = ("steps", "windows")


@dataclass(frozen=True)
class Strata:
    """The strata, one element each.

    Attributes
    ----------
    entry, task : int64
        Mixture entry, and task as a number in its index.
    window, context : int64
        Most units and most tokens of a window.
    prompt : float64
        Share of the rows that begin with a prompt, of those whose first window is of the stratum.
    prompt_units : int64
        Most units of a prompt.
    every : float64
        Share of the windows that have a prompt of their own.
    ends : float64
        Share of the prompts that are the end of their episode.
    fixed_low, fixed_high : int64
        Smallest and largest fixed tokens of its drawable episodes.
    longest : int64
        Units of its longest drawable episode.
    full : int64
        Tokens of its largest window.
    """

    entry: NDArray[np.int64]
    task: NDArray[np.int64]
    window: NDArray[np.int64]
    context: NDArray[np.int64]
    prompt: NDArray[np.float64]
    prompt_units: NDArray[np.int64]
    every: NDArray[np.float64]
    ends: NDArray[np.float64]
    fixed_low: NDArray[np.int64]
    fixed_high: NDArray[np.int64]
    longest: NDArray[np.int64]
    full: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.entry)


@dataclass(frozen=True)
class PlanIndex:
    """Arrays over the n drawable episodes, sorted by (cell, number in the entry's index). cell = bucket · strata + stratum.

    Attributes
    ----------
    episode, units, fixed : int32 [n]
        Number in the entry's index; units; tokens of a window in addition to those of its units.
    mass : float64 [n + 1]
        Running sum of the mass by which full windows are drawn. It is priority × ((units − 1) / K + 1) for `starts: steps`,
        priority × max(units − K + 1, 1) for `starts: windows`, and the number of tiles without replacement. K is the
        episode's longest window.
    tokens : float64 [n + 1]
        Running sum of the tokens of all tiles. Empty with replacement.
    guide : int32
        Results of `find` for 0, 1, 2, … times `_spacing`, up to the first point above the whole mass.
    first : int64 [cells + 1]
        Position of the first episode of each cell.
    saved_first : int64 [n]
        Where each episode begins in `saved`; -1: it saves nothing. Empty if no episode saves any tokens.
    saved : int32
        Running sums of the tokens that steps take less than `costs` says (see `Savings`).
    square : float64 [cells]
        Sum of the squared masses of the episodes.
    content : float64 [cells]
        Σ mass × mean tokens of a full window: in proportion to the tokens that full windows deliver.
    too_long : int64 [entries]
        Episodes that are left out because their fixed tokens and one unit exceed a row.
    """

    buckets: int
    budget: int
    starts: str
    strata: Strata
    costs: Costs
    episode: NDArray[np.int32]
    units: NDArray[np.int32]
    fixed: NDArray[np.int32]
    mass: NDArray[np.float64]
    guide: NDArray[np.int32]
    tokens: NDArray[np.float64]
    first: NDArray[np.int64]
    saved_first: NDArray[np.int64]
    saved: NDArray[np.int32]
    square: NDArray[np.float64]
    content: NDArray[np.float64]
    too_long: NDArray[np.int64]

    @cached_property
    def least(self) -> NDArray[np.int64]:
        """int64 [strata]: room that always holds a window of the stratum: one unit and the most fixed tokens."""
        return self.costs.first + self.strata.fixed_high

    def window(self, stratum: NDArray[np.int64], fixed: NDArray) -> NDArray[np.int64]:
        """Units of the longest window of an episode with this stratum and these fixed tokens."""
        return longest_window(self.strata.window, self.strata.context, self.costs, stratum, fixed)

    def cost(
        self,
        stratum: NDArray[np.int64],
        place: NDArray[np.int64],
        start: NDArray[np.int64],
        units: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Tokens of the units [start, start + units) of each episode, without its fixed tokens."""
        cost = self.costs.cost(stratum, start, units)
        return cost - self.savings(place, start, units) if len(self.saved_first) else cost

    def savings(self, place: NDArray[np.int64], start: NDArray[Any], units: NDArray[Any]) -> NDArray[np.int64]:
        """How many tokens fewer than `costs` says the units [start, start + units) of each episode take."""
        if not len(self.saved_first):
            return np.zeros(len(place), np.int64)
        first = self.saved_first[place]
        begin = np.where(first < 0, 0, first + start)
        end = np.where(first < 0, 0, first + start + units)
        return self.saved[end].astype(np.int64) - self.saved[begin]

    @property
    def cells(self) -> int:
        return self.buckets * len(self.strata)

    @property
    def cell_mass(self) -> NDArray[np.float64]:
        """float64 [buckets, strata]: mass of each cell."""
        return np.diff(self.mass[self.first]).reshape(self.buckets, -1)

    def find(self, point: NDArray[np.float64]) -> NDArray[np.int64]:
        """Place of the episode in whose part of the running mass each point lies: the last place at which `mass` is at most the
        point.

        For many points in a large index, `guide` (Chen and Asau 1974) narrows each search to a few places, and all searches are
        then bisected together: the processor reads memory for many points at the same time.
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
    def open(cls, entries: Sequence[PlanEntry], how: Drawing, cache_dir: str = "") -> PlanIndex:
        """Builds the index in memory, or, if a folder is given, builds it there once and maps it into memory."""
        costs = Costs([c for _, c in _strata_costs(entries)], how.budget)
        if not cache_dir:
            return _build(entries, how, costs)
        key = digest(entries, [_FORMAT, *astuple(how)])
        folder = os.path.join(private_folder(cache_dir), f"plan-{key[:24]}")
        if not os.path.exists(os.path.join(folder, "plan.json")):
            _build(entries, how, costs).save(folder)
        return cls.load(folder, costs)

    def save(self, folder: str) -> None:
        """Writes the arrays. If another process wrote the same folder meanwhile, its files stay."""
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".plan-", dir=os.path.dirname(folder))
        try:
            for name, array in self._arrays().items():
                np.save(os.path.join(temporary, f"{name}.npy"), array)
            with open(os.path.join(temporary, "plan.json"), "w") as file:
                json.dump({"buckets": self.buckets, "budget": self.budget, "starts": self.starts}, file)
            os.rename(temporary, folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.exists(os.path.join(folder, "plan.json")):
                raise

    @classmethod
    def load(cls, folder: str, costs: Costs) -> PlanIndex:
        with open(os.path.join(folder, "plan.json")) as file:
            scalars = json.load(file)

        def read(name: str) -> NDArray[Any]:
            return np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)

        strata = Strata(**{f.name: np.array(read(f"strata.{f.name}")) for f in fields(Strata)})
        arrays: dict[str, Any] = {f.name: read(f.name) for f in fields(cls) if f.name not in _NOT_ARRAYS}
        return cls(strata=strata, costs=costs, **scalars, **arrays)

    def _arrays(self) -> dict[str, NDArray]:
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_ARRAYS}
        return out | {f"strata.{f.name}": getattr(self.strata, f.name) for f in fields(Strata)}


_NOT_ARRAYS = ("buckets", "budget", "starts", "strata", "costs")


@dataclass(frozen=True)
class Drawing:
    """What decides, together with the entries, which episodes can be drawn and with which mass.

    Attributes
    ----------
    buckets, budget : int
        Number of buckets; tokens of a row.
    validation : float
        Share of episodes that are held out.
    held_out : bool
        True: draw only held-out episodes. False: never draw them.
    starts : "steps" or "windows"
        What is equally likely: each step of a task, or each full window.
    tiles : bool
        True: without replacement, over disjoint tiles.
    """

    buckets: int
    budget: int
    validation: float = 0.0
    held_out: bool = False
    starts: str = "steps"
    tiles: bool = False


def longest_window(
    window: NDArray[np.int64], context: NDArray[np.int64], costs: Costs, stratum: NDArray[np.int64], fixed: NDArray
) -> NDArray[np.int64]:
    fit = costs.fit(stratum, context[stratum] - fixed)
    return np.maximum(np.minimum(window[stratum], fit), 1)


def digest(entries: Sequence[PlanEntry], numbers: Sequence[object]) -> str:
    """SHA-256, in hexadecimal, of the entries' data, tasks, lengths and priorities (not weights), and of `numbers`."""
    out = hashlib.sha256(json.dumps(numbers).encode())
    for entry in entries:
        lengths = entry.lengths
        costs = [[list(c.elements), c.chunk] for c in lengths.costs]
        out.update(
            json.dumps([entry.known_as or entry.index.fingerprint, [int(t) for t in entry.tasks], costs]).encode()
        )
        arrays = (lengths.units, lengths.window, lengths.context, lengths.fixed, lengths.prompt, lengths.prompt_units)
        savings = (lengths.savings.first, lengths.savings.running) if lengths.savings else ()
        plain = lengths.every is None and (lengths.ends is None or bool((lengths.ends == 0.5).all()))
        prompts = () if plain else (lengths.every, lengths.ends)
        for given in (*arrays, entry.priority, *savings, *prompts):
            if given is None:
                out.update(b"none")
            else:
                array: NDArray[Any] = np.ascontiguousarray(given)
                out.update(f"{array.dtype.str}{array.shape}".encode())
                out.update(array.data)
    return out.hexdigest()


def sums(where: NDArray[np.int64], values: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """[number]: the sum of those values whose `where` is 0, 1, …, number − 1."""
    return np.bincount(where, values, number).astype(np.float64, copy=False)


def _spacing(mass: NDArray[np.float64]) -> float:
    """A power of two that divides the whole mass into about one part for every _GUIDED places."""
    places = max(len(mass) // _GUIDED, 1)
    return float(2.0 ** np.ceil(np.log2(mass[-1] / places))) if mass[-1] > 0 else 1.0


def _guide(mass: NDArray[np.float64]) -> NDArray[np.int32]:
    spacing = _spacing(mass)
    points = np.arange(int(mass[-1] / spacing) + 2) * spacing
    return (np.searchsorted(mass, points, side="right") - 1).astype(np.int32)


def tile_count(units: NDArray, window: NDArray) -> NDArray[np.int64]:
    """Number of disjoint tiles of at most `window` units that cover each episode."""
    count: NDArray[np.int64] = -(-units.astype(np.int64) // window)
    return count


def _strata_costs(entries: Sequence[PlanEntry]) -> list[tuple[tuple[int, int], StepCost]]:
    """((entry, task), its costs) of each stratum."""
    return [((i, int(t)), entry.lengths.costs[t]) for i, entry in enumerate(entries) for t in entry.tasks]


def _strata(entries: Sequence[PlanEntry], budget: int, costs: Costs) -> dict[str, NDArray]:
    rows = [key for key, _ in _strata_costs(entries)]
    entry, task = (np.array(x, np.int64) for x in (zip(*rows) if rows else ([], [])))

    def of(name: str, missing: float = 0.0) -> list[Any]:
        given = (getattr(entries[i].lengths, name) for i, _ in rows)
        return [missing if array is None else array[t] for array, (_, t) in zip(given, rows, strict=True)]

    out = {
        "entry": entry,
        "task": task,
        "window": np.array(of("window"), np.int64),
        "context": np.minimum(np.array(of("context"), np.int64), budget),
        "prompt": np.array(of("prompt"), np.float64),
        "prompt_units": np.array(of("prompt_units"), np.int64),
        "every": np.array(of("every"), np.float64),
        "ends": np.array(of("ends", 0.5), np.float64),
    }
    for (i, t), window, tokens in zip(rows, out["window"], costs.first):
        if window < 1 or tokens < 1 or tokens > budget:
            raise DataError(
                f"entry {entries[i].name!r}, task {t}: windows of at most {window} units, each of up to {tokens} tokens, do not "
                f"fit rows of {budget} tokens; use a longer context, or fewer tokens for a step"
            )
    return out


class _Columns:
    """Collects the drawable episodes, entry by entry, and sorts them by cell."""

    def __init__(self) -> None:
        names = ("episode", "cell", "units", "fixed", "priority", "saved_first")
        self.parts: dict[str, list[NDArray[Any]]] = {k: [] for k in names}
        self.episode = self.units = self.fixed = np.zeros(0, np.int32)
        self.cell, self.priority = np.zeros(0, np.uint32), np.zeros(0, np.float32)
        self.saved_first = np.zeros(0, np.int64)

    def add(self, entry: PlanEntry, chosen: NDArray[np.int64], cell: NDArray[np.int64], saved: int) -> None:
        """Add some episodes of an entry. `saved`: where its savings begin among those of all entries."""
        some: dict[str, NDArray[Any]] = {
            "episode": chosen.astype(np.int32),
            "cell": cell.astype(np.uint32),
            "units": np.asarray(entry.lengths.units[chosen], np.int32),
            "fixed": np.asarray(entry.lengths.fixed[chosen], np.int32),
        }
        if entry.lengths.savings is not None:
            some["saved_first"] = entry.lengths.savings.first[chosen] + saved
        else:
            some["saved_first"] = np.broadcast_to(np.int64(-1), len(chosen))
        if entry.priority is None:
            some["priority"] = np.broadcast_to(np.float32(1), len(chosen))
        else:
            some["priority"] = np.asarray(entry.priority[chosen], np.float32)
        for name, array in some.items():
            self.parts[name].append(array)

    def sort(self, plain: bool, savings: bool) -> None:
        """Sorts by cell; stable. NumPy has a radix sort for 16 bits only, hence two passes.

        plain    drop the priorities
        savings  keep `saved_first`
        """
        cell = np.concatenate(self.parts["cell"] or [self.cell])
        order = np.argsort(cell.astype(np.uint16), kind="stable")
        high = (cell >> 16).astype(np.uint16)
        if high.any():
            order = order[np.argsort(high[order], kind="stable")]
        del high
        self.cell = cell[order]
        kept = ["episode", "units", "fixed"] + ["priority"] * (not plain) + ["saved_first"] * savings
        for name in kept:
            setattr(self, name, np.concatenate(self.parts.pop(name) or [getattr(self, name)])[order])
        self.parts.clear()


def _build(entries: Sequence[PlanEntry], how: Drawing, costs: Costs) -> PlanIndex:
    strata = _strata(entries, how.budget, costs)
    number = len(strata["entry"])
    columns, too_long = _Columns(), np.zeros(len(entries), np.int64)
    saved = [entry.lengths.savings.running for entry in entries if entry.lengths.savings is not None]
    before = 0
    least = costs.each + costs.once if how.tiles else costs.first
    for i, entry in enumerate(entries):
        held = entry.index.held_out(how.validation)
        mine = np.flatnonzero(strata["entry"] == i)
        most = max(int(np.max(entry.index.task, initial=0)), max(entry.tasks, default=0))
        lookup = np.full(most + 1, -1, np.int64)
        lookup[strata["task"][mine]] = mine
        for part in _parts(entry.index.episodes):
            stratum = lookup[entry.index.task[part]]
            keep = (held[part] == how.held_out) & (stratum >= 0)
            drawable, long = _drawable(entry, part, keep, entry.lengths.fixed[part] + least[stratum] > how.budget)
            too_long[i] += long
            chosen = np.flatnonzero(drawable)
            bucket = (entry.index.hash[part][chosen] % np.uint64(how.buckets)).astype(np.int64)
            columns.add(entry, chosen + part.start, bucket * number + stratum[chosen], before)
        before += 0 if entry.lengths.savings is None else len(entry.lengths.savings.running)
    # Without replacement every tile comes once in an epoch. Only the priority 0 has a meaning then.
    plain = how.tiles or all(e.priority is None for e in entries)
    columns.sort(plain, bool(saved))
    return _sums(columns, strata, how, costs, plain, too_long, np.concatenate([np.zeros(0, np.int32), *saved]))


def _parts(episodes: int) -> list[slice]:
    return [slice(a, min(a + _CHUNK, episodes)) for a in range(0, episodes, _CHUNK)]


def _drawable(
    entry: PlanEntry, part: slice, keep: NDArray[np.bool_], long: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], int]:
    """Which of the episodes of a part can be drawn, and how many are left out because they are too long for a row."""
    keep = keep & (entry.lengths.units[part] > 0)
    if entry.priority is not None:
        priority = entry.priority[part]
        if not (np.isfinite(priority) & (priority >= 0)).all():
            raise DataError(f"entry {entry.name!r}: the priorities of its episodes must be finite and at least 0")
        keep &= priority > 0
    return keep & ~long, int((keep & long).sum())


def drawable_episodes(
    entry: PlanEntry, validation: float, held_out: bool, without: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """int64 [tasks of the entry]: number of drawable episodes of all buckets, not counting the episodes `without`."""
    number = max(int(np.max(entry.index.task, initial=0)), max(entry.tasks, default=0)) + 1
    held, out = entry.index.held_out(validation), np.zeros(number, np.int64)
    for part in _parts(entry.index.episodes):
        keep = held[part] == held_out
        if without is not None:
            keep[without[(without >= part.start) & (without < part.stop)] - part.start] = False
        some, _ = _drawable(entry, part, keep, np.zeros(len(keep), bool))
        out += np.bincount(entry.index.task[part][some], minlength=number)
    return out[list(entry.tasks)]


def _sums(
    columns: _Columns,
    strata: dict[str, NDArray[Any]],
    how: Drawing,
    costs: Costs,
    plain: bool,
    too_long: NDArray[np.int64],
    saved: NDArray[np.int32],
) -> PlanIndex:
    """Running sums over the sorted episodes. It works part by part: 10⁸ episodes need little more memory than the arrays."""
    number, episodes = len(strata["entry"]), len(columns.cell)
    cells = how.buckets * number
    low, high, longest, full = (np.zeros(number, np.int64) for _ in range(4))
    low += how.budget
    first, square, content = np.zeros(cells + 1, np.int64), np.zeros(cells), np.zeros(cells)
    mass, tokens = np.zeros(episodes + 1), np.zeros(episodes + 1 if how.tiles else 0)
    for part in _parts(episodes):
        cell, units, fixed = (
            columns.cell[part].astype(np.int64),
            columns.units[part].astype(np.int64),
            columns.fixed[part],
        )
        s = cell % number
        window = longest_window(strata["window"], strata["context"], costs, s, fixed)
        np.minimum.at(low, s, fixed)
        np.maximum.at(high, s, fixed)
        np.maximum.at(longest, s, units)
        np.maximum.at(full, s, fixed + _most(costs, s, np.minimum(window, units)))
        first[1:] += np.bincount(cell, minlength=cells)
        after = slice(part.start + 1, part.stop + 1)
        if how.tiles:
            each: NDArray[Any] = tile_count(units, window)
            np.cumsum(units * costs.each[s] + each * (fixed + costs.once[s]), out=tokens[after])
            tokens[after] += tokens[part.start]
        elif how.starts == "steps":
            each = (units - 1) / window + 1.0
        else:
            each = np.maximum(units - window + 1, 1)
        weighted = each if plain else each * columns.priority[part].astype(np.float64)
        np.cumsum(weighted, out=mass[after])
        mass[after] += mass[part.start]
        square += sums(cell, weighted.astype(np.float64) ** 2, cells)
        mean = units / each if how.tiles or how.starts == "steps" else np.minimum(units, window)
        each_takes = mean * (costs.tokens / costs.period).sum(0)[s]
        if len(columns.saved_first):
            at = columns.saved_first[part]
            begin, end = np.maximum(at, 0), np.where(at < 0, 0, at + units)  # both 0 if nothing is saved
            all_saved = saved[end] - saved[begin]
            each_takes = each_takes - all_saved * mean / units
        content += sums(cell, weighted * (fixed + each_takes), cells)
    return PlanIndex(
        buckets=how.buckets,
        budget=how.budget,
        starts=how.starts,
        strata=Strata(
            **strata,
            fixed_low=np.minimum(low, high),
            fixed_high=high,
            longest=longest,
            full=np.minimum(full, how.budget),
        ),
        costs=costs,
        episode=columns.episode,
        units=columns.units,
        fixed=columns.fixed,
        mass=mass,
        guide=_guide(mass),
        tokens=tokens,
        first=np.cumsum(first),
        saved_first=columns.saved_first,
        saved=saved,
        square=square,
        content=content,
        too_long=too_long,
    )


def _most(costs: Costs, stratum: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Most tokens that so many consecutive units can take, wherever they start."""
    if costs.plain:
        return steps * costs.first[stratum]
    most = sum(t[stratum] * -(-steps // p[stratum]) for t, p in zip(costs.tokens, costs.period))
    return np.asarray(most, np.int64)
