"""SamplingPlan: which windows make each row of each step's global batch, as a pure function of seed, step, row and log.

All windows of a row, its prompt included, come from one bucket of episodes, so a row can be computed where its data is cached
(see `placement`). Each bucket has a part of a line, in proportion to its share of the rows. The rows of a step stand on this
line at even distances, from an offset that moves by the golden ratio from step to step. So in any span of steps each bucket gets
its share of the rows, up to one or two.

Slot 0 of a row is its prompt, if it has one. The slots of its windows count from 1. A window's own prompt stands before it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.philox import BUCKET, words
from tiphys.dataio.plan.buckets import buckets_of
from tiphys.dataio.plan.draws import Drawer, Ints, Quarantine
from tiphys.dataio.plan.entries import EntryLengths, PlanEntry, PlannedWindows
from tiphys.dataio.plan.epochs import EpochDrawer, epoch_mix
from tiphys.dataio.plan.index import STARTS, Drawing, PlanIndex, digest, drawable_episodes
from tiphys.dataio.plan.log import Event, PlanLog
from tiphys.dataio.plan.mixture import UNIT, Mix, entry_shares, free_mix
from tiphys.dataio.plan.phase_draws import PhaseDraws
from tiphys.dataio.plan.phases import PlanHistory
from tiphys.dataio.plan.report import report

__all__ = ["EntryLengths", "PlanEntry", "PlannedWindows", "SamplingPlan"]

VERSION = 2  # another version draws other windows from the same seed
_GOLDEN = 10368889  # the odd number nearest to UNIT / golden ratio: the offsets of any span of steps are spread evenly


def _part(planned: PlannedWindows, part: slice) -> PlannedWindows:
    columns: Any = (column[part] for column in planned)
    return PlannedWindows(*columns)


class SamplingPlan:
    """Which windows make each row of each training step, as a pure function of seed, step, row and log.

    A plan reads only the indexes of the datasets. It can be pickled and sent to other processes.

    Parameters
    ----------
    entries : sequence of PlanEntry
        The entries of the mixture.
    rows : int
        Rows of the global batch.
    budget : int
        Tokens of a row.
    seed : int
        Key of the random numbers.
    weight_unit : "windows" or "tokens"
        What an entry's weight counts. Prompts do not count.
    replacement : bool
        False: epochs over disjoint tiles of the episodes (`plan.epochs`).
    buckets : int
        Number of buckets; 0: as `choose_buckets` says.
    validation : float
        Share of the episodes that are held out.
    held_out : bool
        True: draw only held-out episodes. False: never draw them.
    log : PlanLog, optional
        Events that change the plan. The plan follows events that are added later.
    cache_dir : str
        Folder for the sorted index, which is then mapped into memory; empty: the index is built in memory.
    starts : "steps" or "windows"
        What is equally likely: each step of a task, or each full window (`plan.draws`).
    open_entry : callable, optional
        Opens the dataset of a `dataset` event: event -> PlanEntry.

    Attributes
    ----------
    rows, budget, seed, weight_unit, replacement, validation, held_out, log, cache_dir, starts
        As given.
    buckets : int
        Number of buckets.
    step : int
        The step that comes next. The consumer of the plan updates it, and `state_dict` saves it.

    Raises
    ------
    DataError
        If nothing can be drawn from an entry with a weight above 0 (if `held_out`: from all of them), a row cannot hold one unit
        of a task, there are no entries, or an event of the log does not fit.
    ValueError
        If an argument has no valid value.
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
            raise ValueError(f"weight_unit must be 'windows' or 'tokens', not {weight_unit!r}")
        if starts not in STARTS:
            raise ValueError(f"starts must be 'steps' or 'windows', not {starts!r}")
        if rows < 1 or budget < 1:
            raise ValueError(f"a plan needs at least one row of at least one token, not {rows} rows of {budget} tokens")
        if not entries:
            raise DataError("mixture: no entries; give the plan at least one")
        self.rows, self.budget, self.seed = rows, budget, seed
        self.weight_unit, self.replacement = weight_unit, replacement
        self.validation, self.held_out = validation, held_out
        self.cache_dir, self.starts = cache_dir, starts
        self._first_entries = tuple(entries)
        self.buckets = buckets or buckets_of(self._first_entries, rows, validation, held_out)
        self.log = log if log is not None else PlanLog()
        self.step = 0
        self._offset = int(words(seed, 0, purpose=BUCKET)[0]) % UNIT
        self._fingerprint = ""
        self._indexes: dict[tuple[int, ...], PlanIndex] = {}
        self._history = PlanHistory(self._first_entries, open_entry)
        self._replay()
        self._ready(0)  # so that data errors are raised now, not at the first step

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """All entries; those that `dataset` events add come last. `PlannedWindows.entry` is a position in this tuple."""
        if len(self.log) != self._applied:
            self._replay()
        return self._phases[-1].entries

    def check(self, event: Event) -> None:
        """Check that an event fits this plan, without adding it to the log.

        Parameters
        ----------
        event : dict
            An event as `PlanLog.append` takes it.

        Raises
        ------
        DataError
            If it does not fit: for example, it names an unknown entry.
        """
        for phase in self._history.phases([*self.log.events, event]):
            if not phase.weights.any():
                raise DataError(
                    f"the event of step {event['step']} would leave no entry with a weight above 0 from step {phase.first} on"
                )

    # -- rows --------------------------------------------------------------------------------------------------------

    def row_buckets(self, step: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Where each row of a step's global batch stands on the line, and its bucket.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        float64 [rows]
            Positions on the line, in [0, 1), ascending.
        int32 [rows]
            Buckets.
        """
        _, phase = self._phase(step)
        counter = np.full(self.rows, step + phase.skipped, np.int64)
        position = self.positions(counter, np.arange(self.rows))
        segment = phase.segment(position)
        return position / (self.rows * UNIT), phase.bucket(segment).astype(np.int32)

    def offset(self, step: int) -> int:
        """Where row 0 of a step stands on the line of rows · UNIT positions. Row r stands r · UNIT after it.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        int
            At least 0, below UNIT.
        """
        counter = np.array([step + self._phase(step)[1].skipped], np.int64)
        return int(self.positions(counter, np.zeros(1, np.int64))[0])

    def segments(self, step: int) -> tuple[Ints, Ints, Ints]:
        """The parts of the line of rows · UNIT positions, by the weights in force at a step.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        tuple of int64 [segments]
            Bucket, first position and end of each part. Without replacement each entry has a part in each bucket.
        """
        phase = self._phase(step)[1]
        return phase.bucket(np.arange(len(phase.mix.cut) - 1)), phase.mix.cut[:-1], phase.mix.cut[1:]

    def positions(self, counter: Ints, row: Ints) -> Ints:
        """Where rows stand on the line of rows · UNIT positions.

        Parameters
        ----------
        counter : int64 [n]
            The step plus the steps skipped before it.
        row : int64 [n]
            Row of the global batch.

        Returns
        -------
        int64 [n]
            The positions.
        """
        return row * UNIT + (self._offset + _GOLDEN * (counter % UNIT)) % UNIT

    def windows(
        self, step: int, rows: ArrayLike | None = None, attempts: Mapping[tuple[int, int], int] | None = None
    ) -> PlannedWindows:
        """The windows of some rows of a step.

        Parameters
        ----------
        step : int
            The training step, from 0.
        rows : int [n], optional
            Rows of the global batch; None: all.
        attempts : mapping, optional
            (row, slot) -> least attempt that is acceptable, for windows that could not be read. Another window of the same task
            and bucket is drawn, within the same tokens (after 16 attempts, of any task of the bucket). Other windows stay as
            they are, except the prompt of a first window that changed. A window for which 64 attempts find nothing is left out.

        Returns
        -------
        PlannedWindows
            By row, in the order of `rows`, then by slot. Its `attempt` says which attempt gave each window.

        Raises
        ------
        ValueError
            If the step or a row is out of range.
        DataError
            If an event of the log does not fit the plan, or nothing is left to draw.
        """
        rows = np.arange(self.rows) if rows is None else np.asarray(rows, np.int64)
        return self.many([step], [rows], attempts)[0]

    def many(
        self,
        steps: Sequence[int],
        rows: Sequence[NDArray[np.int64]],
        attempts: Mapping[tuple[int, int], int] | None = None,
    ) -> list[PlannedWindows]:
        """The windows of several steps at once, which takes much less time than a call of `windows` for each.

        Parameters
        ----------
        steps : sequence of int
            Training steps.
        rows : sequence of int64 [n]
            The rows of each step.
        attempts : mapping, optional
            As in `windows`; it holds for all the steps.

        Returns
        -------
        list of PlannedWindows
            One for each step.

        Raises
        ------
        ValueError, DataError
            As `windows` does.
        """
        out: list[PlannedWindows] = []
        for number, group in itertools.groupby(range(len(steps)), lambda i: self._phase(steps[i])[0]):
            phase, chosen = self._ready(number), list(group)
            sizes = [len(rows[i]) for i in chosen]
            step = np.repeat(np.array([steps[i] for i in chosen], np.int64), sizes)
            row = np.concatenate([np.asarray(rows[i], np.int64) for i in chosen])
            if len(row) and not (row.min() >= 0 and row.max() < self.rows):
                raise ValueError(f"rows must be from 0 to {self.rows - 1}, not from {row.min()} to {row.max()}")
            position = self.positions(step + phase.skipped, row)
            at, planned = phase.planned(step, row, position, attempts or {})
            ends = np.searchsorted(at, np.cumsum(sizes))
            starts = [0, *ends[:-1]]
            out += [_part(planned, slice(a, b)) for a, b in zip(starts, ends)]
        return out

    # -- changes -----------------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Replays the log. Indexes of entries that did not change are kept."""
        self._applied = len(self.log)
        self._phases = self._history.phases(self.log.events)
        self._firsts = [p.first for p in self._phases]
        self._built: dict[int, PhaseDraws] = {}
        known = [(e.name, e.index.fingerprint) for e in self._phases[-1].entries]
        self._quarantine = Quarantine((e for e in self.log.events if e["kind"] == "quarantine"), known)
        self._check_left()

    def _check_left(self) -> None:
        """Raises DataError if quarantine leaves nothing of an entry with a weight above 0, before a step needs it."""
        for number, entry in enumerate(self._phases[-1].entries):
            gone = self._quarantine.episodes(number)
            if not len(gone) or self._phases[-1].weights[number] <= 0:
                continue
            counts = drawable_episodes(entry, self.validation, self.held_out, without=gone)
            if not counts.sum():
                raise DataError(
                    f"mixture: entry {entry.name!r} has no episode left: all its drawable episodes are quarantined as "
                    "unreadable; run `tiphys verify` on its dataset, or set its weight to 0"
                )

    def _phase(self, step: int) -> tuple[int, PhaseDraws]:
        if len(self.log) != self._applied:
            self._replay()
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        number = bisect_right(self._firsts, step) - 1
        return number, self._ready(number)

    def _ready(self, number: int) -> PhaseDraws:
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
            self._built[number] = PhaseDraws(index, mix, drawer, phase.skipped, self._quarantine)
        return self._built[number]

    def _epochs(self, number: int, index: PlanIndex, mix: Mix) -> EpochDrawer:
        """Streams continue where the previous phase ended, except those of entries whose episodes changed."""
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
        """What the plan delivers, on average, under the weights in force at a step.

        Parameters
        ----------
        step : int
            The training step.

        Returns
        -------
        dict
            JSON values: buckets, rows, budget, replacement, weight_unit, held_out, and what `plan.report.report` returns.
        """
        number, phase = self._phase(step)
        names = [e.name for e in self._phases[number].entries]
        kind = {"replacement": self.replacement, "weight_unit": self.weight_unit, "held_out": self.held_out}
        expected = report(phase.index, phase.mix, names, self.rows, self.budget)
        return {"buckets": self.buckets, "rows": self.rows, "budget": self.budget, **kind, **expected}

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that the draws depend on, except the log."""
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
        """What a checkpoint must hold to continue from `step`.

        Returns
        -------
        dict
            JSON values: `step`, the events of the log, and `version`, `buckets` and `fingerprint`, which a resume compares.
        """
        return {
            "step": self.step,
            "version": VERSION,
            "log": list(self.log.events),
            "buckets": self.buckets,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: take its step, and add those of its events that this plan's log lacks.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned.

        Raises
        ------
        DataError
            If the state belongs to another plan: version, number of buckets or fingerprint differ.
        """
        if state.get("version", 1) != VERSION:
            raise DataError(
                f"plan: the checkpoint was written by version {state.get('version', 1)} of the sampling plan; this Tiphys has "
                f"version {VERSION}, which would draw other windows for the same steps. Finish the run with the release of "
                "Tiphys that started it, or start a new run"
            )
        if state["buckets"] != self.buckets:
            raise DataError(
                f"plan: the checkpoint's plan has {state['buckets']} buckets, but this plan has {self.buckets}; set "
                f"data.buckets={state['buckets']}"
            )
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                "plan: the checkpoint belongs to another plan (data, objective, batch size, seed or weights differ); restore the "
                "recipe and the data of its run, or start a new run"
            )
        mine = list(self.log.events)
        for event in state["log"]:
            if event in mine:
                mine.remove(event)
            else:
                self.log.append(event)
        self.step = int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        """All but the sorted index, which the receiving process builds, or maps from `cache_dir`."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_indexes", "_built")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indexes = {}
        self._replay()
