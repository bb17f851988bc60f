"""Sampling with replacement: from Philox words to the windows and prompts of rows, for any rows of any steps at once.

The room of a draw is the number of tokens that the row has left.

Why every step of a task is equally likely (`starts: steps`). An episode of T steps whose longest window is K steps has mass
(T − 1) / K + 1. Its window starts anywhere from −(K − 1) to T − 1, all equally likely, and is cut at the episode's ends. So each
step is in K of the T + K − 1 windows, and its rate is (T + K − 1) / K · K / (T + K − 1) = 1, whatever T and K are. Near the end
of a row only K' < K steps fit. The window then starts anywhere from −(K' − 1) to T − 1, and the draw is accepted with a chance
in proportion to ((T − 1) / K' + 1) / ((T − 1) / K + 1), which makes the rate 1 again. Whether the room is short, and when a row
ends, depends on the stratum and the room alone, never on the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.philox import PROMPT, WINDOW, Words, uniform32, uniform53, words
from tiphys.dataio.plan.entries import OWN
from tiphys.dataio.plan.index import PlanIndex, tile_count
from tiphys.dataio.plan.mixture import Mix

# Redraws: attempts up to 16 keep the task and the bucket, attempts up to 64 keep the bucket. Attempts up to 32 avoid the episode
# that was drawn first.
SAME_TASK, OTHER_EPISODE, ATTEMPTS = 16, 32, 64
_TRIES = 64  # a row ends after so many refused draws one after the other (see `Drawer.take`)
Ints = NDArray[np.int64]
Refused = Callable[[Ints, Ints, Ints], NDArray[np.bool_]]
# `at` (position in the rows asked for), `slot`, `cell`, `place` (position in the PlanIndex), `start`, `units`, `tokens`
Columns = dict[str, NDArray]


class Quarantine:
    """Episodes that are no longer drawn, each from a step on. An event holds for all entries over the same data."""

    def __init__(self, events: Iterable[Mapping[str, Any]], entries: Sequence[tuple[str, str]]) -> None:
        """`entries`: name of each entry, and fingerprint of its data."""
        prints = dict(entries)
        from_step: dict[tuple[int, int], int] = {}
        for event in events:
            if event["entry"] not in prints:
                raise DataError(
                    f"plan log: the event of step {event['step']} quarantines an episode of entry {event['entry']!r}; the "
                    f"mixture has {', '.join(prints)}"
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

    def episodes(self, entry: int) -> Ints:
        """Numbers of an entry's episodes that are quarantined at any step."""
        mine = self._keys >> 40 == entry
        return self._keys[mine] & ((1 << 40) - 1)

    def holds(self, entry: Ints, episode: Ints, step: Ints) -> NDArray[np.bool_]:
        """Whether each episode is quarantined at the step."""
        if not len(self):
            return np.zeros(len(entry), bool)
        key = entry << 40 | episode
        i = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return (self._keys[i] == key) & (step >= self._steps[i])


class Drawer:
    """Draws rows from an index under a mix. `counter` is the step plus the steps skipped before it."""

    def __init__(self, index: PlanIndex, mix: Mix, budget: int, seed: int, tiles: bool = False) -> None:
        self.index, self.mix, self.budget, self.seed, self.tiles = index, mix, budget, seed, tiles
        self._before = np.asarray(
            index.mass[index.first]
        )  # running mass before each cell: small enough for the processor's caches
        self.prompt_room = np.maximum(budget - index.least, 0)  # most tokens of a prompt, by stratum
        # What a row reserves for its prompt until its first window is known
        strata = index.strata
        wanted = index.costs.fit(np.arange(len(strata)), self.prompt_room)
        self.reserve = np.minimum(_most_tokens(index, np.minimum(strata.prompt_units, wanted)), self.prompt_room)
        mass = index.cell_mass.sum(0)
        size = np.divide(index.content.reshape(index.buckets, -1).sum(0), mass, where=mass > 0, out=np.ones(len(mass)))
        self.rooms: list[Ints] | None = None  # if this is a list, the room of each draw from slot 2 on is added to it
        self._slots = int(
            np.clip(budget // max(size.max(initial=1.0), 1.0), 1, 64)
        )  # slots of a row that are drawn together

    def rows(self, counter: Ints, row: Ints, bucket: Ints) -> tuple[Columns, Columns]:
        """Windows and prompts of rows, before any redraw. Windows are ordered by row, then slot."""
        left, slot = np.full(len(row), self.budget, np.int64), np.ones(len(row), np.int64)
        alive = np.arange(len(row))
        heads, prompts = self._heads(counter, row, bucket, left, slot)
        found = [heads]
        ending = [np.zeros(0, np.int64)]
        while len(alive):
            columns, roomy = self._roomy(alive, counter, row, bucket, left, slot)
            found.append(columns)
            ending.append(alive[~roomy])
            alive = alive[roomy]
        found += self._short(np.concatenate(ending), counter, row, bucket, left, slot)
        out = {k: np.concatenate([f[k] for f in found]) for k in heads}
        order = np.argsort(out["at"] << 16 | out["slot"], kind="stable")
        return {k: v[order] for k, v in out.items()}, prompts

    def _roomy(
        self, alive: Ints, counter: Ints, row: Ints, bucket: Ints, left: Ints, slot: Ints
    ) -> tuple[Columns, NDArray[np.bool_]]:
        """The next slots of rows, as long as the room holds the largest window of the stratum that is drawn.

        Updates `left` and `slot`. Returns the windows, and for each row whether all slots were of this kind and room is left.
        """
        slots = slot[alive][:, None] + np.arange(self._slots)
        a, b, c, _ = words(self.seed, counter[alive][:, None], row[alive][:, None], slots, purpose=WINDOW)
        cell = self.cell(np.repeat(bucket[alive], self._slots), a.ravel())
        place, start, units, cost = self._whole(cell, b.ravel(), c.ravel())
        cell, place, start, units, cost = (x.reshape(slots.shape) for x in (cell, place, start, units, cost))
        end = np.cumsum(cost, 1)
        before = left[alive][:, None] - (end - cost)
        fits = np.logical_and.accumulate(before >= self.index.strata.full[cell % len(self.index.strata)], axis=1)
        r, k = np.nonzero(fits)
        if self.rooms is not None:
            later = slots[r, k] > 1
            self.rooms.append(before[r[later], k[later]])
        columns = _columns(alive[r], slots[r, k], cell[r, k], place[r, k], start[r, k], units[r, k], cost[r, k])
        taken = fits.sum(1)
        left[alive] -= np.where(taken > 0, end[np.arange(len(alive)), taken - 1], 0)
        slot[alive] += taken
        return columns, (taken == self._slots) & (left[alive] > 0)

    def _short(self, alive: Ints, counter: Ints, row: Ints, bucket: Ints, left: Ints, slot: Ints) -> list[Columns]:
        """The last slots of rows, one after the other. A row ends if its room is below `index.least` of the stratum drawn."""
        found, refused = [], np.zeros(len(row), np.int64)
        while len(alive):
            a, b, c, d = words(self.seed, counter[alive], row[alive], slot[alive], purpose=WINDOW)
            cell = self.cell(bucket[alive], a)
            if self.rooms is not None:
                self.rooms.append(left[alive])
            going = left[alive] >= self.index.least[cell % len(self.index.strata)]
            alive, cell = alive[going], cell[going]
            b, c, d = b[going], c[going], d[going]
            place, start, units, cost, accepted = self.take(cell, b, c, d, left[alive])
            mine = np.flatnonzero(accepted)
            at = alive[mine]
            found.append(_columns(at, slot[at], cell[mine], place[mine], start[mine], units[mine], cost[mine]))
            left[at] -= cost[mine]
            slot[alive] += 1
            refused[alive] = np.where(accepted, 0, refused[alive] + 1)
            alive = alive[refused[alive] < _TRIES]
        return found

    def cell(self, bucket: Ints, word: Words) -> Ints:
        """Draws a cell of each bucket, by the mix."""
        return np.searchsorted(self.mix.choice, bucket + uniform32(word), side="right")

    def _whole(self, cell: Ints, high: Words, low: Words) -> tuple[Ints, Ints, Ints, Ints]:
        """Place, start, units and tokens of a window of each cell, if the room is not short."""
        place, part = self.episode(cell, uniform53(high, low))
        stratum = cell % len(self.index.strata)
        fixed = self.index.fixed[place].astype(np.int64)
        start, units = self._span(place, part, self.index.window(stratum, fixed))
        return place, start, units, fixed + self.index.cost(stratum, place, start, units)

    def take(
        self, cell: Ints, high: Words, low: Words, chance: Words, room: Ints
    ) -> tuple[Ints, Ints, Ints, Ints, NDArray[np.bool_]]:
        """Place, start, units and tokens of a window of each cell within the room, and whether the draw is accepted."""
        index, stratum = self.index, cell % len(self.index.strata)
        place, part = self.episode(cell, uniform53(high, low))
        fixed = index.fixed[place].astype(np.int64)
        window = index.window(stratum, fixed)
        short = room < index.strata.full[stratum]
        fit = np.where(short, np.minimum(window, index.costs.fit(stratum, room - fixed)), window)
        if index.starts == "windows":
            start, units = self._span(place, part, window)
            units = np.minimum(units, fit)
            accepted = units > 0
        else:
            accepted = ~short | (uniform32(chance) * self._bound(stratum, room) < self._ratio(place, window, fit))
            start, units = self._span(place, part, np.maximum(fit, 1))
        return place, start, units, fixed + index.cost(stratum, place, start, units), accepted

    def _ratio(self, place: Ints, window: Ints, fit: Ints) -> NDArray[np.float64]:
        """((T − 1) / K' + 1) / ((T − 1) / K + 1) of each episode (see the module)."""
        rest = self.index.units[place].astype(np.float64) - 1
        return (rest / np.maximum(fit, 1) + 1) / (rest / window + 1)

    def _bound(self, stratum: Ints, room: Ints) -> NDArray[np.float64]:
        """An upper bound of `_ratio` over the episodes of a stratum; exact if all have the same fixed tokens."""
        strata, costs = self.index.strata, self.index.costs
        low, high, rest = strata.fixed_low[stratum], strata.fixed_high[stratum], strata.longest[stratum] - 1.0
        window, window_high = self.index.window(stratum, low), self.index.window(stratum, high)
        fit = np.minimum(window, costs.fit(stratum, room - low))
        fit_high = np.maximum(np.minimum(window_high, costs.fit(stratum, room - high)), 1)
        same = low == high
        bound = (window / fit_high) * np.minimum((rest + fit) / (rest + window_high), 1.0)
        return np.where(same, (rest / fit_high + 1) / (rest / window_high + 1), bound)

    def _span(self, place: Ints, part: NDArray[np.float64], window: Ints) -> tuple[Ints, Ints]:
        """Start and units of a window of each episode. `part`, in [0, 1), is where in the episode's mass the draw fell."""
        units = self.index.units[place].astype(np.int64)
        if self.tiles:
            count = tile_count(units, window)
            start = np.minimum((part * count).astype(np.int64), count - 1) * window
            return start, np.minimum(window, units - start)
        if self.index.starts == "windows":
            count = np.maximum(units - window + 1, 1)
            return np.minimum((part * count).astype(np.int64), count - 1), np.minimum(window, units)
        count = units + window - 1
        first = np.minimum((part * count).astype(np.int64), count - 1) - (window - 1)
        start = np.maximum(first, 0)
        return start, np.minimum(first + window, units) - start

    def episode(self, cell: Ints, uniform: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float64]]:
        """Draws an episode of each cell, by mass. Returns its place, and where in its mass the draw fell, in [0, 1)."""
        index = self.index
        first, end = index.first[cell], index.first[cell + 1]
        low = self._before[cell]
        point = low + uniform * (self._before[cell + 1] - low)
        found = index.find(point)
        place: Ints = np.minimum(np.maximum(found, first), end - 1)
        below = index.mass[place]
        return place, (point - below) / (index.mass[place + 1] - below)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _heads(self, counter: Ints, row: Ints, bucket: Ints, left: Ints, slot: Ints) -> tuple[Columns, Columns]:
        """The first windows and the prompts of those rows that have a prompt.

        Updates `left` and `slot`. The first window is drawn within the room that the longest prompt leaves, so it does not
        depend on the prompt. The prompt is drawn for the window that was found.
        """
        strata = self.index.strata
        word = words(self.seed, counter, row, 1, purpose=WINDOW)[0]
        cell = self.cell(bucket, word)
        chance = np.where(self.reserve > 0, strata.prompt, 0.0)[cell % len(strata)]
        at = np.flatnonzero(chance > 0)
        if len(at):
            yes = uniform32(words(self.seed, counter[at], row[at], 0, purpose=PROMPT)[0])
            at = at[yes < chance[at]]
        cell = cell[at]
        found = []
        for _ in range(_TRIES):
            if not len(at):
                break
            _, b, c, d = words(self.seed, counter[at], row[at], slot[at], purpose=WINDOW)
            room = self.budget - self.reserve[cell % len(strata)]
            place, start, units, cost, accepted = self.take(cell, b, c, d, room)
            columns = _columns(at, slot[at], cell, place, start, units, cost)
            found.append({k: v[accepted] for k, v in columns.items()})
            slot[at] += 1
            at, cell = at[~accepted], cell[~accepted]
        heads = {k: np.concatenate([f[k] for f in found]) for k in found[0]} if found else _nothing()
        order = np.argsort(heads["at"], kind="stable")
        heads = {k: v[order] for k, v in heads.items()}
        where = heads["at"]
        prompts = self.prompt(heads, counter[where], row[where], 0)
        left[where] -= heads["tokens"]
        left[prompts["at"]] -= prompts["tokens"]
        return heads, prompts

    def own_prompts(self, windows: Columns, counter: Ints, row: Ints) -> Columns:
        """The prompts of those windows that have one of their own. Their room is part of the windows' fixed tokens."""
        strata = self.index.strata
        at = np.flatnonzero(strata.every[windows["cell"] % len(strata)] > 0)
        mine = {k: v[at] for k, v in windows.items()}
        where, stratum = mine["at"], mine["cell"] % len(strata)
        yes = (
            uniform32(words(self.seed, counter[where], row[where], mine["slot"], purpose=PROMPT)[0])
            < strata.every[stratum]
        )
        mine = {k: v[yes] for k, v in mine.items()}
        return self.prompt(
            mine, counter[where[yes]], row[where[yes]], 0, np.full(int(yes.sum()), self.budget), mine["slot"]
        )

    def prompt(
        self,
        windows: Columns,
        counter: Ints,
        row: Ints,
        attempt: int,
        room: Ints | None = None,
        slot: Ints | int = 0,
    ) -> Columns:
        """A prompt for each window. It shows no step of the window: it is taken from another episode of the cell, or, if there is
        none, from the same episode before or after the window. If nothing is left there, the window has no prompt.

        A share of the prompts are the end of their episode, the others lie anywhere in it (Reed et al. 2022, section 2.2: one
        half). `slot`: that of the window if it is the window's own prompt; 0: it is the row's.
        """
        index, strata = self.index, self.index.strata
        cell, place = windows["cell"], windows["place"]
        stratum = cell % len(strata)
        _, b, c, d = words(self.seed, counter, row, slot, attempt, purpose=PROMPT)
        other, part, alone = self._another(cell, place, uniform53(b, c))
        room = self.reserve[stratum] if room is None else room
        most = np.minimum(strata.prompt_units[stratum], index.costs.fit(stratum, room))
        # The part of the episode that the prompt may be taken from
        begin, end = np.zeros(len(cell), np.int64), index.units[other].astype(np.int64)
        before, after = windows["start"], windows["start"] + windows["units"]
        late = end - after >= before  # as many units after the window as before it, or more
        begin = np.where(alone & late, after, begin)
        end = np.where(alone & ~late, before, end)
        units = np.minimum(most, end - begin)
        last = end - units
        free = last - begin
        turned = (d & np.uint64(1)) << np.uint64(31) | d >> np.uint64(
            1
        )  # its lowest bit decides where `ends` is one half
        start = np.where(
            uniform32(turned) >= 1 - strata.ends[stratum],
            last,
            begin + np.minimum((part * (free + 1)).astype(np.int64), free),
        )
        keep = units > 0
        number = np.where(np.asarray(slot) > 0, slot + np.int64(OWN), np.zeros(len(cell), np.int64))
        columns = _columns(windows["at"], number, cell, other, start, units, np.zeros(len(cell), np.int64))
        columns = {k: v[keep] for k, v in columns.items()}
        columns["tokens"] = index.cost(stratum[keep], other[keep], columns["start"], columns["units"])
        return columns

    def _another(
        self, cell: Ints, place: Ints, uniform: NDArray[np.float64]
    ) -> tuple[Ints, NDArray[np.float64], NDArray[np.bool_]]:
        """Draws another episode of the cell, by mass: its place, where in its mass the draw fell, and whether there is none."""
        index = self.index
        first, end = index.first[cell], index.first[cell + 1]
        low, high, mine, mine_end = self._before[cell], self._before[cell + 1], index.mass[place], index.mass[place + 1]
        alone = end - first < 2
        point = low + uniform * (high - low - (mine_end - mine))
        point = np.where(point >= mine, point + (mine_end - mine), point)
        other = np.minimum(np.maximum(index.find(point), first), end - 1)
        # Rounding may put a draw at the edge of `place` into `place`.
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
        first: Columns | None,
    ) -> Columns:
        """Draws windows anew, or, if `first` is given, prompts.

        Parameters
        ----------
        columns
            The windows, or prompts, to be replaced.
        needed : int64 [n]
            Least acceptable attempt of each, at least 1.
        refused : callable
            (cell, place, position in `columns`) -> bool [n]: whether an episode must not be used.
        first
            For prompts: the windows that they stand before.

        A substitute has the same bucket and at most the same tokens. It has the same task too, but windows may have another task
        of the bucket from attempt 17 on. Elements for which 64 attempts find nothing have 0 units in the result.
        """
        out = {k: v.copy() for k, v in columns.items()} | {"attempt": np.zeros(len(row), np.int64)}
        out["units"][:] = 0
        open_ = np.arange(len(row))
        for attempt in range(1, ATTEMPTS + 1):
            of = open_
            if first is None:
                new = self._redrawn(columns, counter, row, bucket, of, attempt)
            else:
                chosen = {k: v[of] for k, v in first.items()} | {"at": of}
                slot = columns["slot"][of] % OWN
                new = self.prompt(chosen, counter[of], row[of], attempt, columns["tokens"][of], slot)
                of = new["at"]  # those that have another prompt
            good = (new["units"] > 0) & (attempt >= needed[of]) & ~refused(new["cell"], new["place"], of)
            if attempt <= OTHER_EPISODE:
                good &= new["place"] != columns["place"][of]
            for k in ("cell", "place", "start", "units", "tokens"):
                out[k][of[good]] = new[k][good]
            out["attempt"][of[good]] = attempt
            open_ = np.setdiff1d(open_, of[good], assume_unique=True)
            if not len(open_):
                break
        return out

    def _redrawn(self, columns: Columns, counter: Ints, row: Ints, bucket: Ints, of: Ints, attempt: int) -> Columns:
        index, strata = self.index, self.index.strata
        a, b, c, _ = words(self.seed, counter[of], row[of], columns["slot"][of], attempt, purpose=WINDOW)
        cell = columns["cell"][of] if attempt <= SAME_TASK else self.cell(bucket[of], a)
        place, part = self.episode(cell, uniform53(b, c))
        stratum, fixed = cell % len(strata), index.fixed[place].astype(np.int64)
        window = index.window(stratum, fixed)
        fit = np.minimum(window, index.costs.fit(stratum, columns["tokens"][of] - fixed))
        start, units = self._span(
            place, part, window if self.tiles or index.starts == "windows" else np.maximum(fit, 1)
        )
        units = np.where(fit > 0, np.minimum(units, fit), 0)
        tokens = fixed + index.cost(stratum, place, start, units)
        return {"cell": cell, "place": place, "start": start, "units": units, "tokens": tokens}


def _columns(at: Ints, slot: Ints, cell: Ints, place: Ints, start: Ints, units: Ints, tokens: Ints) -> Columns:
    return {"at": at, "slot": slot, "cell": cell, "place": place, "start": start, "units": units, "tokens": tokens}


def _nothing() -> Columns:
    return _columns(*(np.zeros(0, np.int64) for _ in range(7)))


def _most_tokens(index: PlanIndex, units: Ints) -> Ints:
    """Most tokens of so many units of each stratum."""
    costs = index.costs
    return np.asarray((costs.tokens * -(-units // costs.period)).sum(0), np.int64)
