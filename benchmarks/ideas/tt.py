"""Trajectory Transformer (Janner et al. 2021): a plan reaches what imitation does not.

The world is to wait or to take: to take earns 1 and nothing more, to wait to the end earns 10. The recorded behaviour takes with
a probability of .55 at each step, so .8 % of its episodes earn 10, and imitation takes. Control: the values of plans do not
count, so a plan that is shorter than the episode does not see the 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import Behaviour, WaitOrTake, behave, play
from tiphys.pretrain.acting import beam

PLAN = {"horizon": 3, "width": 8, "expand": 2, "cdf": 0.0}
IMITATION = {"horizon": 1, "width": 1, "expand": 1, "cdf": 0.999}  # one plan of one step: the most probable action


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = WaitOrTake()
    data = behave(world, 2000, seed, impatient)
    dataset = write(folder / "data", [world.task], data.episodes(world.task, "wait"))
    policy = train(
        [{"dataset": dataset}],
        {"paradigm": "tt", "context": 48, "fields": {"reward": {"encoding": "uniform", "bins": 32}}},
        steps=300,
        rows=16,
        seed=seed,
        model=WIDE,
    )
    planned = float(play(policy, world, 20, seed, acting=PLAN).returns.mean())
    blind = None
    if control:
        with mock.patch.object(beam, "values_of", only_rewards):
            blind = float(play(policy, world, 20, seed, acting=PLAN).returns.mean())
    yield Mark("return of plans of 3 steps", planned, at_least(9.5), blind, at_most(1.5), "values do not count")
    imitated = float(play(policy, world, 20, seed, acting=IMITATION).returns.mean())
    yield Mark("return of the most probable action", imitated, at_most(1.5), planned, at_least(9.5), "it plans")


def impatient(random: np.random.Generator) -> Behaviour:
    def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
        return (random.random(len(fields["observation"])) < 0.55).astype(np.int64)

    return act


def only_rewards(element: beam.Element) -> np.ndarray:
    values = _values_of(element)
    return values * 0 if element.role == "return" else values


_values_of = beam.values_of
