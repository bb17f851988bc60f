"""Mix: what a mixture's weights make of a PlanIndex: how much of the rows each bucket gets, and what its rows draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .episode import DataError
from .plan_index import PlanIndex, sums
from .renewal import up_to, visits

UNIT = 2**24  # positions of a row on the line of all rows' mass: exact in integers and in float64
_ROUNDS = 8


@dataclass(frozen=True)
class Mix:
    """Weights in force on an index.

    cut       int64 [segments + 1]: rows · UNIT positions of the mass line, cut into segments. A segment is a bucket, or, without
              replacement, a bucket's part of one entry (segment = bucket · entries + entry).
    choice    float64 [cells]: bucket + running share of its strata: one search finds the stratum of a draw
    slots     float64 [buckets]: expected windows of a row
    windows, tokens   float64 [buckets, strata]: expected windows and tokens of a batch (prompts not counted)
    """

    cut: NDArray[np.int64]
    choice: NDArray[np.float64]
    slots: NDArray[np.float64]
    windows: NDArray[np.float64]
    tokens: NDArray[np.float64]


def entry_shares(
    index: PlanIndex, weights: NDArray[np.float64], names: list[str], held_out: bool
) -> NDArray[np.float64]:
    """Weights that sum to 1 over the entries that have drawable episodes.

    DataError where an entry of positive weight has none; a held-out set may lack some of the entries, but not all.
    """
    have = sums(index.strata.entry, index.cell_mass.sum(0), len(weights)) > 0
    empty = [n for n, w, h in zip(names, weights, have) if w > 0 and not h]
    out = np.where(have, weights, 0.0)
    if out.sum() <= 0 or (empty and not held_out):
        raise DataError(
            f"mixture: no {'held-out ' if held_out else ''}episode can be drawn from {', '.join(map(repr, empty or names))}; "
            "check `tasks`, `prefer`, `weight` and `data.validation` of the entry"
        )
    return out / out.sum()


def cuts(mass: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """The mass line of `rows` · UNIT positions, cut in proportion to `mass`."""
    running = np.concatenate([[0.0], np.cumsum(mass)])
    out = np.rint(running / running[-1] * (rows * UNIT)).astype(np.int64)
    out[running == running[-1]] = rows * UNIT
    return out


def free_mix(index: PlanIndex, shares: NDArray[np.float64], rows: int, budget: int, unit: str) -> Mix:
    """Sampling with replacement.

    Every cell must get its share of the delivered windows (or tokens). Rows end, so of each stratum's draws only a part is
    delivered, which depends on what else the bucket's rows hold: a fixed point, reached in a few rounds.
    """
    strata = index.strata
    number = len(strata)
    mass = index.cell_mass
    cell, level = index.level_cell, index.level
    bucket, stratum = cell // number, cell % number
    cost = level * index.grain
    wanted = mass if unit == "windows" else sums(cell, index.level_mass * cost, index.cells).reshape(mass.shape)
    of_entry = sums(strata.entry, wanted.sum(0), len(shares))
    wanted = wanted * np.divide(shares, of_entry, where=of_entry > 0, out=np.zeros(len(shares)))[strata.entry]
    within = index.level_mass / np.maximum(
        mass.reshape(-1)[cell], 1e-300
    )  # of a cell's windows, the share with this level

    draw = _normalised(wanted)
    for _ in range(_ROUNDS):
        started = _Starts(index, draw, within, budget)
        windows, tokens = started.delivered(bucket, stratum, level, within)
        value = windows if unit == "windows" else tokens
        begun = np.divide(wanted, value, where=value > 0, out=np.zeros_like(wanted))
        previous, draw = draw, _normalised(begun)
        if np.abs(draw - previous).max() < 1e-6:
            break
    share = begun.sum(1)
    share /= share.sum()
    expected = share[:, None] * draw * rows
    return Mix(
        cut=cuts(share, rows),
        choice=running_share(draw),
        slots=(draw * windows).sum(1),
        windows=expected * windows,
        tokens=expected * tokens,
    )


def running_share(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mix.choice from each bucket's chances [buckets, strata] of its strata."""
    running = np.cumsum(chance, 1)
    running = np.divide(running, running[:, -1:], where=running[:, -1:] > 0, out=np.ones_like(running))
    return (running + np.arange(len(chance))[:, None]).reshape(-1)


def _normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(x.sum(1, keepdims=True), 1e-300)


class _Starts:
    """Where windows begin in rows of each bucket, given each bucket's chances of drawing a stratum."""

    def __init__(self, index: PlanIndex, draw: NDArray[np.float64], within: NDArray[np.float64], budget: int) -> None:
        strata, self.grain, self.budget = index.strata, index.grain, budget
        self.strata = strata
        positions = -(-budget // self.grain)
        number, buckets = len(strata), index.buckets
        bucket, stratum = index.level_cell // number, index.level_cell % number
        chance = draw.reshape(-1)[index.level_cell] * within
        # Classes of windows: what they take, and where they may not follow.
        gap = np.maximum(-(-strata.least[stratum] // self.grain) - index.level, 0)
        key, of = np.unique(index.level * (positions + 1) + np.minimum(gap, positions), return_inverse=True)
        chances = sums(of * buckets + bucket, chance, len(key) * buckets).reshape(len(key), buckets)
        # The first window begins at 0, or behind a prompt.
        self.behind = np.rint(index.prompt_cost / self.grain).astype(np.int64)
        first = np.zeros((positions + 1, buckets))
        prompted = strata.prompt[stratum]
        for shift, part in ((0, 1 - prompted), (self.behind[stratum], prompted)):
            end = np.minimum(index.level + shift, positions)
            np.add.at(first, (end, bucket), chance * part)
        key_cost, key_gap = key // (positions + 1), key % (positions + 1)
        starts = visits(first[:positions], chances, key_cost, key_gap)
        self.sum = np.concatenate([np.zeros((1, buckets)), np.cumsum(starts, 0)])
        left = starts * (budget - np.arange(positions) * self.grain)[:, None]
        self.sum_left = np.concatenate([np.zeros((1, buckets)), np.cumsum(left, 0)])

    def delivered(
        self,
        bucket: NDArray[np.int64],
        stratum: NDArray[np.int64],
        level: NDArray[np.int64],
        within: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected windows and tokens of a row for one draw's chance of a stratum: [buckets, strata] each."""
        buckets, number = self.sum.shape[1], len(self.strata)
        column = np.arange(buckets)[:, None]
        room = (self.budget - self.strata.least) / self.grain
        windows = up_to(self.sum, np.broadcast_to(room, (buckets, number)), np.broadcast_to(column, (buckets, number)))
        # A window at position j brings min(cost, budget − j) tokens: whole ones up to budget − cost, shortened ones beyond.
        cost = np.minimum(level * self.grain, self.budget)
        whole = np.minimum((self.budget - cost) / self.grain, room[stratum])
        last = np.broadcast_to(room[stratum], bucket.shape)
        tokens = cost * up_to(self.sum, whole, bucket)
        tokens += up_to(self.sum_left, last, bucket) - up_to(self.sum_left, whole, bucket)
        # The first window behind a prompt has less room than one at position 0.
        behind = self.behind[stratum] * self.grain
        tokens -= self.strata.prompt[stratum] * (cost - np.minimum(cost, self.budget - behind))
        cell = bucket * number + stratum
        return windows, sums(cell, tokens * within, buckets * number).reshape(buckets, number)
