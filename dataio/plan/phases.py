"""PlanHistory: how a plan's log changes its mixture, as spans of steps without a change."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.log import Event
from tiphys.dataio.plan.preferences import priority_of

if TYPE_CHECKING:
    from tiphys.dataio.plan.entries import PlanEntry


@dataclass(frozen=True)
class Phase:
    """A span of steps without a change of weights, priorities, entries or skipped steps. Quarantine starts no new phase.

    Attributes
    ----------
    first : int
        Its first step.
    skipped : int
        Steps that were skipped before it. Draws count steps as step + skipped.
    entries : tuple of PlanEntry
        The entries.
    weights : float64 [entries]
        Their weights.
    """

    first: int
    skipped: int
    entries: tuple[PlanEntry, ...]
    weights: NDArray[np.float64]


class PlanHistory:
    """Applies events to a mixture. `open_entry` opens the dataset of a `dataset` event."""

    def __init__(self, entries: tuple[PlanEntry, ...], open_entry: Callable[[Event], PlanEntry] | None) -> None:
        self.entries, self.open_entry = entries, open_entry
        self._made: dict[tuple[str, int], PlanEntry] = {}
        self._joined: dict[str, PlanEntry] = {}  # key: the event as JSON

    def phases(self, events: Sequence[Event]) -> list[Phase]:
        """The phases, ascending; the first begins at step 0. Raises DataError if an event does not fit the mixture."""
        out = [Phase(0, 0, self.entries, np.array([e.weight for e in self.entries], np.float64))]
        changes = [e for e in events if e["kind"] not in ("quarantine", "data")]
        for event in sorted(
            changes, key=lambda e: e["step"]
        ):  # stable: events of one step stay in the order of the log
            last = out[-1]
            if last.first == event["step"]:
                out.pop()
            out.append(self._changed(event, last))
        return out

    def _changed(self, event: Event, last: Phase) -> Phase:
        kind, step = event["kind"], event["step"]
        if kind == "skip":
            return replace(last, first=step, skipped=last.skipped + event["steps"])
        entries, weights = list(last.entries), last.weights.copy()
        if kind == "dataset":
            entries.append(self._join(event, [e.name for e in entries]))
            weights = np.append(weights, np.float64(event["weight"]))
            return replace(last, first=step, entries=tuple(entries), weights=weights)
        names = [e.name for e in entries]
        for name in event["weights"] if kind == "weights" else [event["entry"]]:
            if name not in names:
                raise DataError(
                    f"plan log: the event of step {step} names entry {name!r}; the mixture has {', '.join(names)}"
                )
            i = names.index(name)
            if kind == "weights":
                weights[i] = event["weights"][name]
            else:
                entries[i] = self._preferred(event, entries[i])
        return replace(last, first=step, entries=tuple(entries), weights=weights)

    def _preferred(self, event: Event, base: PlanEntry) -> PlanEntry:
        """The entry with an event's priorities. Every replay gives the same object, so that no index is built again."""
        key = (json.dumps(event, sort_keys=True), id(base))
        if key not in self._made:
            self._made[key] = replace(base, priority=priority_of(event, base.index))
        return self._made[key]

    def _join(self, event: Event, names: list[str]) -> PlanEntry:
        """The entry that a `dataset` event adds, opened once."""
        where = f"plan log: the event of step {event['step']} adds dataset {event['dataset']!r}"
        key = json.dumps(event, sort_keys=True)
        if event["entry"] in names:
            raise DataError(
                f"{where} as entry {event['entry']!r}, but the mixture has this entry already; give it another name"
            )
        if event["like"] not in names:
            raise DataError(f"{where} like entry {event['like']!r}; the mixture has {', '.join(names)}")
        if key not in self._joined:
            if self.open_entry is None:
                raise DataError(f"{where}, but this plan cannot open datasets; make it with `open_entry`")
            entry = self.open_entry(event)
            if entry.index.fingerprint != event["digest"]:
                raise DataError(
                    f"{where} with the fingerprint {event['digest']}, but it has {entry.index.fingerprint} now: it was changed "
                    "since; restore the dataset, or add it again as another entry"
                )
            self._joined[key] = entry
        return self._joined[key]

    def __getstate__(self) -> dict[str, Any]:
        """Joined entries are sent with the plan, so that the receiving process opens no datasets."""
        return {"entries": self.entries, "open_entry": None, "_made": {}, "_joined": self._joined}
