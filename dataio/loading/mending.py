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
_ATTEMPTS = 8  # most draws for one window
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
        self._recent: deque[tuple[int, int]] = deque(maxlen=32)  # (windows, redrawn) of the last steps

    async def mend(
        self, step: int, planned: PlannedWindows, windows: list[Window | DataError]
    ) -> tuple[list[Window], list[dict[str, Any]]]:
        """The windows of a step without errors, and one event for each episode that was quarantined.

        Raises DataError if a window cannot be replaced, or if too many windows of the last steps could not be read.
        """
        quarantined: list[dict[str, Any]] = []
        mended: list[Window] = []
        for i, window in enumerate(windows):
            if isinstance(window, DataError):
                window, events = await self._mend(step, planned, i, window)
                quarantined += events
            mended.append(window)
        self._judge(len(mended), quarantined)
        return mended, quarantined

    async def _mend(
        self, step: int, planned: PlannedWindows, i: int, error: DataError
    ) -> tuple[Window, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        for attempt in range(int(planned.attempt[i]), int(planned.attempt[i]) + _ATTEMPTS):
            one = self._draw(step, planned, i, attempt)
            for _ in range(_READS):
                found, got = await self._read_alone(one)
                if isinstance(found, Window):
                    break
            if isinstance(found, Window):
                if not events:  # the block's other windows, and later ones, get the valid bytes too
                    for unit, data in got.items():
                        self.correct(unit, data)
                return found, events
            await self.fetcher.check_unchanged(np.array(list(got), np.int64))
            entry, episode = int(one.entry[0]), int(one.episode[0])
            index = self.plan.entries[entry].index
            events.append(
                {"kind": "quarantine", "entry": self.plan.entries[entry].name, "episode": episode,
                 "id": index.id(episode), "reason": str(found)}
            )  # fmt: skip
            error = found
        raise DataError(
            f"step {step}: {_ATTEMPTS} windows in a row could not be read; run `tiphys verify`. The last error: {error}"
        )

    def _draw(self, step: int, planned: PlannedWindows, i: int, attempt: int) -> PlannedWindows:
        """The i-th window alone, or the window that a later attempt draws instead."""
        if attempt == int(planned.attempt[i]):
            return _only(planned, i)
        row, slot = int(planned.row[i]), int(planned.slot[i])
        again = self.plan.windows(step, np.array([row]), attempts={(row, slot): attempt})
        return _only(again, int(np.flatnonzero(again.slot == slot)[0]))

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

    def _judge(self, windows: int, events: list[dict[str, Any]]) -> None:
        """A few episodes may be damaged. If many are, something else is wrong, and to go on would bias the training."""
        self._recent.append((windows, len(events)))
        all_windows, bad = (sum(x) for x in zip(*self._recent, strict=True))
        if bad >= 10 and bad > _MOST_BAD * all_windows:
            raise DataError(
                f"{bad} of the last {all_windows} windows could not be read; run `tiphys verify`. "
                f"The last error: {events[-1]['reason'] if events else ''}"
            )


def _only(planned: PlannedWindows, i: int) -> PlannedWindows:
    arrays: Any = (a[i : i + 1] for a in planned)
    return type(planned)(*arrays)
