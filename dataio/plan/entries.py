"""What a plan is made of, and what it says: lines of a mixture, and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EntryLengths:
    """What an objective says of one line of the mixture; E episodes, and an element a task of its index.

    units         int64 [E]: sampling units of each episode: steps (control), 1 (caption), tokens (text); 0: never drawn
    window        int32 [tasks]: most units of a window
    per_unit      int32 [tasks]: tokens a unit
    fixed         int32 [E]: tokens of a window beside its units (its instruction)
    prompt        share of rows whose first window is of this entry that begin with a prompt
    prompt_units  int32 [tasks]: most units of a prompt; a prompt costs per_unit each
    """

    units: NDArray[np.int64]
    window: NDArray[np.int32]
    per_unit: NDArray[np.int32]
    fixed: NDArray[np.int32]
    prompt: float
    prompt_units: NDArray[np.int32]


@dataclass(frozen=True)
class PlanEntry:
    """One line of the mixture.

    weight    relative share, in the plan's `weight_unit`
    tasks     numbers of the tasks of the index that take part
    priority  float32 [E]: how many times as often as with 1 each of the episode's windows is drawn; 0: never; None: all 1
    """

    index: EpisodeIndex
    lengths: EntryLengths
    weight: float
    name: str
    tasks: Sequence[int]
    priority: NDArray[np.float32] | None = None


class PlannedWindows(NamedTuple):
    """Windows of some rows of one step, an element each, sorted by (row, slot); all int64 but `prompt` (bool).

    task is the number in its entry's index; tokens is what the plan set aside: fixed + units · per_unit, for prompts
    without fixed.
    """

    row: Ints
    slot: Ints
    entry: Ints
    task: Ints
    episode: Ints
    start: Ints
    units: Ints
    tokens: Ints
    prompt: NDArray[np.bool_]
    attempt: Ints
