"""Windows whose bytes are wrong or gone: they are read again without the cache; if that fails, others are drawn instead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, Window
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
    """Mends the windows that the assembler could not decode.

    correct  called with a unit and its bytes if the store has valid ones; then those of the cache are wrong
    """

    def __init__(
        self,
        plan: SamplingPlan,
        units: UnitMap,
        fetcher: Fetcher,
        assembler: Assembler,
        correct: Callable[[int, Any], None],
    ) -> None:
        self.plan, self.units, self.fetcher, self.assembler, self.correct = plan, units, fetcher, assembler, correct
        self._failures = 0  # windows of this step that could not be read
        self._last = ""  # the reason of the last one
        self._bad: set[tuple[str, int]] = set()  # (dataset, episode) that could not be read
        self._recent: deque[tuple[int, int]] = deque(maxlen=32)  # (windows, redrawn) of the last steps

    async def mend(
        self, step: int, planned: PlannedWindows, windows: list[Window | DataError]
    ) -> tuple[list[Window | None], list[dict[str, Any]]]:
        """The windows of a step without errors, and one event for each episode that was quarantined.

        None stands for a window that is dropped because nothing can be drawn instead of it. Raises DataError if too many windows
        of the last steps could not be read.
        """
        quarantined: list[dict[str, Any]] = []
        mended: list[Window | None] = list(windows)  # type: ignore[arg-type]
        wrong = np.array([isinstance(window, DataError) for window in windows], bool)
        for row in np.unique(planned.row[wrong]).tolist():
            mine = np.flatnonzero(planned.row == row)
            good = {int(planned.slot[i]): (_key(planned, i), windows[i]) for i in mine.tolist() if not wrong[i]}
            found, events = await self._mend_row(step, _only(planned, mine), good)  # type: ignore[arg-type]
            quarantined += events
            for i in mine.tolist():
                mended[i] = found.get(int(planned.slot[i]))
        self._judge(len(mended))
        return mended, quarantined

    async def _mend_row(
        self, step: int, planned: PlannedWindows, good: dict[int, tuple[_Key, Window]]
    ) -> tuple[dict[int, Window], list[dict[str, Any]]]:
        """Slot -> window of one row. A prompt is drawn for the window behind it: if that changes, the prompt may change too.

        good  slot -> what was drawn, and its window, for the slots that could be decoded
        """
        events: list[dict[str, Any]] = []
        attempts: dict[tuple[int, int], int] = {}
        row = int(planned.row[0])
        while True:
            if attempts:
                planned = self.plan.windows(step, np.array([row]), attempts=attempts)
            for i, slot in enumerate(planned.slot.tolist()):
                key = _key(planned, i)
                if slot in good and good[slot][0] == key:
                    continue
                window = await self._read(planned, i, events)
                if window is None:
                    self._failures += 1
                    attempts[row, slot] = int(planned.attempt[i]) + 1
                    break
                good[slot] = key, window
            else:
                return {slot: good[slot][1] for slot in planned.slot.tolist()}, events

    async def _read(self, planned: PlannedWindows, i: int, events: list[dict[str, Any]]) -> Window | None:
        """The i-th window, read again past the cache. If that fails, its episode is bad from now on, and the result is None."""
        one = _only(planned, np.array([i]))
        entry, episode = int(one.entry[0]), int(one.episode[0])
        index = self.plan.entries[entry].index
        if (index.fingerprint, episode) in self._bad:
            return None
        for _ in range(_READS):
            found, got = await self._read_alone(one)
            if isinstance(found, Window):
                for unit, data in got.items() if not events else ():  # other windows get the valid bytes too
                    self.correct(unit, data)
                return found
        await self.fetcher.check_unchanged(np.array(list(got), np.int64))
        self._bad.add((index.fingerprint, episode))
        self._last = str(found)
        events.append(
            {"kind": "quarantine", "entry": self.plan.entries[entry].name, "episode": episode,
             "id": index.id(episode), "reason": str(found)}
        )  # fmt: skip
        return None

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

    def _judge(self, windows: int) -> None:
        """A few episodes may be damaged. If many are, something else is wrong, and to go on would bias the training."""
        self._recent.append((windows, self._failures))
        self._failures = 0
        all_windows, bad = (sum(x) for x in zip(*self._recent, strict=True))
        if bad >= 10 and bad > _MOST_BAD * all_windows:
            raise DataError(
                f"{bad} of the last {all_windows} windows could not be read; run `tiphys verify`. The last error: {self._last}"
            )


_Key = tuple[int, int, int, int]


def _key(planned: PlannedWindows, i: int) -> _Key:
    """What was drawn: entry, episode, start, units."""
    return int(planned.entry[i]), int(planned.episode[i]), int(planned.start[i]), int(planned.units[i])


def _only(planned: PlannedWindows, some: np.ndarray) -> PlannedWindows:
    """Some of the windows."""
    arrays: Any = (a[some] for a in planned)
    return type(planned)(*arrays)
