"""HIDING: which parts of which steps of a window are hidden, and which of these are learnt (Carroll et al. 2022, sec. 4).

A scheme works on the steps of many windows at once. The number of a window's random words does not depend on its scheme, so
a window hides the same whatever other windows are laid out with it.

A return is seen at most at the first step of a window, as in the paper: at later steps it is hidden and never learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tiphys.dataio.philox import HIDE, uniform32, words

Mask = np.ndarray  # bool [N, P]: for each step of all windows, and each part


@dataclass(frozen=True)
class Steps:
    """N steps of G windows, one after the other.

    number  int64 [N]: 0, 1, … within its window
    count   int64 [N]: steps of its window
    acted   int64 [N]: steps of its window that have an action; the others show only an observation
    """

    number: np.ndarray
    count: np.ndarray
    acted: np.ndarray


@dataclass(frozen=True)
class Uniforms:
    """Random numbers in (0, 1).

    window  float64 [N, 2]: those of its window, at each of its steps
    part    float64 [N, P]: one for each part of each step
    """

    window: np.ndarray
    part: np.ndarray


Scheme = Callable[[Uniforms, Steps, Sequence[str]], tuple[Mask, Mask]]


def _at(uniforms: Uniforms, choices: np.ndarray, column: int = 0) -> np.ndarray:
    """int64 [N]: one of 0, 1, …, choices − 1 for each window; -1 where there is no choice."""
    found = np.minimum((uniforms.window[:, column] * np.maximum(choices, 1)).astype(np.int64), choices - 1)
    return np.maximum(found, -1)


def _is(parts: Sequence[str], *kinds: str) -> np.ndarray:
    return np.array([part in kinds for part in parts], bool)


def _seen(steps: Steps, parts: Sequence[str], observed: np.ndarray, acted: np.ndarray, asked: bool = False) -> Mask:
    """All but the observations at steps `observed` [N], the actions and rewards at steps `acted` [N], and a return asked for."""
    shown = observed[:, None] & _is(parts, "observation")
    shown |= acted[:, None] & _is(parts, "action", "reward")
    shown |= (steps.number == 0)[:, None] & _is(parts, "return") & asked
    return ~shown


def random(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """Each part of each step, with a rate that is drawn for the window; all are learnt."""
    hidden = uniforms.part < uniforms.window[:, :1]
    later = (steps.number > 0)[:, None] & _is(parts, "return")
    return hidden | later, hidden & ~later


def _action(steps: Steps, at: np.ndarray, parts: Sequence[str], asked: bool, also: np.ndarray) -> tuple[Mask, Mask]:
    """The action of step `at` [N] is learnt from the steps before it, its observation, and the observations `also` [N]."""
    before = steps.number < at
    hidden = _seen(steps, parts, (steps.number <= at) | also, before, asked)
    return hidden, (steps.number == at)[:, None] & _is(parts, "action")


def bc(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """An action, from the past."""
    return _action(steps, _at(uniforms, steps.acted), parts, False, np.zeros(len(steps.number), bool))


def rc(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """An action, from the past and the return that is asked for at the first step."""
    return _action(steps, _at(uniforms, steps.acted), parts, True, np.zeros(len(steps.number), bool))


def goal(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """An action, from the past and the last observation."""
    return _action(steps, _at(uniforms, _left(steps)), parts, False, steps.number == steps.count - 1)


def waypoint(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """An action, from the past and the observations at the start, at one and two thirds, and at the end."""
    third = (steps.number == steps.count // 3) | (steps.number == 2 * steps.count // 3)
    also = third | (steps.number == 0) | (steps.number == steps.count - 1)
    return _action(steps, _at(uniforms, _left(steps)), parts, False, also)


def past(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """Everything before a step, from what comes after."""
    first = _at(uniforms, steps.count - 1) + 1
    hidden = _seen(steps, parts, steps.number >= first, steps.number >= first)
    return hidden, (steps.number < first)[:, None] & _is(parts, "observation", "action", "reward")


def future(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """Everything after a step, from what comes before."""
    last = _at(uniforms, steps.count - 1)
    seen = steps.number <= np.maximum(last, 0)
    hidden = _seen(steps, parts, seen, seen)
    return hidden, (~seen)[:, None] & _is(parts, "observation", "action", "reward")


def span(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """Some consecutive steps, from those around them."""
    one, other = _at(uniforms, steps.count), _at(uniforms, steps.count, 1)
    inside = (steps.number >= np.minimum(one, other)) & (steps.number <= np.maximum(one, other))
    hidden = _seen(steps, parts, ~inside, ~inside)
    return hidden, inside[:, None] & _is(parts, "observation", "action", "reward")


def forward(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """The next observation, from one observation and its action alone."""
    at = _at(uniforms, _left(steps))
    here = steps.number == at
    return _seen(steps, parts, here, here), ((steps.number == at + 1) & (at >= 0))[:, None] & _is(parts, "observation")


def backward(uniforms: Uniforms, steps: Steps, parts: Sequence[str]) -> tuple[Mask, Mask]:
    """The action between two observations, from these alone."""
    at = _at(uniforms, _left(steps))
    here = steps.number == at
    hidden = _seen(steps, parts, here | (steps.number == at + 1), np.zeros(len(here), bool))
    return hidden, here[:, None] & _is(parts, "action")


def _left(steps: Steps) -> np.ndarray:
    """int64 [N]: the actions of a window that are followed by another observation of it."""
    return np.minimum(steps.acted, steps.count - 1)


HIDING: dict[str, Scheme] = {
    "random": random,
    "bc": bc,
    "rc": rc,
    "goal": goal,
    "waypoint": waypoint,
    "past": past,
    "future": future,
    "span": span,
    "forward": forward,
    "backward": backward,
}

# What a policy can be asked: the scheme whose windows look like its own
QUERIES = {
    "bc": "the next action, from the past",
    "rc": "the next action, from the past and the return that is asked for",
    "goal": "the next action, from the past and the last observation of the window",
}


def hide(
    mixture: Sequence[tuple[str, float]],
    steps: Steps,
    first: np.ndarray,
    parts: Sequence[str],
    where: tuple[int, int, np.ndarray, np.ndarray],
) -> tuple[Mask, Mask]:
    """What is hidden of the steps of G windows, and what of it is learnt, each bool [N, P].

    Parameters
    ----------
    mixture : sequence of (str, float)
        Schemes with their shares. Each window draws one.
    steps : Steps
        The N steps of all windows.
    first : ndarray, int64 [G]
        The first step of each window among the N.
    parts : sequence of str
        The kinds of the P parts of a step.
    where : (int, int, ndarray int64 [G], ndarray int64 [G])
        Seed and training step, and the row and slot of each window: the keys of the random words.
    """
    seed, step, row, slot = where
    owner = np.repeat(np.arange(len(first)), np.diff(first, append=len(steps.number)))
    choice, one, other, _ = (uniform32(w)[owner] for w in words(seed, step, row, slot, 0, HIDE))
    each = -(-len(parts) // 4)  # counters of a step: a counter gives four words
    attempt = 1 + steps.number[:, None] * each + np.arange(each)
    drawn = words(seed, step, row[owner][:, None], slot[owner][:, None], attempt & 0xFFFF, HIDE)
    part = np.stack([uniform32(w) for w in drawn], axis=-1).reshape(len(owner), -1)[:, : len(parts)]
    uniforms = Uniforms(np.stack([one, other], axis=1), part)
    names, shares = zip(*mixture, strict=True)
    chosen = np.searchsorted(np.cumsum(shares) / np.sum(shares), choice, side="right").clip(max=len(names) - 1)
    hidden, learnt = np.ones((2, len(owner), len(parts)), bool)
    for number, name in enumerate(names):
        mine = chosen == number
        if mine.any():
            some = Steps(steps.number[mine], steps.count[mine], steps.acted[mine])
            hidden[mine], learnt[mine] = HIDING[name](Uniforms(uniforms.window[mine], part[mine]), some, parts)
    return hidden, learnt
