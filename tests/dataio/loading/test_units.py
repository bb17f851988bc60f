"""Units and assembly: for any number of rows in a unit, the windows are slices of the episodes that were written."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.dataio.loading_fixtures import CONTROL, PICTURES, dataset
from tiphys.dataio.bounds import expand
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Needs
from tiphys.dataio.loading.assemble import Assembler
from tiphys.dataio.loading.fetch import Fetcher
from tiphys.dataio.loading.gather import copy_from
from tiphys.dataio.loading.units import UnitMap

NEEDS = Needs(
    ("observation", "action", "reward", "instruction", "observation.image", "observation.wrist", "observation.state"),
    after=3,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dataset(str(tmp_path_factory.mktemp("data") / "set"), 24)


def planned(index: Any, seed: int, count: int = 40) -> Any:
    rng = np.random.default_rng(seed)
    episode = rng.integers(0, index.episodes, count)
    units = rng.integers(1, 20, count)
    start = (rng.random(count) * np.maximum(1, index.steps[episode] - units + 1)).astype(np.int64)
    units = np.minimum(units, index.steps[episode] - start)
    zeros = np.zeros(count, np.int64)
    return SimpleNamespace(
        row=np.arange(count), slot=zeros + 1, entry=zeros, task=index.task[episode].astype(np.int64), episode=episode,
        start=start, units=units, tokens=units * 3, prompt=zeros > 0, attempt=zeros,
    )  # fmt: skip


@pytest.mark.parametrize("unit_rows", [1, 2, 5, 64])
def test_windows_are_slices_of_the_episodes(index: Any, unit_rows: int) -> None:
    units, plan = UnitMap([index], [NEEDS], unit_rows), planned(index, unit_rows)
    fetcher, got = Fetcher(units, 8), {}
    spans = units.spans(plan)
    wanted = np.unique(np.concatenate([s.units for s in spans]))
    assert asyncio.run(fetcher.fetch(wanted, got.__setitem__)) == {}
    assert {u: memoryview(b).nbytes for u, b in got.items()} == dict(zip(wanted.tolist(), units.sizes(wanted).tolist()))
    windows = Assembler(units).windows(
        plan, spans, [units.ranges(s.units) for s in spans], copy_from(lambda u: memoryview(got[u]))
    )
    for i, window in enumerate(windows):
        assert not isinstance(window, DataError)
        episode = read_episode(index, int(plan.episode[i]))
        task = (CONTROL, PICTURES)[int(plan.task[i])]
        rows = min(window.steps + NEEDS.after, int(index.rows[plan.episode[i]]) - window.start)
        assert window.step.tolist() == list(range(window.start, window.start + rows))
        assert window.episode == episode.id
        assert {f.name for f in task.fields} == set(window.fields)
        for spec in task.fields:
            value, true = window.fields[spec.name], episode.fields[spec.name]
            if spec.per == "episode":
                assert value == true
            else:
                true = true[window.start : window.start + rows]
                np.testing.assert_array_equal(value[: len(true)], true)
                assert value.shape == (rows, *spec.shape)


def test_units_partition_every_column(index: Any) -> None:
    units = UnitMap([index], [NEEDS], 3)
    where = units.ranges(np.arange(units.units))
    assert where.size.min() > 0
    headers = sum(c.total for c in units.columns) - int(where.size.sum())  # of tar members: they lie between units
    assert 0 <= headers <= 1024 * units.units
    order = np.lexsort((where.offset, where.shard))
    ends, starts = (where.offset + where.size)[order][:-1], where.offset[order][1:]
    same = where.shard[order][:-1] == where.shard[order][1:]
    assert (ends <= starts)[same].all()  # no byte belongs to two units


def test_entries_of_one_dataset_share_units_and_fields_that_are_not_needed_have_none(index: Any) -> None:
    small = Needs(("observation", "action"))
    both = UnitMap([index, index], [small, small], 2)
    assert len(both.datasets) == 1
    assert both.units == UnitMap([index], [small], 2).units
    assert {c.field for c in both.columns} == {"steps.npy"}


def test_a_window_outside_its_episode_is_an_error(index: Any) -> None:
    plan = planned(index, 0, 3)
    plan.start[1] = 10_000
    with pytest.raises(DataError, match="do not belong together"):
        UnitMap([index], [NEEDS], 2).spans(plan)


def test_expand() -> None:
    assert expand(np.array([3, 7, 0]), np.array([5, 7, 2])).tolist() == [3, 4, 0, 1]
