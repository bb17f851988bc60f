"""VIEWS: how a window of an episode becomes sequences. Each is a segment of its own, so no position of one sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.episode import Window

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.timestep import TimestepLayout

ONE, WINDOW_TEXT, AGENTS, FUTURE = "one", "window+text", "agents", "future"


@dataclass(frozen=True)
class View:
    """One way in which a window becomes sequences, which follow each other in its row.

    about    what it does, for people
    layouts  layout -> the layout of each sequence; their view is `one`
    split    (layout, window) -> what each sequence shows
    copies   layout -> how many of the sequences have whole timesteps; those have the same size
    again    the kinds of parts that one more sequence shows
    """

    about: str
    layouts: Callable[[TimestepLayout], tuple[TimestepLayout, ...]]
    split: Callable[[TimestepLayout, Window], list[Window]]
    copies: Callable[[TimestepLayout], int] = lambda layout: 1
    again: tuple[str, ...] = ()


def _window_and_text(layout: TimestepLayout) -> tuple[TimestepLayout, ...]:
    """The timesteps, and the texts; the tail stands after each."""
    return replace(layout, views=ONE, preamble=()), replace(layout, views=ONE, elements=())


def _agents(layout: TimestepLayout, window: Window) -> list[Window]:
    """What each agent sees and does. Fields without an axis of agents, and returns, are those of the team."""
    out = []
    for agent in range(layout.agents):
        fields = {n: v[:, agent] if n in layout.agent_fields else v for n, v in window.fields.items()}
        out.append(replace(window, fields=fields, given={**window.given, "agent": np.full(len(window.step), agent)}))
    return out


def imitating(layout: TimestepLayout) -> TimestepLayout:
    """The layout of a window, and of the observations that it is to reach, which stand before it like a prompt."""
    return replace(layout, views=ONE, prompt_parts=("observation",), prompt_reverse=True)


VIEWS: dict[str, View] = {
    ONE: View("each window is one sequence", lambda layout: (layout,), lambda layout, window: [window]),
    FUTURE: View(
        "before each window stand its own observations, the last one first",
        lambda layout: (imitating(layout),) * 2,
        lambda layout, window: [replace(window, prompt=True), window],
        again=("observation",),
    ),
    WINDOW_TEXT: View(
        "each window is two sequences: its steps, and its text",
        _window_and_text,
        lambda layout, window: [window, window],
    ),
    AGENTS: View(
        "each window is a sequence for each agent",
        lambda layout: (replace(layout, views=ONE),) * layout.agents,
        _agents,
        lambda layout: layout.agents,
    ),
}
