"""What a plan will deliver: shares, fill of rows, repeats, and prompts that cannot come from another episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.plan.index import PlanIndex
from tiphys.dataio.plan.mixture import Mix

_CHUNK = 1 << 22  # episodes worked on at once


def report(index: PlanIndex, mix: Mix, names: Sequence[str], rows: int, budget: int) -> dict[str, Any]:
    """Expected values under the weights in force, as JSON values.

    windows_per_row, tokens_per_row  per row; prompts do not count
    fill                   tokens_per_row as a share of the budget
    pairs_in_row           pairs of windows of one row that show the same episode, divided by the number of windows
    same_episode_prompts   number of cells (task and bucket) that have prompts but only one episode, so that the prompt is another
                           part of this episode; and their share of all prompts
    too_long               entry -> episodes that are left out because their instruction and one unit exceed a row
    entries                entry -> share of windows, share of tokens, episodes, and training steps until as many tokens were
                           delivered as its episodes have
    step_rates             entry -> task -> smallest and largest rate of a step, divided by the mean rate of the task's steps;
                           calculated for full windows
    """
    strata, number = index.strata, len(index.strata)
    episodes = np.diff(index.first).reshape(index.buckets, number)
    prompts = mix.windows * strata.prompt
    lonely = (episodes == 1) & (prompts > 0)
    per_stratum = np.add.reduceat(np.append(index.units, 0).astype(np.int64), index.first[:-1]) * (
        np.diff(index.first) > 0
    )
    tokens = per_stratum.reshape(index.buckets, number).sum(0) * index.costs.each
    if len(index.saved_first):
        places = np.arange(len(index.units))
        saved = np.append(index.savings(places, np.zeros(len(places), np.int64), index.units), 0)
        per_cell = np.add.reduceat(saved, index.first[:-1]) * (np.diff(index.first) > 0)
        tokens = tokens - per_cell.reshape(index.buckets, number).sum(0)
    entries = {}
    for i, name in enumerate(names):
        mine = strata.entry == i
        delivered = float(mix.tokens[:, mine].sum())
        entries[name] = {
            "windows": float(mix.windows[:, mine].sum() / mix.windows.sum()),
            "tokens": delivered / float(mix.tokens.sum()),
            "episodes": int(episodes[:, mine].sum()),
            "steps_per_epoch": float(tokens[mine].sum() / delivered) if delivered else None,
        }
    return {
        "windows_per_row": float(mix.windows.sum() / rows),
        "tokens_per_row": float(mix.tokens.sum() / rows),
        "fill": float(mix.tokens.sum() / rows / budget),
        "pairs_in_row": _pairs(index, mix, rows),
        "same_episode_prompts": {
            "cells": int(lonely.sum()),
            "share": float(prompts[lonely].sum() / prompts.sum()) if prompts.sum() else 0.0,
        },
        "too_long": {name: int(n) for name, n in zip(names, index.too_long) if n},
        "entries": entries,
        "step_rates": _rates_by_task(index, names),
    }


def _rates_by_task(index: PlanIndex, names: Sequence[str]) -> dict[str, dict[int, tuple[float, float]]]:
    low, high = step_rates(index)
    out: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    present = index.cell_mass.sum(0) > 0
    for s in np.flatnonzero(present):
        out[names[index.strata.entry[s]]][int(index.strata.task[s])] = (float(low[s]), float(high[s]))
    return out


def _pairs(index: PlanIndex, mix: Mix, rows: int) -> float:
    """Pairs for each window. Two windows of a row show the same episode with the chance Σ p² over the episodes of its bucket."""
    of_bucket = mix.windows.sum(1)
    drawn = np.divide(mix.windows, of_bucket[:, None], where=of_bucket[:, None] > 0, out=np.zeros_like(mix.windows))
    share = np.diff(mix.cut).reshape(index.buckets, -1).sum(1) / mix.cut[-1]
    per_row = np.divide(of_bucket, share * rows, where=share > 0, out=np.zeros_like(of_bucket))
    mass = index.cell_mass
    within = np.divide(index.square.reshape(mass.shape), mass**2, where=mass > 0, out=np.zeros_like(mass))
    same = (drawn**2 * within).sum(1)
    return float((of_bucket * np.maximum(per_row - 1, 0) / 2 * same).sum() / of_bucket.sum())


def step_rates(index: PlanIndex) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest rate [strata] at which full windows show a step, divided by the mean rate of the stratum's steps.

    All starts of an episode are equally likely. So the rate of a step is the episode's mass, divided by the number of starts,
    times the number of windows that show the step.
    """
    number = len(index.strata)
    low, high = np.full(number, np.inf), np.zeros(number)
    total, steps = np.zeros(number), np.zeros(number)
    cells = np.repeat(np.arange(index.cells), np.diff(index.first))
    for a in range(0, len(cells), _CHUNK):
        part = slice(a, a + _CHUNK)
        s, units = cells[part] % number, index.units[part].astype(np.float64)
        window = index.window(s, index.fixed[part])
        mass = np.diff(index.mass[a : a + len(s) + 1])
        if index.starts == "steps":
            least = most = mass / (units + window - 1) * window
            mean = least
        else:
            starts = np.maximum(units - window + 1, 1)
            least, most = mass / starts, mass / starts * np.minimum(starts, np.minimum(window, units))
            mean = mass * np.minimum(window, units) / units
        np.minimum.at(low, s, least)
        np.maximum.at(high, s, most)
        total += np.bincount(s, mean * units, number)
        steps += np.bincount(s, units, number)
    mean_rate = np.divide(total, steps, where=steps > 0, out=np.ones(number))
    return np.where(steps > 0, low / mean_rate, 1.0), np.where(steps > 0, high / mean_rate, 1.0)
