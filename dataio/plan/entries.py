"""What a plan is made of, and what it gives: mixture entries, and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.cost import StepCost

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EntryLengths:
    """What an objective says of one mixture entry, which has E episodes. Arrays of [tasks] count the tasks of its index.

    Attributes
    ----------
    units : int64 [E]
        What a window counts: steps of control data, 1 for an image with its caption, tokens of a text. 0: never drawn.
    window : int32 [tasks]
        Most units of a window.
    context : int32 [tasks]
        Most tokens of a window. An episode's longest window is min(window, what fits context − fixed), at least 1.
    costs : one StepCost a task
        Tokens of a window's units.
    fixed : int32 [E]
        Tokens of a window beside its units (its instruction).
    prompt : float32 [tasks]
        Share of the rows whose first window is of this task that begin with a prompt.
    prompt_units : int32 [tasks]
        Most units of a prompt. A prompt has no fixed tokens.
    """

    units: NDArray[np.int64]
    window: NDArray[np.int32]
    context: NDArray[np.int32]
    costs: Sequence[StepCost]
    fixed: NDArray[np.int32]
    prompt: NDArray[np.float32]
    prompt_units: NDArray[np.int32]

    @classmethod
    def plain(
        cls,
        units: NDArray,
        window: int | Sequence[int],
        tokens: int | Sequence[int] | NDArray = 1,
        *,
        tasks: int = 1,
        fixed: NDArray | None = None,
        context: int | Sequence[int] = 1 << 30,
        prompt: float | Sequence[float] = 0.0,
        prompt_units: int | Sequence[int] = 1,
    ) -> EntryLengths:
        """Lengths of an entry whose units all cost the same; a number stands for all tasks."""
        each = np.broadcast_to(np.asarray(tokens, np.int64), tasks)
        return cls(
            units=np.asarray(units, np.int64),
            window=np.broadcast_to(np.asarray(window, np.int32), tasks),
            context=np.broadcast_to(np.asarray(context, np.int32), tasks),
            costs=tuple(StepCost.plain(int(t)) for t in each),
            fixed=np.zeros(len(units), np.int32) if fixed is None else np.asarray(fixed, np.int32),
            prompt=np.broadcast_to(np.asarray(prompt, np.float32), tasks),
            prompt_units=np.broadcast_to(np.asarray(prompt_units, np.int32), tasks),
        )


@dataclass(frozen=True)
class PlanEntry:
    """One mixture entry.

    Attributes
    ----------
    weight : float
        Relative share, in the plan's `weight_unit`.
    tasks : sequence of int
        Numbers of the tasks of the index that take part.
    priority : float32 [E] or None
        Relative sampling weight of the episode's steps (1 = default, 0 = never). None: all 1.
    """

    index: EpisodeIndex
    lengths: EntryLengths
    weight: float
    name: str
    tasks: Sequence[int]
    priority: NDArray[np.float32] | None = None


class PlannedWindows(NamedTuple):
    """Windows of some rows of one step, an element each, sorted by (row, slot); all int64 but `prompt` (bool).

    `task` is the number in the index of the entry. `tokens` is what the window takes: its fixed tokens and those of its units;
    a prompt has no fixed tokens. Slot 0 is a prompt. The slots of windows ascend from 1; some numbers may be missing.
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
