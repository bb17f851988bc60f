"""Clips: windows of other episodes as episodes of their own, which are learned as the windows that they were.

A clip's steps keep the numbers that they had, its rewards later than its end still count in the value of its steps, and it ends
an episode only where that episode ended. One field of the dataset tells what a clip was cut from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec, Window
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.timestep import CLIP, TimestepLayout

SPEC = FieldSpec(CLIP, "info", "continuous", "float64", (4,), per="episode")
_RULE = "discounted:"


class Clip(NamedTuple):
    """What a clip was cut from.

    first     number of the clip's first step in the whole episode
    steps     steps of the whole episode
    after     discounted sum of the rewards after the clip's last step
    discount  its discount
    """

    first: float
    steps: float
    after: float
    discount: float


AFTER = (CLIP, Clip._fields.index("after"))  # where a clip holds the discounted sum of the rewards after it


def without_clip(task: TaskSpec) -> TaskSpec:
    """The task without the field that only datasets of clips have."""
    return replace(task, fields=tuple(f for f in task.fields if f.name != CLIP))


def are_clips(task: TaskSpec) -> bool:
    """Whether the episodes of a task are clips."""
    return any(f.name == CLIP for f in task.fields)


def as_clips(layout: TimestepLayout, task: TaskSpec) -> TimestepLayout:
    """The layout for the episodes of a task, which may be clips.

    Raises
    ------
    DataError
        If they are clips, and the layout shows something that only the whole episode tells.
    """
    for element in layout.elements if are_clips(task) else ():
        if element.rule and not element.rule.startswith(_RULE):
            raise DataError(
                f"task {task.name!r}: its episodes are clips, which know no return but a discounted one, and this objective "
                f"shows {element.rule!r}; learn them with the objective that they were drawn by"
            )
    return replace(layout, clipped=are_clips(task))


def unclipped(layout: TimestepLayout, window: Window) -> Window:
    """A window of a clip as that window of the whole episode."""
    clip = Clip(*np.asarray(window.fields[CLIP], np.float64).tolist())
    steps = int(np.asarray(window.valid[: window.steps], bool).sum())
    given = {e.rule: _value(e.rule, clip, window, steps) for e in layout.elements if e.rule}
    return replace(
        window,
        start=window.start + int(clip.first),
        step=window.step + int(clip.first),
        episode_steps=int(clip.steps),
        given={**window.given, **given},
    )


def _value(rule: str, clip: Clip, window: Window, steps: int) -> np.ndarray:
    """float32 [steps]: the discounted sum of the rewards after each step, in the clip and after it."""
    discount = float(rule.removeprefix(_RULE))
    if discount != clip.discount:
        raise DataError(
            f"episode {window.episode!r} is a clip whose later rewards are discounted by {clip.discount:g}, but this objective "
            f"discounts by {discount:g}; draw the clips by a policy of this objective"
        )
    left = window.episode_steps - 1 - (window.start + np.arange(steps))
    return (derived(window, steps, rule, {}) + clip.after * discount**left).astype(np.float32)
