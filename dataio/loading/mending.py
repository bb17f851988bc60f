"""Windows that cannot be used: their bytes are wrong or gone even when they are read again, or they have bad values. Others are
drawn instead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import BadValue, DataError, Window
from tiphys.dataio.loading.gather import copy_from

if TYPE_CHECKING:
    from tiphys.dataio.loading.assemble import Assembler
    from tiphys.dataio.loading.fetch import Fetcher
    from tiphys.dataio.loading.units import UnitMap
    from tiphys.dataio.sampling import PlannedWindows, SamplingPlan

_READS = 3  # of one window whose bytes are wrong, before another window is drawn
# Share of the windows of the last steps that may be redrawn. If it is larger, the cause is not a few damaged episodes.
_MOST_BAD = 0.1


class Mender:
    """Replaces the windows that could not be decoded, or that have a value that cannot be learned from (`BadValue`).

    Each row is mended by itself, from what the store holds and the plan says. So every process that makes a row mends it alike.

    correct  called with a unit and its bytes if the store has valid ones; then those of the cache are wrong
    test     called with a step, a row and a window; raises BadValue if the window cannot be learned from
    """

    def __init__(
        self,
        plan: SamplingPlan,
        units: UnitMap,
        fetcher: Fetcher,
        assembler: Assembler,
        correct: Callable[[int, Any], None],
        test: Callable[[int, int, Window], object],
    ) -> None:
        self.plan, self.units, self.fetcher, self.assembler = plan, units, fetcher, assembler
        self.correct, self.test = correct, test
        self._reported: dict[tuple[str, int], int] = {}  # (dataset, episode) -> the first step that reported it
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=32)  # (step, windows, failures) of the last steps

    async def mend(
        self, step: int, planned: PlannedWindows, windows: list[Window | DataError], *, test: bool = False
    ) -> tuple[list[Window | None], list[dict[str, Any]]]:
        """The windows of a step without errors, and one event for each episode that was quarantined.

        None stands for a window that is dropped because nothing can be drawn instead of it. With `test`, the values of all
        windows are tested; otherwise only those of rows in which a window could not be decoded. Raises DataError if too many
        windows of the last steps could not be used.
        """
        quarantined: list[dict[str, Any]] = []
        mended: list[Window | None] = list(windows)  # type: ignore[arg-type]
        if self._recent and self._recent[-1][0] == step:  # it is mended again, with tests
            self._recent.pop()
        self._recent.append((step, len(windows), 0))
        for row in np.unique(planned.row).tolist():
            mine = np.flatnonzero(planned.row == row)
            if not any(self._is_wrong(step, row, windows[i], test) for i in mine.tolist()):
                continue
            given = {(int(planned.slot[i]), _key(planned, i)): windows[i] for i in mine.tolist()}
            found, events = await self._mend_row(step, _only(planned, mine), given)
            quarantined += events
            for i in mine.tolist():
                mended[i] = found.get(int(planned.slot[i]))
        return mended, quarantined

    def _is_wrong(self, step: int, row: int, window: Window | DataError, test: bool) -> bool:
        if isinstance(window, DataError):
            return True
        return test and self._tested(step, row, window) is not window

    def _tested(self, step: int, row: int, window: Window) -> Window | BadValue:
        try:
            self.test(step, row, window)
        except BadValue as error:
            return error
        return window

    async def _mend_row(
        self, step: int, planned: PlannedWindows, given: dict[tuple[int, _Key], Window | DataError]
    ) -> tuple[dict[int, Window], list[dict[str, Any]]]:
        """Slot -> window of one row. A prompt is drawn for the window behind it: if that changes, the prompt may change too.

        given  (slot, what was drawn) -> the window as it was decoded before
        """
        events: list[dict[str, Any]] = []
        good: dict[int, tuple[_Key, Window]] = {}
        attempts: dict[tuple[int, int], int] = {}
        row = int(planned.row[0])
        while True:
            if attempts:
                planned = self.plan.windows(step, np.array([row]), attempts=attempts)
            for i, slot in enumerate(planned.slot.tolist()):
                key = _key(planned, i)
                if slot in good and good[slot][0] == key:
                    continue
                window = await self._usable(step, _only(planned, np.array([i])), given.get((slot, key)), events)
                if window is None:
                    attempts[row, slot] = int(planned.attempt[i]) + 1
                    break
                good[slot] = key, window
            else:
                return {slot: good[slot][1] for slot in planned.slot.tolist()}, events

    async def _usable(
        self, step: int, planned: PlannedWindows, given: Window | DataError | None, events: list[dict[str, Any]]
    ) -> Window | None:
        """The one planned window, read again past the cache if it was not decoded. If it cannot be used, the result is None, and
        an event says that its episode is bad."""
        window = given if isinstance(given, Window) else await self._read(planned)
        if isinstance(window, Window):
            window = self._tested(step, int(planned.row[0]), window)
        if isinstance(window, Window):
            return window
        entry, episode = int(planned.entry[0]), int(planned.episode[0])
        index = self.plan.entries[entry].index
        self._failed(str(window))
        # A step may be made again after a change of the plan; then it must report its episodes again.
        first = self._reported.get((index.fingerprint, episode), step)
        if step <= first and all(
            (e["entry"], e["episode"]) != (self.plan.entries[entry].name, episode) for e in events
        ):
            self._reported[index.fingerprint, episode] = step
            events.append(
                {"kind": "quarantine", "entry": self.plan.entries[entry].name, "episode": episode,
                 "id": index.id(episode), "reason": str(window)}
            )  # fmt: skip
        return None

    async def _read(self, planned: PlannedWindows) -> Window | DataError:
        """The one planned window, read again past the cache."""
        for _ in range(_READS):
            found, got = await self._read_alone(planned)
            if isinstance(found, Window):
                for unit, data in got.items():  # other windows get the valid bytes too
                    self.correct(unit, data)
                return found
        await self.fetcher.check_unchanged(np.array(list(got), np.int64))
        return found

    async def _read_alone(self, planned: PlannedWindows) -> tuple[Window | DataError, dict[int, Any]]:
        """One planned window, read from the store without the cache, and the bytes of its units."""
        spans = self.units.spans(planned)
        ranges = [self.units.ranges(s.units) for s in spans]
        got: dict[int, Any] = {}
        units = np.unique(np.concatenate([s.units for s in spans])) if spans else np.zeros(0, np.int64)
        failed = await self.fetcher.fetch(units, got.__setitem__, peers=False)
        for missing in failed.values():
            gone = f"{missing}: there is no such object" if isinstance(missing, FileNotFoundError) else str(missing)
            return DataError(gone), {}
        (window,) = self.assembler.windows(planned, spans, ranges, copy_from(lambda u: memoryview(got[u])))
        return window, got

    def _failed(self, reason: str) -> None:
        """Count a window of this step that could not be used.

        A few episodes may be damaged. If many are, something else is wrong, and to go on would bias the training.
        """
        step, windows, failures = self._recent[-1]
        self._recent[-1] = step, windows, failures + 1
        _, all_windows, bad = (sum(x) for x in zip(*self._recent, strict=True))
        if bad >= 10 and bad > _MOST_BAD * all_windows:
            raise DataError(
                f"{bad} of the last {all_windows} windows could not be read, or have values that cannot be learned from; run "
                f"`tiphys verify` and `tiphys inspect`. The last error: {reason}"
            )


_Key = tuple[int, int, int, int]


def _key(planned: PlannedWindows, i: int) -> _Key:
    """What was drawn: entry, episode, start, units."""
    return int(planned.entry[i]), int(planned.episode[i]), int(planned.start[i]), int(planned.units[i])


def _only(planned: PlannedWindows, some: np.ndarray) -> PlannedWindows:
    """Some of the windows."""
    arrays: Any = (a[some] for a in planned)
    return type(planned)(*arrays)
