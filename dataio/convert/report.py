"""What a conversion tells its user: how many episodes, which were left out and why, and values that look wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tiphys.dataio.convert.converter import BadEpisode
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.messages import counted, printable

REPORT = "conversion.json"
_MAX_REASONS = 20  # kinds of reasons that a printed report lists
_EXAMPLES = 2  # of each


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `str(report)` is for people; `conversion.json` in the dataset lists every malformed episode."""

    destination: str
    format: str
    tasks: tuple[str, ...]
    episodes: int
    steps: int
    bad: tuple[BadEpisode, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.destination}: {counted(self.episodes, 'episode')}, {counted(self.steps, 'step')} "
            f"from {self.format} ({', '.join(self.tasks)})"
        ]
        lines += [f"note: {note}" for note in self.notes]
        return printable("\n".join(lines + self._left_out()))

    def _left_out(self) -> list[str]:
        """The malformed episodes by reason, the most frequent first."""
        if not self.bad:
            return []
        kinds: dict[str, list[BadEpisode]] = {}
        for bad in self.bad:
            kinds.setdefault(_kind(bad), []).append(bad)
        lines = [
            f"{counted(len(self.bad), 'malformed episode was', 'malformed episodes were')} left out; "
            f"{self.destination}/{REPORT} lists all:"
        ]
        most = sorted(kinds.items(), key=lambda item: -len(item[1]))
        for kind, found in most[:_MAX_REASONS]:
            if len(found) == 1:
                lines.append(f"  1 × {found[0]}")
                continue
            lines.append(f"  {len(found):,} × {kind}")
            lines += [f"    such as {bad}" for bad in found[:_EXAMPLES]]
        if len(kinds) > _MAX_REASONS:
            lines.append(f"  … and {len(kinds) - _MAX_REASONS:,} other reasons")
        return lines


def _kind(bad: BadEpisode) -> str:
    """The reason without what differs from episode to episode: folders and names of files, and numbers."""
    text = bad.reason.removeprefix(bad.where).lstrip(": ")
    text = re.sub(r"\S*[/\\][^\s/\\]*?(\.\w+)?(?=[:,;]?(?:\s|$))", r"*\1", text)
    return re.sub(r"(?<![A-Za-z*.])(?<![A-Za-z]\d)-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "N", text)


def outside(episode: Episode, task: TaskSpec) -> dict[str, tuple[int, int]]:
    """Field -> (elements outside its bounds, elements in total), for the fields with bounds."""
    out = {}
    for spec in task.fields:
        value = episode.fields.get(spec.name)
        if isinstance(value, np.ndarray) and spec.dtype != "str" and not (spec.low is None and spec.high is None):
            out[spec.name] = (spec.outside(value), int(value.size))
    return out


def outside_notes(counts: Mapping[tuple[str, str], Sequence[int]], tasks: Sequence[TaskSpec]) -> list[str]:
    """A note for each field of which values lie outside its bounds. counts: (task, field) -> (outside, in total)."""
    notes = []
    for task in tasks:
        for spec in task.fields:
            beyond, count = counts.get((task.name, spec.name), (0, 0))
            if beyond:
                notes.append(
                    f"{task.name}, {spec.name}: {beyond:,} of {count:,} values ({beyond / count:.2%}) lie outside its bounds "
                    f"{_bounds(spec)}; they are stored as they are, and clamped where training uses the bounds"
                )
    return notes


def _bounds(spec: FieldSpec) -> str:
    low, high = (
        "–" if b is None else " ".join(f"{v:g}" for v in b[:4]) + " …" * (len(b) > 4) for b in (spec.low, spec.high)
    )
    return f"low {low}, high {high}"


def check_ranges(tasks: Sequence[TaskSpec]) -> list[str]:
    """Notes on images of 16 bits whose range is not declared. Raises DataError for images whose range is not known at all."""
    notes, unknown = [], []
    for task in tasks:
        for spec in task.fields:
            if spec.modality != "image" or spec.dtype == "str":
                continue
            if spec.image_range is None:
                unknown.append(f"{spec.name} ({spec.dtype}, task {task.name})")
            elif spec.dtype == "uint16" and spec.low is None:
                notes.append(
                    f"{task.name}, {spec.name}: images of 16 bits without bounds; training takes 0 for black and 65535 for "
                    "white. If the values have a smaller range, give `low` and `high` in a mapping file"
                )
    if unknown:
        raise DataError(
            f"the values of black and white are not known for the images {', '.join(unknown)}; give `low` and `high` of the "
            "field in a mapping file (such as {low: 0, high: 10} for depths up to 10 m), or drop it there"
        )
    return notes
