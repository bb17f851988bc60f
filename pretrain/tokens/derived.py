"""SOURCES: values that are not a field of the data, but follow from a window's rewards or fields by a named rule.

A part names its rule, with an argument after a colon: `to_go`, `discounted:.99`, `histogram:reward`. While acting, the future is
not known: `Window.given` then holds the values by the name of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, Window

REWARD_FIELD = "reward"
ALL = -1  # steps: all to the episode's end
Make = Callable[[Window, int, str, Mapping[str, Any]], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One rule.

    make      (window, steps, argument, options) -> float [steps, *shape], the values at the window's first steps
    argument  what stands behind the colon: number | field; empty: nothing
    future    steps after the window that it reads
    options   the options of a part that it knows, with their defaults
    """

    make: Make
    argument: str = ""
    future: int = 0
    options: tuple[tuple[str, Any], ...] = ()


def to_go(window: Window, steps: int, argument: str, options: Mapping[str, Any]) -> np.ndarray:
    """The undiscounted sum of the rewards from each step on, with its own reward."""
    return window.returns_to_go[:steps]


def after(window: Window, steps: int, argument: str, options: Mapping[str, Any]) -> np.ndarray:
    """The undiscounted sum of the rewards after each step, without its own reward."""
    return (window.returns_to_go[:steps].astype(np.float64) - _rewards(window)[:steps]).astype(np.float32)


def discounted(window: Window, steps: int, argument: str, options: Mapping[str, Any]) -> np.ndarray:
    """r[t + 1] + γ r[t + 2] + γ² r[t + 3] + … (the value of Janner et al. 2021, sec. 3.2). Its own reward does not count."""
    discount, rewards = float(argument), _rewards(window)
    beyond = rewards[steps:]
    last = float(beyond @ discount ** np.arange(len(beyond)))  # the value at the window's last step
    distance = np.arange(steps)[None, 1:] - np.arange(steps)[:, None] - 1
    powers = np.where(distance >= 0, discount ** np.maximum(distance, 0), 0.0)
    out = powers @ rewards[1:steps] + last * discount ** (steps - 1 - np.arange(steps))
    return out.astype(np.float32)


def histogram(window: Window, steps: int, argument: str, options: Mapping[str, Any]) -> np.ndarray:
    """Shares of the field's values in each bin, from each step to the episode's end: [steps, entries · bins].

    `low`, `high`: the range of each entry, whose ends are the outer edges. Values outside count in the first and last bin.
    """
    bins, low, high = int(options["bins"]), np.asarray(options["low"], float), np.asarray(options["high"], float)
    rows = _field(window, argument)
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)[_acted(window)]
    place = np.floor((rows - low) / np.where(high > low, high - low, 1.0) * bins)
    place = np.where(np.isfinite(place), place, 0).clip(0, bins - 1).astype(np.int64)
    ones = place[:, :, None] == np.arange(bins)
    counts = ones[::-1].cumsum(axis=0)[::-1][:steps]  # [steps, entries, bins]
    shares = counts / np.arange(len(rows), len(rows) - len(counts), -1)[:, None, None]
    if not np.isfinite(rows).all():  # the step at which the error is reported is the first that it reaches
        shares[: int(np.flatnonzero(~np.isfinite(rows).all(axis=1)).max()) + 1] = np.nan
    return shares.reshape(len(counts), -1).astype(np.float32)


def agent(window: Window, steps: int, argument: str, options: Mapping[str, Any]) -> np.ndarray:
    """The number of the agent. It is never computed: the view of each agent gives it."""
    raise DataError(f"episode {window.episode!r} is not that of one agent, so it has no number of an agent")


def _acted(window: Window) -> np.ndarray:
    """bool [R]: the rows that have an action, and so a reward. They come first."""
    return np.asarray(window.valid, bool)


def _rewards(window: Window) -> np.ndarray:
    """float64 [R]: the reward of each row; 0 for a row without an action, and for data without rewards."""
    rewards = window.fields.get(REWARD_FIELD)
    if rewards is None:
        return np.zeros(len(window.step))
    return np.where(_acted(window), np.asarray(rewards, np.float64).reshape(len(rewards)), 0.0)


def _field(window: Window, name: str) -> Any:
    try:
        return window.fields[name]
    except KeyError:
        raise DataError(f"episode {window.episode!r} has no field {name!r}, which a histogram is made of") from None


SOURCES: dict[str, Source] = {
    "agent": Source(agent),
    "to_go": Source(to_go),
    "after": Source(after),
    "discounted": Source(discounted, argument="number", future=ALL),
    "histogram": Source(histogram, argument="field", future=ALL, options=(("bins", 30), ("low", None), ("high", None))),
}


def source_of(rule: str) -> tuple[Source, str]:
    """The source of a rule such as `discounted:.99`, and its argument.

    Raises
    ------
    DataError
        If there is no such source, or its argument is missing or not what it needs.
    """
    name, colon, argument = rule.partition(":")
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"source {rule!r} is unknown; the sources are {', '.join(SOURCES)}")
    if bool(source.argument) != bool(argument) or (colon and not argument):
        raise DataError(
            f"source {rule!r} needs {f'a {source.argument} after a colon' if source.argument else 'no colon'}"
        )
    if source.argument == "number":
        try:
            valid = 0 <= float(argument) <= 1
        except ValueError:
            valid = False
        if not valid:
            raise DataError(f"source {rule!r}: {argument!r} is not a number from 0 to 1")
    return source, argument


def fields_of(rule: str) -> tuple[str, ...]:
    """The fields that a rule reads."""
    source, argument = source_of(rule)
    if source.argument == "field":
        return (argument,)
    return () if rule in ("to_go", "agent") else (REWARD_FIELD,)


def derived(window: Window, steps: int, rule: str, options: Mapping[str, Any]) -> np.ndarray:
    """The values of a rule at the window's first steps, float [steps, *shape].

    `Window.given` comes before what the rule would compute.
    """
    if rule in window.given:
        return window.given[rule][:steps]
    source, argument = source_of(rule)
    return source.make(window, steps, argument, options)
