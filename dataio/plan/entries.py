"""What a sampling plan takes and returns: mixture entries, and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.cost import Savings, StepCost

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

Ints = NDArray[np.int64]
OWN = 1 << 15  # added to the slot of a window: the slot of its own prompt


@dataclass(frozen=True)
class EntryLengths:
    """How long the episodes of one mixture entry are, and what windows of them take, as its objective says.

    The entry has E episodes. Arrays of [tasks] have one element for each task of its index.

    Attributes
    ----------
    units : int64 [E]
        Length of each episode in the units that windows count: steps of control data, 1 for an image with its caption, tokens of
        a text. 0: never drawn.
    window : int32 [tasks]
        Most units of a window.
    context : int32 [tasks]
        Most tokens of a window. An episode's longest window has min(window, the units that fit into context − fixed) units, but
        at least 1.
    costs : sequence of StepCost [tasks]
        Tokens of a window's units.
    fixed : int32 [E]
        Tokens of a window in addition to those of its units (its instruction).
    prompt : float32 [tasks]
        Chance that a row whose first window is of this task begins with a prompt.
    prompt_units : int32 [tasks]
        Most units of a prompt. A prompt has no fixed tokens.
    savings : Savings or None
        What steps take less than `costs` says. None: nothing.
    every : float32 [tasks] or None
        Chance that a window has a prompt of its own, for which `fixed` has room. None: 0. A task with such prompts has none for
        whole rows.
    ends : float32 [tasks] or None
        Share of the prompts that are the end of their episode. None: one half.
    """

    units: NDArray[np.int64]
    window: NDArray[np.int32]
    context: NDArray[np.int32]
    costs: Sequence[StepCost]
    fixed: NDArray[np.int32]
    prompt: NDArray[np.float32]
    prompt_units: NDArray[np.int32]
    savings: Savings | None = None
    every: NDArray[np.float32] | None = None
    ends: NDArray[np.float32] | None = None

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
        """Lengths of an entry in which all units of a task take the same number of tokens.

        Parameters
        ----------
        units : int [E]
            Units of each episode.
        window : int or sequence of int
            Most units of a window. Here and below, one number holds for all tasks, and a sequence has one for each task.
        tokens : int or sequence of int
            Tokens of a unit.
        tasks : int
            Number of tasks.
        fixed : int [E], optional
            Tokens of a window in addition to those of its units; None: 0.
        context : int or sequence of int
            Most tokens of a window.
        prompt : float or sequence of float
            Chance of a prompt.
        prompt_units : int or sequence of int
            Most units of a prompt.

        Returns
        -------
        EntryLengths
            The lengths.
        """
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
    index : EpisodeIndex
        The dataset's index.
    lengths : EntryLengths
        Lengths of its episodes.
    weight : float
        Relative share of what is delivered, in the plan's `weight_unit`.
    name : str
        Name of the entry, by which events of the log refer to it.
    tasks : sequence of int
        Numbers of those tasks of the index that are drawn from.
    priority : float32 [E] or None
        Relative sampling weight of the episode's steps (1 = default, 0 = never). None: all 1.
    known_as : str
        Stands for the index's fingerprint in the plan's, if values of the dataset were corrected since the run began. Empty: it
        is the index's own.
    """

    index: EpisodeIndex
    lengths: EntryLengths
    weight: float
    name: str
    tasks: Sequence[int]
    priority: NDArray[np.float32] | None = None
    known_as: str = ""


class PlannedWindows(NamedTuple):
    """Windows of some rows of one step: one element a window, row by row in the order asked for, then by slot.

    Attributes
    ----------
    row : int64 [n]
        Row of the global batch.
    slot : int64 [n]
        Number of the window in its row. Slot 0 is the row's prompt. Others count from 1; numbers may be missing. The prompt of a
        window alone has the window's number plus OWN.
    entry : int64 [n]
        Position in `SamplingPlan.entries`.
    task : int64 [n]
        Task, as a number in the entry's index.
    episode : int64 [n]
        Episode, as a number in the entry's index.
    start, units : int64 [n]
        The window shows the units [start, start + units) of its episode.
    tokens : int64 [n]
        Tokens of the window: its fixed tokens and those of its units. A prompt has no fixed tokens.
    prompt : bool [n]
        Whether this is a prompt.
    attempt : int64 [n]
        0, or the attempt that gave this window in place of one that could not be read.
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
