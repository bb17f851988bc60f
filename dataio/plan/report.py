"""What a plan will deliver, for people: shares, fill of rows, repeats, and where prompts cannot be of another episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tiphys.dataio.plan.index import PlanIndex
from tiphys.dataio.plan.mixture import Mix


def report(index: PlanIndex, mix: Mix, names: Sequence[str], rows: int, budget: int) -> dict[str, Any]:
    """Expectations under the weights in force; JSON.

    windows_per_row, tokens_per_row  prompts not counted
    repeats_in_row         share of windows whose episode another window of the row shows already
    same_episode_prompts   cells (task and bucket) with prompts but a single episode, whose prompts are its other end, and the
                           share of all prompts that this concerns
    too_long               entry -> episodes that are left out, because one step with its instruction exceeds a row
    entries                name -> share of windows and of tokens, episodes, and steps until as much was delivered as there is
    """
    strata, number = index.strata, len(index.strata)
    episodes = np.diff(index.first).reshape(index.buckets, number)
    prompts = mix.windows * strata.prompt
    lonely = (episodes == 1) & (prompts > 0)
    per_stratum = np.add.reduceat(np.append(index.units, 0).astype(np.int64), index.first[:-1]) * (
        np.diff(index.first) > 0
    )
    tokens = per_stratum.reshape(index.buckets, number).sum(0) * strata.per_unit
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
        "repeats_in_row": _repeats(index, mix),
        "same_episode_prompts": {
            "cells": int(lonely.sum()),
            "share": float(prompts[lonely].sum() / prompts.sum()) if prompts.sum() else 0.0,
        },
        "too_long": {name: int(n) for name, n in zip(names, index.too_long) if n},
        "entries": entries,
    }


def _repeats(index: PlanIndex, mix: Mix) -> float:
    """Two windows of a row show the same episode with the chance Σ p² over its bucket's episodes."""
    of_bucket = mix.windows.sum(1)
    drawn = np.divide(mix.windows, of_bucket[:, None], where=of_bucket[:, None] > 0, out=np.zeros_like(mix.windows))
    mass = index.cell_mass
    within = np.divide(index.square.reshape(mass.shape), mass**2, where=mass > 0, out=np.zeros_like(mass))
    same = (drawn**2 * within).sum(1)
    return float((of_bucket * np.maximum(mix.slots - 1, 0) / 2 * same).sum() / of_bucket.sum())
