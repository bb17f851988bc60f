"""Mix: the effect of weights on a PlanIndex. It says how many rows each bucket gets, and what its rows draw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.index import PlanIndex, sums

UNIT = 2**24  # rows stand so many positions apart on the line; positions are exact in int64 and in float64
_ROUNDS = 3  # rounds of trial rows


@dataclass(frozen=True)
class Mix:
    """What the weights in force make of an index.

    Attributes
    ----------
    cut : int64 [segments + 1]
        The line of rows · UNIT positions, cut into segments. A segment is a bucket, or, without replacement, a bucket's part of
        one entry (segment = bucket · entries + entry).
    choice : float64 [cells]
        Bucket + running share of its strata. One search finds the stratum of a draw.
    windows, tokens : float64 [buckets, strata]
        Expected windows and tokens of a batch. Prompts do not count.
    """

    cut: NDArray[np.int64]
    choice: NDArray[np.float64]
    windows: NDArray[np.float64]
    tokens: NDArray[np.float64]


def entry_shares(
    index: PlanIndex, weights: NDArray[np.float64], names: list[str], held_out: bool
) -> NDArray[np.float64]:
    """Weights, with the sum 1, of the entries that have drawable episodes; 0 for the others.

    Raises DataError if an entry with a weight above 0 has no drawable episode. If `held_out`, only if no such entry has any.
    """
    have = sums(index.strata.entry, index.cell_mass.sum(0), len(weights)) > 0
    empty = [n for n, w, h in zip(names, weights, have) if w > 0 and not h]
    out = np.where(have, weights, 0.0)
    if out.sum() <= 0 or (empty and not held_out):
        raise DataError(
            f"mixture: no {'held-out ' if held_out else ''}episode can be drawn from {', '.join(map(repr, empty or names))}; "
            "check `tasks`, `prefer` and `weight` of the entry, and `data.validation`"
        )
    return out / out.sum()


def cuts(mass: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """The line of `rows` · UNIT positions, cut in proportion to `mass` [segments]."""
    running = np.concatenate([[0.0], np.cumsum(mass)])
    out = np.rint(running / running[-1] * (rows * UNIT)).astype(np.int64)
    out[running == running[-1]] = rows * UNIT
    return out


def free_mix(index: PlanIndex, shares: NDArray[np.float64], rows: int, unit: str) -> Mix:
    """The mix for sampling with replacement.

    Each stratum must get its share of the delivered windows (or tokens). Rows end, so a part of each stratum's draws is refused
    or delivered short. How large that part is depends on the room of each draw, and so on all other strata. Therefore trial rows
    are drawn with trial chances. Their rooms show what one draw of each stratum delivers, and the chances are corrected
    accordingly, a few times. Buckets get rows in proportion to the tokens that their episodes deliver.
    """
    from tiphys.dataio.plan.trial import Trial

    mass, content = index.cell_mass, index.content.reshape(index.buckets, -1)
    base = mass if unit == "windows" else content
    of_entry = sums(index.strata.entry, base.sum(0), len(shares))
    scale = np.divide(shares, of_entry, where=of_entry > 0, out=np.zeros(len(shares)))[index.strata.entry]
    wanted = scale * base.sum(0)  # [strata]: wanted share of the delivered windows or tokens
    start = np.divide(wanted, base.sum(0), where=base.sum(0) > 0, out=np.zeros(len(wanted)))
    weight, trial = start, Trial(index)
    for number in range(_ROUNDS):
        draw, share = _normalised(weight * mass), (weight * content).sum(1)
        share = share / share.sum()
        mix = Mix(cuts(share, rows), running_share(draw), *(np.zeros_like(draw) for _ in range(2)))
        windows, tokens = trial.run(mix, number)
        chance = (share[:, None] * draw).sum(0)
        value = windows if unit == "windows" else tokens
        delivered = chance * value
        if (wanted > 0).sum() < 2 or number == _ROUNDS - 1:
            break
        target = wanted * (delivered.sum() / wanted.sum())
        weight = weight * np.divide(target, delivered, where=delivered > 0, out=np.ones_like(target))
    expected = share[:, None] * draw * rows
    return replace(mix, windows=expected * windows, tokens=expected * tokens)


def running_share(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """`Mix.choice` from the chances of the strata in each bucket [buckets, strata]."""
    running = np.cumsum(chance, 1)
    running = np.divide(running, running[:, -1:], where=running[:, -1:] > 0, out=np.ones_like(running))
    return (running + np.arange(len(chance))[:, None]).reshape(-1)


def _normalised(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(x.sum(1, keepdims=True), 1e-300)
