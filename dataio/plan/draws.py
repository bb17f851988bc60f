"""Draws with replacement: from Philox words to the windows and prompts of rows, for any rows of any steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.philox import PROMPT, WINDOW, Words, uniform32, uniform53, words
from tiphys.dataio.plan.index import PlanIndex, tile_count
from tiphys.dataio.plan.mixture import Mix

# Redraws: up to 16 stay with task and bucket, up to 64 with the bucket; the first 32 avoid the episode that was drawn first.
SAME_TASK, OTHER_EPISODE, ATTEMPTS = 16, 32, 64
Ints = NDArray[np.int64]
Refused = Callable[[Ints, Ints, Ints], NDArray[np.bool_]]
Columns = dict[
    str, NDArray
]  # `at` (which of the rows asked for), `slot`, `place` (in the PlanIndex), `start`, `units`, …


class Quarantine:
    """Episodes that are drawn no more, each from a step on: the same for every entry over the same data."""

    def __init__(self, events: Iterable[Mapping[str, Any]], entries: Sequence[tuple[str, str]]) -> None:
        """`entries`: name and fingerprint of the data of each entry."""
        prints = dict(entries)
        from_step: dict[tuple[int, int], int] = {}
        for event in events:
            if event["entry"] not in prints:
                raise DataError(
                    f"plan log: step {event['step']} quarantines an episode of {event['entry']!r}, no entry of the mixture"
                )
            for i, (_, data) in enumerate(entries):
                if data == prints[event["entry"]]:
                    key = (i, int(event["episode"]))
                    from_step[key] = min(from_step.get(key, event["step"]), event["step"])
        keys = np.array([entry << 40 | episode for entry, episode in from_step], np.int64)
        order = np.argsort(keys)
        self._keys = keys[order]
        self._steps = np.array(list(from_step.values()), np.int64)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, entry: Ints, episode: Ints, step: Ints) -> NDArray[np.bool_]:
        """Whether each episode is quarantined at the step."""
        if not len(self):
            return np.zeros(len(entry), bool)
        key = entry << 40 | episode
        i = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return (self._keys[i] == key) & (step >= self._steps[i])


class Drawer:
    """Draws rows from an index under a mix. `counter` is the plan's own count of steps: the step plus what was skipped."""

    def __init__(self, index: PlanIndex, mix: Mix, budget: int, seed: int, tiles: bool = False) -> None:
        self.index, self.mix, self.budget, self.seed, self.tiles = index, mix, budget, seed, tiles
        self._before = np.asarray(index.mass[index.first])  # running mass before each cell: small enough for the caches
        self.prompt_room = np.maximum(budget - index.strata.least, 0)  # most tokens of a prompt, by stratum
        filled = mix.slots[mix.slots > 0]
        self._slots = 1 + int(np.ceil(filled.mean())) if len(filled) else 1  # windows drawn at once for each row

    def rows(self, counter: Ints, row: Ints, bucket: Ints) -> tuple[Columns, Columns]:
        """Windows and prompts of rows, before any redraw. Windows are ordered by row, then slot."""
        alive, used = np.arange(len(row)), np.zeros(len(row), np.int64)
        found, prompts, slot = [], {}, 1
        while len(alive):
            cell, place, start = self._candidates(counter[alive], row[alive], bucket[alive], slot)
            if slot == 1:
                prompts = self._prompts(counter, row, cell[:, 0], place[:, 0], start[:, 0])
                used[prompts["at"]] = prompts["tokens"]
            columns, used, alive = self._pack(alive, used, cell, place, start, slot)
            found.append(columns)
            slot += self._slots
        out = {k: np.concatenate([f[k] for f in found]) for k in found[0]} if found else {}
        if len(found) > 1:
            order = np.argsort(out["at"], kind="stable")
            out = {k: v[order] for k, v in out.items()}
        return out, prompts

    def _candidates(self, counter: Ints, row: Ints, bucket: Ints, slot: int) -> tuple[Ints, Ints, Ints]:
        """Cell, place and start of each row's next draws [rows, draws], as if each had all the room it wants."""
        slots = np.arange(slot, slot + self._slots)
        a, b, c, _ = words(self.seed, counter[:, None], row[:, None], slots[None, :], purpose=WINDOW)
        cell = self.cell(np.repeat(bucket, self._slots), a.ravel())
        place, start = self.window(cell, b.ravel(), c.ravel())
        shape = (len(row), self._slots)
        return cell.reshape(shape), place.reshape(shape), start.reshape(shape)

    def cell(self, bucket: Ints, word: Words) -> Ints:
        """A cell of each bucket, by the mix."""
        return np.searchsorted(self.mix.choice, bucket + uniform32(word), side="right")

    def window(self, cell: Ints, high: Words, low: Words) -> tuple[Ints, Ints]:
        """Place and start of a window of each cell, uniform over windows times priority."""
        place, part = self.episode(cell, uniform53(high, low))
        choices = self._starts(cell, place)
        start: Ints = np.minimum((part * choices).astype(np.int64), choices - 1) * self._stride(cell)
        return place, start

    def episode(self, cell: Ints, uniform: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float64]]:
        """Place of an episode of each cell, by mass, and where within its mass the draw fell, in [0, 1)."""
        index = self.index
        first, end = index.first[cell], index.first[cell + 1]
        low = self._before[cell]
        point = low + uniform * (self._before[cell + 1] - low)
        found = index.find(point)
        place: Ints = np.minimum(np.maximum(found, first), end - 1)
        below = index.mass[place]
        return place, (point - below) / (index.mass[place + 1] - below)

    def _stride(self, cell: Ints) -> Any:
        return self.index.strata.window[cell % len(self.index.strata)] if self.tiles else 1

    def _starts(self, cell: Ints, place: Ints) -> Ints:
        """Number of different windows of an episode."""
        window = self.index.strata.window[cell % len(self.index.strata)]
        units = self.index.units[place]
        return tile_count(units, window) if self.tiles else np.maximum(units - window + 1, 1)

    def _pack(
        self, alive: Ints, used: Ints, cell: Ints, place: Ints, start: Ints, slot: int
    ) -> tuple[Columns, Ints, Ints]:
        """Puts each row's draws one after the other until one is shortened, fills the row, or cannot fit one unit."""
        strata = self.index.strata
        stratum = cell % len(strata)
        fixed, per_unit = self.index.fixed[place].astype(np.int64), strata.per_unit[stratum]
        whole = np.minimum(self.index.units[place] - start, strata.window[stratum])
        cost = fixed + whole * per_unit
        end = used[alive][:, None] + np.cumsum(cost, 1)
        left = self.budget - (end - cost)
        # A draw takes part if all before it were whole and left room, and it finds room for one unit.
        before = np.logical_and.accumulate((left >= strata.least[stratum]) & (end < self.budget), axis=1)
        reached = np.concatenate([np.ones((len(alive), 1), bool), before[:, :-1]], axis=1)
        take = reached & (left >= strata.least[stratum])
        r, k = np.nonzero(take)
        units = np.minimum(whole[r, k], (left[r, k] - fixed[r, k]) // per_unit[r, k])
        columns = {
            "at": alive[r],
            "slot": slot + k,
            "cell": cell[r, k],
            "place": place[r, k],
            "start": start[r, k],
            "units": units,
            "tokens": fixed[r, k] + units * per_unit[r, k],
        }
        going = before[:, -1]
        used = used.copy()
        used[alive] = end[:, -1]
        return columns, used, alive[going]

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _prompts(self, counter: Ints, row: Ints, cell: Ints, place: Ints, start: Ints) -> Columns:
        """The prompts of those rows that have one, given each row's first window."""
        strata = self.index.strata
        chance = strata.prompt[cell % len(strata)]
        at = np.flatnonzero(chance > 0)
        if len(at):
            yes = uniform32(words(self.seed, counter[at], row[at], 0, purpose=PROMPT)[0])
            at = at[yes < chance[at]]
        return self.prompt(at, counter[at], row[at], cell[at], place[at], start[at], 0)

    def prompt(self, at: Ints, counter: Ints, row: Ints, cell: Ints, place: Ints, start: Ints, attempt: int) -> Columns:
        """A prompt for each window: of another episode of its cell, or, where there is none, the same one's other end.

        Half of the prompts are their episode's end, the others uniform (Reed et al. 2022, section 2.2).
        """
        index, strata = self.index, self.index.strata
        stratum = cell % len(strata)
        _, b, c, d = words(self.seed, counter, row, 0, attempt, purpose=PROMPT)
        other, part, alone = self._another(cell, place, uniform53(b, c))
        room = self.prompt_room[stratum] // strata.per_unit[stratum]
        units = np.minimum(np.minimum(strata.prompt_units[stratum], index.units[other]), room)
        last = index.units[other] - units
        first = np.where((d & np.uint64(1)) == 1, last, np.minimum((part * (last + 1)).astype(np.int64), last))
        first = np.where(alone, np.where(2 * start < last, last, 0), first)
        keep = units > 0
        columns = {
            "at": at,
            "slot": np.zeros(len(at), np.int64),
            "cell": cell,
            "place": other,
            "start": first,
            "units": units,
            "tokens": units * strata.per_unit[stratum],
        }
        return {k: v[keep] for k, v in columns.items()}

    def _another(
        self, cell: Ints, place: Ints, uniform: NDArray[np.float64]
    ) -> tuple[Ints, NDArray[np.float64], NDArray[np.bool_]]:
        """Another episode of the cell, by mass: its place, where in its mass the draw fell, and whether there is none."""
        index = self.index
        first, end = index.first[cell], index.first[cell + 1]
        low, high, mine, mine_end = self._before[cell], self._before[cell + 1], index.mass[place], index.mass[place + 1]
        alone = end - first < 2
        point = low + uniform * (high - low - (mine_end - mine))
        point = np.where(point >= mine, point + (mine_end - mine), point)
        other = np.minimum(np.maximum(index.find(point), first), end - 1)
        # Rounding may put a draw at the very edge of `place` into it.
        other = np.where((other == place) & ~alone, np.where(place > first, place - 1, place + 1), other)
        other = np.where(alone, place, other)
        below = index.mass[other]
        part = np.clip((point - below) / (index.mass[other + 1] - below), 0.0, np.nextafter(1.0, 0.0))
        return other, part, alone

    # -- redraws -----------------------------------------------------------------------------------------------------

    def redraw(
        self,
        columns: Columns,
        counter: Ints,
        row: Ints,
        bucket: Ints,
        needed: Ints,
        refused: Refused,
        context: Columns | None,
    ) -> Columns:
        """Draws each of these windows (or, with `context`, the first windows of their rows, prompts) anew.

        needed   least attempt of each that is acceptable, at least 1
        refused  (cell, place, which of the windows) -> bool: whether an episode may not be used
        Task, bucket and tokens stay; only where sixteen attempts found nothing, another task of the bucket is taken.
        """
        out = {k: v.copy() for k, v in columns.items()} | {"attempt": np.zeros(len(row), np.int64)}
        open_ = np.arange(len(row))
        for attempt in range(1, ATTEMPTS + 1):
            of = open_
            if context is None:
                new = self._redrawn(columns, counter, row, bucket, of, attempt)
            else:
                c = {k: v[of] for k, v in context.items()}
                new = self.prompt(of, counter[of], row[of], c["cell"], c["place"], c["start"], attempt)
                new["units"] = np.minimum(
                    new["units"],
                    columns["tokens"][of] // self.index.strata.per_unit[new["cell"] % len(self.index.strata)],
                )
                new["tokens"] = new["units"] * self.index.strata.per_unit[new["cell"] % len(self.index.strata)]
            good = (new["units"] > 0) & (attempt >= needed[of]) & ~refused(new["cell"], new["place"], of)
            if attempt <= OTHER_EPISODE:
                good &= new["place"] != columns["place"][of]
            for k in ("cell", "place", "start", "units", "tokens"):
                out[k][of[good]] = new[k][good]
            out["attempt"][of[good]] = attempt
            open_ = of[~good]
            if not len(open_):
                return out
        raise DataError(
            f"no window can be drawn for row {int(row[open_[0]])} (bucket {int(bucket[open_[0]])}) after {ATTEMPTS} "
            "attempts: too many of its episodes are quarantined or unreadable; see the plan's log, and repair or replace the data"
        )

    def _redrawn(self, columns: Columns, counter: Ints, row: Ints, bucket: Ints, of: Ints, attempt: int) -> Columns:
        strata = self.index.strata
        a, b, c, _ = words(self.seed, counter[of], row[of], columns["slot"][of], attempt, purpose=WINDOW)
        cell = columns["cell"][of] if attempt <= SAME_TASK else self.cell(bucket[of], a)
        place, start = self.window(cell, b, c)
        stratum = cell % len(strata)
        fixed, per_unit = self.index.fixed[place].astype(np.int64), strata.per_unit[stratum]
        whole = np.minimum(self.index.units[place] - start, strata.window[stratum])
        units = np.minimum(whole, (columns["tokens"][of] - fixed) // per_unit)
        return {"cell": cell, "place": place, "start": start, "units": units, "tokens": fixed + units * per_unit}
