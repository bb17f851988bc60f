"""Windows of the steps of one phase: which are drawn, and which take the place of those that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.draws import Columns, Drawer, Ints, Quarantine
from tiphys.dataio.plan.entries import OWN, PlannedWindows
from tiphys.dataio.plan.index import PlanIndex
from tiphys.dataio.plan.mixture import Mix


@dataclass(frozen=True)
class PhaseDraws:
    """Draws the windows of the steps of one phase, with others in place of those that cannot be read."""

    index: PlanIndex
    mix: Mix
    drawer: Drawer
    skipped: int
    quarantine: Quarantine

    def segment(self, position: Ints) -> Ints:
        return np.searchsorted(self.mix.cut, position, side="right") - 1

    def bucket(self, segment: Ints) -> Ints:
        return segment // (len(self.mix.cut) // self.index.buckets)

    def planned(
        self, step: Ints, row: Ints, position: Ints, attempts: Mapping[tuple[int, int], int]
    ) -> tuple[Ints, PlannedWindows]:
        """The windows of n rows.

        Parameters
        ----------
        step, row : int64 [n]
            Steps of the phase, and rows of their global batches.
        position : int64 [n]
            Where the rows stand on the line.
        attempts : mapping
            As in `SamplingPlan.windows`.

        Returns
        -------
        int64 [windows]
            Which of the rows each window belongs to, ascending.
        PlannedWindows
            The windows.
        """
        # Draw the rows of a bucket together, whatever their step: each search then stays in a small part of the index.
        order = np.argsort(row, kind="stable")
        step, row, position = step[order], row[order], position[order]
        counter = step + self.skipped
        segment = self.segment(position)
        windows, prompts = self.drawer.rows(counter, row, segment)
        if self.index.strata.every.any():
            own = self.drawer.own_prompts(windows, counter, row)
            prompts = {k: np.concatenate([prompts[k], own[k]]) for k in prompts}
        windows["attempt"] = np.zeros(len(windows["at"]), np.int64)
        prompts["attempt"] = np.zeros(len(prompts["at"]), np.int64)
        if attempts or len(self.quarantine):
            windows, prompts = self._readable(windows, prompts, step, row, segment, attempts)
        columns = {k: np.concatenate([prompts[k], windows[k]]) for k in windows}
        at = order[columns["at"]]
        slot = columns["slot"]
        arranged = np.argsort(at << 17 | slot % OWN << 1 | (slot < OWN))  # a window's own prompt stands before it
        columns = {k: v[arranged] for k, v in columns.items()}
        stratum, place = columns["cell"] % len(self.index.strata), columns["place"]
        return at[arranged], PlannedWindows(
            row=row[columns["at"]],
            slot=columns["slot"],
            entry=self.index.strata.entry[stratum],
            task=self.index.strata.task[stratum],
            episode=self.index.episode[place].astype(np.int64),
            start=columns["start"],
            units=columns["units"],
            tokens=columns["tokens"],
            prompt=(columns["slot"] == 0) | (columns["slot"] >= OWN),
            attempt=columns["attempt"],
        )

    def _readable(
        self,
        windows: Columns,
        prompts: Columns,
        step: Ints,
        row: Ints,
        segment: Ints,
        attempts: Mapping[tuple[int, int], int],
    ) -> tuple[Columns, Columns]:
        """Replaces the windows and prompts that are quarantined or were reported as unreadable.

        A prompt belongs to a window, that of a row to its first: if that window is drawn again, the prompt is too. Windows and
        prompts for which no substitute is found are left out.
        """
        needed = self._needed(windows, step, row, attempts)
        changed = np.flatnonzero(needed)
        windows = self._redrawn(windows, None, changed, needed, step, row, segment)
        rows, first = np.unique(windows["at"], return_index=True)
        key = windows["at"] << 16 | windows["slot"]
        row_first = first[np.minimum(np.searchsorted(rows, prompts["at"]), len(first) - 1)] if len(first) else first
        wanted = np.where(prompts["slot"] == 0, key[row_first], prompts["at"] << 16 | prompts["slot"] % OWN)
        place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)  # the window that each prompt belongs to
        alive = (key[place] == wanted) & (windows["at"][place] == prompts["at"]) & (windows["units"][place] > 0)
        prompts, place = {k: v[alive] for k, v in prompts.items()}, place[alive]
        heads = {k: v[place] for k, v in windows.items()}
        needed = self._needed(prompts, step, row, attempts)
        needed = np.where(np.isin(place, changed), np.maximum(needed, 1), needed)
        prompts = self._redrawn(prompts, heads, np.flatnonzero(needed), needed, step, row, segment)
        some, kept = windows["units"] > 0, prompts["units"] > 0
        return {k: v[some] for k, v in windows.items()}, {k: v[kept] for k, v in prompts.items()}

    def _refused(self, cell: Ints, place: Ints, step: Ints) -> NDArray[np.bool_]:
        entry = self.index.strata.entry[cell % len(self.index.strata)]
        return self.quarantine.holds(entry, self.index.episode[place].astype(np.int64), step)

    def _needed(self, columns: Columns, step: Ints, row: Ints, attempts: Mapping[tuple[int, int], int]) -> Ints:
        """The least attempt that is acceptable for each window; 0: the window stays."""
        at = columns["at"]
        needed = self._refused(columns["cell"], columns["place"], step[at]).astype(np.int64)
        if attempts:
            asked = [attempts.get(key, 0) for key in zip(row[at].tolist(), columns["slot"].tolist())]
            needed = np.maximum(needed, asked)
        return needed

    def _redrawn(
        self,
        columns: Columns,
        heads: Columns | None,
        again: Ints,
        needed: Ints,
        step: Ints,
        row: Ints,
        segment: Ints,
    ) -> Columns:
        """The columns, with the elements `again` drawn anew. If `heads` is given, they are the prompts of these windows."""
        if not len(again):
            return columns
        part = {k: v[again] for k, v in columns.items()}
        first = None if heads is None else {k: v[again] for k, v in heads.items()}
        when, where = step[part["at"]], part["at"]
        new = self.drawer.redraw(
            part,
            self.skipped + when,
            row[where],
            self.bucket(segment[where]),
            needed[again],
            lambda cell, place, of: self._refused(cell, place, when[of]),
            first,
        )
        columns = {k: v.copy() for k, v in columns.items()}
        for k in ("cell", "place", "start", "units", "tokens", "attempt"):
            columns[k][again] = new[k]
        return columns
