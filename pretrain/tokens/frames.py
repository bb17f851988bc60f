"""Frames of actions: an action counted from the state of the observed step, and chunks of the actions that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec

if TYPE_CHECKING:
    from tiphys.recipes.sections.objective import Relative

ABSOLUTE = -1


@dataclass(frozen=True)
class Frame:
    """What an action is counted from.

    Parameters
    ----------
    to : str
        The field of the state.
    columns : tuple of int
        For each entry of the action, the entry of the state that is subtracted; ABSOLUTE: none.
    """

    to: str
    columns: tuple[int, ...]

    def origin(self, states: Any) -> np.ndarray:
        """What is subtracted from an action: states [N, *shape] -> float64 [N, entries of the action]; 0 if absolute."""
        flat = np.asarray(states, np.float64)
        flat = flat.reshape(len(flat), -1)
        columns = np.asarray(self.columns)
        return np.where(columns == ABSOLUTE, 0.0, flat[:, np.maximum(columns, 0)])


def frame_of(task: TaskSpec, field: FieldSpec, relative: Relative) -> Frame | None:
    """The frame that a recipe gives an action field; None if it stays absolute. Raises DataError if it cannot be computed."""
    where = f"task {task.name!r}, field {field.name!r}, relative"
    if not relative.to:
        if relative.columns:
            raise DataError(
                f"{where}: it has `columns` but no `to`; name the field of the state that they are columns of"
            )
        return None
    known = {f.name: f for f in task.fields}
    state = known.get(relative.to)
    if state is None:
        raise DataError(f"{where}: the task has no field {relative.to!r}; it has {', '.join(known)}")
    if field.role != "action" or field.modality != "continuous":
        raise DataError(f"{where}: only a continuous action can be relative, not a {field.modality} {field.role}")
    if state.role != "observation" or state.modality not in ("continuous", "discrete") or state.per != "step":
        raise DataError(
            f"{where}: {relative.to!r} is a field of role {state.role!r} and modality {state.modality!r}; an action can only be "
            "relative to numbers that are observed at each step"
        )
    entries, numbers = (int(np.prod(f.shape, dtype=np.int64)) for f in (field, state))
    if len(relative.columns) != entries:
        raise DataError(
            f"{where}: `columns` has {len(relative.columns)} entries, but the action has {entries}; give each entry its column "
            f"of {relative.to!r}, or null if it stays absolute"
        )
    columns = []
    for i, column in enumerate(relative.columns):
        whole = isinstance(column, int) and not isinstance(column, bool)
        if column is not None and not (whole and 0 <= column < numbers):
            raise DataError(
                f"{where}: columns[{i}] is {column!r}, but {relative.to!r} has the columns 0 to {numbers - 1}"
            )
        columns.append(ABSOLUTE if column is None else column)
    return Frame(relative.to, tuple(columns))


def chunks(rows: np.ndarray, valid: np.ndarray, first: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The actions from some rows of an episode on.

    Parameters
    ----------
    rows : ndarray [R, *shape]
        The actions of consecutive steps.
    valid : ndarray, bool [R]
        The rows that have an action.
    first : ndarray, int [n]
        The first row of each chunk.
    steps : int
        Actions of a chunk.

    Returns
    -------
    ndarray, float64 [n, steps, entries]
        The actions; 0 from the first missing one on.
    ndarray, int32 [n]
        How many of them are there.
    """
    flat = np.asarray(rows, np.float64).reshape(len(rows), -1)
    at = first[:, None] + np.arange(steps)
    there = (at < len(flat)) & valid[np.minimum(at, len(flat) - 1)]
    there = np.logical_and.accumulate(there, axis=1)
    values = np.where(there[..., None], flat[np.minimum(at, len(flat) - 1)], 0.0)
    return values, there.sum(axis=1).astype(np.int32)


def range_of(found: Any, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) [entries] that become −1 and 1, from the statistics of the values.

    `quantile`: the quantiles .01 and .99; for an entry where they are less than 1 % of its range apart (a gripper that is nearly
    always closed), its extremes. `bounds`: the extremes. `standard`: one standard deviation below and above the mean.
    """
    least, most = (np.asarray(x, np.float64).reshape(-1) for x in (found.min, found.max))
    if kind == "bounds":
        return least, most
    if kind == "standard":
        mean, std = (np.asarray(x, np.float64).reshape(-1) for x in (found.mean, found.std))
        std = np.where(std > 1e-6 * (1 + np.abs(mean)), std, np.maximum(1.0, np.abs(mean)))  # of a constant: its size
        return mean - std, mean + std
    low, high = (np.broadcast_to(q, least.shape) for q in found.at((0.01, 0.99)))
    narrow = high - low < 0.01 * (most - least)
    return np.where(narrow, least, low), np.where(narrow, most, high)


def flat_entries(shape: Sequence[int]) -> int:
    """Number of entries of an array of this shape."""
    return int(np.prod(shape, dtype=np.int64))
