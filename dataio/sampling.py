"""SamplingPlan: which windows make each row of each step's global batch, as a pure function of seed, step, row and log.

All windows of a row, its prompt too, come from one bucket of episodes, so that a row can be served where its bytes are (see
`placement`). Each global batch takes its rows at even distances along the line of all buckets' mass, from an offset that moves
by the golden ratio from step to step: in any span of steps every bucket gets its share of the rows up to one or two.

Slot 0 of a row is its prompt, where it has one; windows count from 1.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.philox import BUCKET, words
from tiphys.dataio.plan.draws import Columns, Drawer, Ints, Quarantine
from tiphys.dataio.plan.entries import EntryLengths, PlanEntry, PlannedWindows
from tiphys.dataio.plan.epochs import EpochDrawer, epoch_mix
from tiphys.dataio.plan.index import STARTS, Drawing, PlanIndex, digest, drawable_episodes
from tiphys.dataio.plan.log import Event, PlanLog
from tiphys.dataio.plan.mixture import UNIT, Mix, entry_shares, free_mix
from tiphys.dataio.plan.phases import PlanHistory
from tiphys.dataio.plan.report import report

__all__ = ["EntryLengths", "PlanEntry", "PlannedWindows", "SamplingPlan", "choose_buckets"]

VERSION = 2  # of the draws: another version draws other windows from the same seed
_GOLDEN = 10368889  # the odd number nearest UNIT / golden ratio: offsets of any span of steps are spread evenly


def _part(planned: PlannedWindows, part: slice) -> PlannedWindows:
    columns: Any = (column[part] for column in planned)
    return PlannedWindows(*columns)


def choose_buckets(episodes: int, rows: int, prompted: int | None = None) -> int:
    """Number of buckets: the largest power of two that is at most `rows`, and that leaves 400 episodes of each task in a bucket
    (1,000 of a task with prompts). With fewer, gradients would vary more than with independent draws.

    Parameters
    ----------
    episodes : int
        Drawable episodes of the smallest task of an entry with a weight above 0.
    rows : int
        Rows of the global batch.
    prompted : int, optional
        The same of the smallest task with prompts.
    """
    most = min(rows, episodes // 400, rows if prompted is None else prompted // 1000)
    return 1 << (max(most, 1).bit_length() - 1)


@dataclass(frozen=True)
class _Ready:
    """A phase with all that drawing from it needs."""

    index: PlanIndex
    mix: Mix
    drawer: Drawer
    skipped: int

    def segment(self, position: Ints) -> Ints:
        return np.searchsorted(self.mix.cut, position, side="right") - 1

    def bucket(self, segment: Ints) -> Ints:
        return segment // (len(self.mix.cut) // self.index.buckets)


class SamplingPlan:
    """See the module.

    Args:
        rows: rows of the global batch.
        budget: tokens of a row.
        weight_unit: `windows` or `tokens`: what an entry's weight counts. Prompts do not count.
        starts: `steps` or `windows`: what is equally likely, each step of a task or each full window (`plan.draws`).
        replacement: False: epochs over disjoint tiles of the episodes.
        buckets: number of buckets; 0: `choose_buckets`.
        validation, held_out: share of episodes held out; whether to draw only from those, or never.
        log: events that change the plan.
        cache_dir: folder for the sorted index, which is then mapped into memory; empty: in memory.
        open_entry: opens the dataset of a `dataset` event.

    DataError where nothing can be drawn, or a window cannot fit a row.
    """

    def __init__(
        self,
        entries: Sequence[PlanEntry],
        *,
        rows: int,
        budget: int,
        seed: int,
        weight_unit: str = "windows",
        replacement: bool = True,
        buckets: int = 0,
        validation: float = 0.0,
        held_out: bool = False,
        log: PlanLog | None = None,
        cache_dir: str = "",
        starts: str = "steps",
        open_entry: Callable[[Event], PlanEntry] | None = None,
    ) -> None:
        if weight_unit not in ("windows", "tokens"):
            raise ValueError(f"weight_unit {weight_unit!r} is neither 'windows' nor 'tokens'")
        if starts not in STARTS:
            raise ValueError(f"starts {starts!r} is neither 'steps' nor 'windows'")
        if rows < 1 or budget < 1:
            raise ValueError(f"a plan needs at least one row and one token a row, not {rows} rows of {budget}")
        if not entries:
            raise DataError("mixture: no entries")
        self.rows, self.budget, self.seed = rows, budget, seed
        self.weight_unit, self.replacement = weight_unit, replacement
        self.validation, self.held_out = validation, held_out
        self.cache_dir, self.starts = cache_dir, starts
        self._first_entries = tuple(entries)
        self.buckets = buckets or self._choose_buckets()
        self.log = log if log is not None else PlanLog()
        self.step = 0
        self._offset = int(words(seed, 0, purpose=BUCKET)[0]) % UNIT
        self._fingerprint = ""
        self._indexes: dict[tuple[int, ...], PlanIndex] = {}
        self._history = PlanHistory(self._first_entries, open_entry)
        self._forget()
        self._ready(0)  # errors of the data now, not at the first step

    def _choose_buckets(self) -> int:
        """By the smallest task of an entry with a weight above 0, and the smallest one with prompts."""
        smallest, prompted = 2**62, None
        for entry in self._first_entries:
            counts = drawable_episodes(entry, self.validation, self.held_out)
            share = np.asarray(entry.lengths.prompt)[list(entry.tasks)]
            if entry.weight > 0 and (counts > 0).any():
                smallest = min(smallest, int(counts[counts > 0].min()))
                if (with_prompts := counts[(counts > 0) & (share > 0)]).size:
                    prompted = min(prompted or 2**62, int(with_prompts.min()))
        return choose_buckets(smallest, self.rows, prompted)

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """All entries, those that `dataset` events of the log add last. Windows count their entries in this order."""
        if len(self.log) != self._applied:
            self._forget()
        return self._phases[-1].entries

    def check(self, event: Event) -> None:
        """Raises DataError if an event does not fit this plan; changes nothing."""
        self._history.phases([*self.log.events, event])

    # -- rows --------------------------------------------------------------------------------------------------------

    def row_buckets(self, step: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Of each row of the step's global batch: its position on the mass line, in [0, 1), ascending, and its bucket."""
        _, phase = self._phase(step)
        counter = np.full(self.rows, step + phase.skipped, np.int64)
        position = self.positions(counter, np.arange(self.rows))
        segment = phase.segment(position)
        return position / (self.rows * UNIT), phase.bucket(segment).astype(np.int32)

    def offset(self, step: int) -> int:
        """Where the step's first row stands on the line of rows · UNIT positions; the others follow at distances of UNIT."""
        counter = np.array([step + self._phase(step)[1].skipped], np.int64)
        return int(self.positions(counter, np.zeros(1, np.int64))[0])

    def segments(self, step: int) -> tuple[Ints, Ints, Ints]:
        """The line's parts: bucket, first position, and end of each, by the weights in force at the step."""
        phase = self._phase(step)[1]
        return phase.bucket(np.arange(len(phase.mix.cut) - 1)), phase.mix.cut[:-1], phase.mix.cut[1:]

    def positions(self, counter: Ints, row: Ints) -> Ints:
        """Where rows stand on the line of rows · UNIT positions, by the plan's own count of steps."""
        return row * UNIT + (self._offset + _GOLDEN * (counter % UNIT)) % UNIT

    def windows(
        self, step: int, rows: ArrayLike | None = None, attempts: Mapping[tuple[int, int], int] | None = None
    ) -> PlannedWindows:
        """The windows of some rows (all: None) of a step.

        attempts: (row, slot) -> least attempt that is acceptable, for windows that could not be read: the next of the same task
        and bucket, within the same tokens; all other windows stay as they are. The window delivered says its `attempt`.
        """
        rows = np.arange(self.rows) if rows is None else np.asarray(rows, np.int64)
        return self.many([step], [rows], attempts)[0]

    def many(
        self,
        steps: Sequence[int],
        rows: Sequence[NDArray[np.int64]],
        attempts: Mapping[tuple[int, int], int] | None = None,
    ) -> list[PlannedWindows]:
        """`windows` of several steps at once, which costs much less for each: `rows[i]` of `steps[i]`."""
        out: list[PlannedWindows] = []
        for number, group in itertools.groupby(range(len(steps)), lambda i: self._phase(steps[i])[0]):
            phase, chosen = self._ready(number), list(group)
            sizes = [len(rows[i]) for i in chosen]
            step = np.repeat(np.array([steps[i] for i in chosen], np.int64), sizes)
            row = np.concatenate([np.asarray(rows[i], np.int64) for i in chosen])
            if len(row) and not (row.min() >= 0 and row.max() < self.rows):
                raise ValueError(f"rows are numbered from 0 to {self.rows - 1}, not {row.min()} to {row.max()}")
            at, planned = self._planned(phase, step, row, attempts or {})
            ends = np.searchsorted(at, np.cumsum(sizes))
            starts = [0, *ends[:-1]]
            out += [_part(planned, slice(a, b)) for a, b in zip(starts, ends)]
        return out

    def _planned(
        self, phase: _Ready, step: Ints, row: Ints, attempts: Mapping[tuple[int, int], int]
    ) -> tuple[Ints, PlannedWindows]:
        # Rows of a bucket are drawn together, whatever their step: the searches then stay within a small part of the index.
        order = np.argsort(row, kind="stable")
        step, row = step[order], row[order]
        counter = step + phase.skipped
        segment = phase.segment(self.positions(counter, row))
        windows, prompts = phase.drawer.rows(counter, row, segment)
        windows["attempt"] = np.zeros(len(windows["at"]), np.int64)
        prompts["attempt"] = np.zeros(len(prompts["at"]), np.int64)
        if attempts or len(self._quarantine):
            windows, prompts = self._readable(phase, windows, prompts, step, row, segment, attempts)
        columns = {k: np.concatenate([prompts[k], windows[k]]) for k in windows}
        at = order[columns["at"]]
        arranged = np.argsort(at << 16 | columns["slot"])
        columns = {k: v[arranged] for k, v in columns.items()}
        stratum, place = columns["cell"] % len(phase.index.strata), columns["place"]
        return at[arranged], PlannedWindows(
            row=row[columns["at"]],
            slot=columns["slot"],
            entry=phase.index.strata.entry[stratum],
            task=phase.index.strata.task[stratum],
            episode=phase.index.episode[place].astype(np.int64),
            start=columns["start"],
            units=columns["units"],
            tokens=columns["tokens"],
            prompt=columns["slot"] == 0,
            attempt=columns["attempt"],
        )

    def _readable(
        self,
        phase: _Ready,
        windows: Columns,
        prompts: Columns,
        step: Ints,
        row: Ints,
        segment: Ints,
        attempts: Mapping[tuple[int, int], int],
    ) -> tuple[Columns, Columns]:
        """Windows and prompts with others in the place of those that are quarantined or were reported as unreadable.

        A prompt is drawn for the window that is delivered: if that was drawn anew, the prompt is too. A window without a
        substitute is dropped, and so is a prompt.
        """
        needed = self._needed(phase, windows, step, row, attempts)
        changed = np.flatnonzero(needed)
        windows = self._redrawn(phase, windows, None, changed, needed, step, row, segment)
        first = np.zeros(len(windows["at"]), bool)
        first[np.unique(windows["at"], return_index=True)[1]] = True
        heads = {k: v[first] for k, v in windows.items()}
        place = np.searchsorted(heads["at"], prompts["at"])
        alive = (place < len(heads["at"])) & (windows["units"][first][np.minimum(place, len(heads["at"]) - 1)] > 0)
        prompts, place = {k: v[alive] for k, v in prompts.items()}, place[alive]
        heads = {k: v[place] for k, v in heads.items()}
        needed = self._needed(phase, prompts, step, row, attempts)
        moved = np.isin(prompts["at"], windows["at"][changed][first[changed]])
        needed = np.where(moved, np.maximum(needed, 1), needed)
        prompts = self._redrawn(phase, prompts, heads, np.flatnonzero(needed), needed, step, row, segment)
        some, kept = windows["units"] > 0, prompts["units"] > 0
        return {k: v[some] for k, v in windows.items()}, {k: v[kept] for k, v in prompts.items()}

    def _refused(self, phase: _Ready, cell: Ints, place: Ints, step: Ints) -> NDArray[np.bool_]:
        entry = phase.index.strata.entry[cell % len(phase.index.strata)]
        return self._quarantine.holds(entry, phase.index.episode[place].astype(np.int64), step)

    def _needed(
        self, phase: _Ready, columns: Columns, step: Ints, row: Ints, attempts: Mapping[tuple[int, int], int]
    ) -> Ints:
        """The least attempt that is acceptable for each window: 0 for those that stay."""
        at = columns["at"]
        needed = self._refused(phase, columns["cell"], columns["place"], step[at]).astype(np.int64)
        if attempts:
            asked = [attempts.get(key, 0) for key in zip(row[at].tolist(), columns["slot"].tolist())]
            needed = np.maximum(needed, asked)
        return needed

    def _redrawn(
        self,
        phase: _Ready,
        columns: Columns,
        heads: Columns | None,
        again: Ints,
        needed: Ints,
        step: Ints,
        row: Ints,
        segment: Ints,
    ) -> Columns:
        """The columns with those in `again` drawn anew; `heads`: they are prompts, of these windows."""
        if not len(again):
            return columns
        part = {k: v[again] for k, v in columns.items()}
        first = None if heads is None else {k: v[again] for k, v in heads.items()}
        when, where = step[part["at"]], part["at"]
        new = phase.drawer.redraw(
            part,
            phase.skipped + when,
            row[where],
            phase.bucket(segment[where]),
            needed[again],
            lambda cell, place, of: self._refused(phase, cell, place, when[of]),
            first,
        )
        columns = {k: v.copy() for k, v in columns.items()}
        for k in ("cell", "place", "start", "units", "tokens", "attempt"):
            columns[k][again] = new[k]
        return columns

    # -- what changes ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Replays the log. What did not change is not built again."""
        self._applied = len(self.log)
        self._phases = self._history.phases(self.log.events)
        self._firsts = [p.first for p in self._phases]
        self._built: dict[int, _Ready] = {}
        known = [(e.name, e.index.fingerprint) for e in self._phases[-1].entries]
        self._quarantine = Quarantine((e for e in self.log.events if e["kind"] == "quarantine"), known)
        self._check_left()

    def _check_left(self) -> None:
        """DataError if quarantine leaves nothing of an entry with a weight above 0, before a step wants it."""
        for number, entry in enumerate(self._phases[-1].entries):
            gone = self._quarantine.episodes(number)
            if not len(gone) or self._phases[-1].weights[number] <= 0:
                continue
            counts = drawable_episodes(entry, self.validation, self.held_out, without=gone)
            if not counts.sum():
                raise DataError(
                    f"mixture: entry {entry.name!r} has no episode left: all that could be drawn are quarantined as unreadable; "
                    "run `tiphys verify` on its dataset, or set its weight to 0"
                )

    def _phase(self, step: int) -> tuple[int, _Ready]:
        if len(self.log) != self._applied:
            self._forget()
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        number = bisect_right(self._firsts, step) - 1
        return number, self._ready(number)

    def _ready(self, number: int) -> _Ready:
        if number not in self._built:
            phase = self._phases[number]
            index = self._index(phase.entries)
            shares = entry_shares(index, phase.weights, [e.name for e in phase.entries], self.held_out)
            if self.replacement:
                mix = free_mix(index, shares, self.rows, self.weight_unit)
            else:
                mix = epoch_mix(index, shares, self.rows, self.budget, self.weight_unit)
            drawer = (
                Drawer(index, mix, self.budget, self.seed) if self.replacement else self._epochs(number, index, mix)
            )
            self._built[number] = _Ready(index, mix, drawer, phase.skipped)
        return self._built[number]

    def _epochs(self, number: int, index: PlanIndex, mix: Mix) -> EpochDrawer:
        """Streams go on where the phase before left them, but for entries whose episodes changed."""
        phase = self._phases[number]
        begun, entries = phase.first + phase.skipped, len(phase.entries)
        before, generation = np.zeros((self.buckets, entries), np.int64), np.zeros(entries, np.int64)
        if number:
            last = self._phases[number - 1].entries
            drawer = self._ready(number - 1).drawer
            assert isinstance(drawer, EpochDrawer)
            old = drawer.numbers(np.arange(self.buckets * len(last)), np.full(self.buckets * len(last), begun))
            generation[: len(last)] = drawer.generation
            for i, entry in enumerate(last):
                if entry is phase.entries[i]:
                    before[:, i] = old.reshape(self.buckets, -1)[:, i]
                else:
                    generation[i] += 1
        return EpochDrawer(
            index,
            mix,
            self.budget,
            self.seed,
            slope=_GOLDEN,
            offset=self._offset,
            begun=begun,
            before=before.reshape(-1),
            generation=generation,
        )

    def _index(self, entries: tuple[PlanEntry, ...]) -> PlanIndex:
        key = tuple(map(id, entries))
        if key not in self._indexes:
            how = Drawing(
                self.buckets, self.budget, self.validation, self.held_out, self.starts, tiles=not self.replacement
            )
            self._indexes[key] = PlanIndex.open(entries, how, self.cache_dir)
        return self._indexes[key]

    def describe(self, step: int = 0) -> dict[str, Any]:
        """What the plan delivers under the weights in force at a step (see `plan_report.report`); JSON."""
        number, phase = self._phase(step)
        names = [e.name for e in self._phases[number].entries]
        kind = {"replacement": self.replacement, "weight_unit": self.weight_unit, "held_out": self.held_out}
        told = report(phase.index, phase.mix, names, self.rows, self.budget)
        return {"buckets": self.buckets, "rows": self.rows, "budget": self.budget, **kind, **told}

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Names everything but the log that the plan's draws depend on."""
        if not self._fingerprint:
            numbers = [
                VERSION,
                self.starts,
                self.rows,
                self.budget,
                self.seed,
                self.weight_unit,
                self.replacement,
                self.buckets,
                self.validation,
            ]
            weights = [[e.name, float(e.weight)] for e in self._first_entries]
            self._fingerprint = digest(self._first_entries, [*numbers, self.held_out, weights])
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """JSON: the step that comes next (`step`, kept by whoever consumes the plan), the log, and what must be the same."""
        return {
            "step": self.step,
            "version": VERSION,
            "log": list(self.log.events),
            "buckets": self.buckets,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. The log's events that this plan lacks are added; ValueError where the plan is another one."""
        if state.get("version", 1) != VERSION:
            raise ValueError(
                f"plan: the checkpoint was drawn by version {state.get('version', 1)} of the sampling plan; this Tiphys draws by "
                f"version {VERSION}, so the same steps would show other windows. Finish the run with the Tiphys that began it, "
                "or start a new run"
            )
        if state["buckets"] != self.buckets:
            raise ValueError(
                f"plan: the checkpoint was drawn from {state['buckets']} buckets, this plan has {self.buckets}; set "
                f"data.buckets={state['buckets']}"
            )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "plan: the checkpoint belongs to another plan (data, objective, batch size, seed or weights differ); start a new "
                "run, or restore the recipe that wrote it"
            )
        mine = list(self.log.events)
        for event in state["log"]:
            if event in mine:
                mine.remove(event)
            else:
                self.log.append(event)
        self.step = int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; the sorted index is built there, or mapped from `cache_dir`."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_indexes", "_built")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indexes = {}
        self._forget()
