"""Mix: what a mixture's weights make of a PlanIndex: how much of the rows each bucket gets, and what its rows draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.index import PlanIndex, sums
from tiphys.dataio.plan.renewal import up_to, visits

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
    rows_of = _Rows(index, budget)
    wanted = index.cell_mass if unit == "windows" else rows_of.cell_tokens
    of_entry = sums(index.strata.entry, wanted.sum(0), len(shares))
    wanted = wanted * np.divide(shares, of_entry, where=of_entry > 0, out=np.zeros(len(shares)))[index.strata.entry]
    draw = _normalised(wanted)
    for _ in range(_ROUNDS):
        rows_of.fill(draw)
        value = rows_of.windows() if unit == "windows" else rows_of.tokens()
        begun = np.divide(wanted, value, where=value > 0, out=np.zeros_like(wanted))
        previous, draw = draw, _normalised(begun)
        if np.abs(draw - previous).max() < 1e-6:
            break
    share = begun.sum(1)
    share /= share.sum()
    expected, windows = share[:, None] * draw * rows, rows_of.windows()
    return Mix(
        cut=cuts(share, rows),
        choice=running_share(draw),
        slots=(draw * windows).sum(1),
        windows=expected * windows,
        tokens=expected * rows_of.tokens(),
    )


def running_share(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mix.choice from each bucket's chances [buckets, strata] of its strata."""
    running = np.cumsum(chance, 1)
    running = np.divide(running, running[:, -1:], where=running[:, -1:] > 0, out=np.ones_like(running))
    return (running + np.arange(len(chance))[:, None]).reshape(-1)


def _normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(x.sum(1, keepdims=True), 1e-300)


class _Rows:
    """How rows of each bucket are filled, given each bucket's chances of drawing a stratum.

    cell_tokens  [buckets, strata]: tokens of all of a cell's windows
    """

    def __init__(self, index: PlanIndex, budget: int) -> None:
        self.strata, self.grain, self.budget = index.strata, index.grain, budget
        self.buckets, self.shape = index.buckets, (index.buckets, len(index.strata))
        self.positions = -(-budget // self.grain)
        self.cell, self.level = np.asarray(index.level_cell), np.asarray(index.level)
        self.bucket, self.stratum = self.cell // len(index.strata), self.cell % len(index.strata)
        # Of a cell's windows, the share with this level.
        self.within = index.level_mass / np.maximum(index.cell_mass.reshape(-1)[self.cell], 1e-300)
        self.cell_tokens = self._of_cells(index.level_mass * (self.level * self.grain))
        # Classes of windows: what they take, and how many of the last positions may not follow them.
        gap = np.maximum(-(-self.strata.least[self.stratum] // self.grain) - self.level, 0)
        key = self.level * (self.positions + 1) + np.minimum(gap, self.positions)
        keys, of = np.unique(key, return_inverse=True)
        self.cost, self.gap = keys // (self.positions + 1), keys % (self.positions + 1)
        self.class_at = of * self.buckets + self.bucket
        self.behind = np.rint(index.prompt_cost / self.grain).astype(np.int64)  # positions of a stratum's prompts

    def _of_cells(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums(self.cell, values, self.shape[0] * self.shape[1]).reshape(self.shape)

    def fill(self, draw: NDArray[np.float64]) -> None:
        """Computes where windows begin: running sums of the chance, and of the chance times what is left there."""
        chance = draw.reshape(-1)[self.cell] * self.within
        chances = sums(self.class_at, chance, len(self.cost) * self.buckets).reshape(-1, self.buckets)
        # The first window begins at 0, or behind a prompt.
        first, prompted = np.zeros((self.positions + 1) * self.buckets), self.strata.prompt[self.stratum]
        for shift, part in ((0, 1 - prompted), (self.behind[self.stratum], prompted)):
            end = np.minimum(self.level + shift, self.positions)
            first += sums(end * self.buckets + self.bucket, chance * part, len(first))
        starts = visits(first.reshape(-1, self.buckets)[: self.positions], chances, self.cost, self.gap)
        left = starts * (self.budget - np.arange(self.positions) * self.grain)[:, None]
        none = np.zeros((1, self.buckets))
        self.sum, self.sum_left = (np.concatenate([none, np.cumsum(x, 0)]) for x in (starts, left))

    def windows(self) -> NDArray[np.float64]:
        """Expected windows of a row for one draw's chance of a stratum [buckets, strata]."""
        room = np.broadcast_to((self.budget - self.strata.least) / self.grain, self.shape)
        return up_to(self.sum, room, np.broadcast_to(np.arange(self.buckets)[:, None], self.shape))

    def tokens(self) -> NDArray[np.float64]:
        """Expected tokens of a row for one draw's chance of a stratum [buckets, strata].

        A window at position j brings min(cost, budget − j) tokens: whole ones up to budget − cost, shortened ones beyond.
        """
        cost, last = np.minimum(self.level * self.grain, self.budget), (self.budget - self.strata.least) / self.grain
        whole = np.minimum((self.budget - cost) / self.grain, last[self.stratum])
        tokens = cost * up_to(self.sum, whole, self.bucket)
        tokens += up_to(self.sum_left, last[self.stratum], self.bucket) - up_to(self.sum_left, whole, self.bucket)
        # The first window behind a prompt has less room than one at position 0.
        behind = self.behind[self.stratum] * self.grain
        tokens -= self.strata.prompt[self.stratum] * (cost - np.minimum(cost, self.budget - behind))
        return self._of_cells(tokens * self.within)
