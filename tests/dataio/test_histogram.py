"""Quantiles are those that NumPy computes from all values at once: exactly, as long as cells need not be joined."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from tests.dataio.making import observed, random_episode
from tiphys.dataio import histogram
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.histogram import MOST_SHIFT, Histogram
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.dataio.statistics import RETURN_TO_GO, FieldStatistics, Sketch, Statistics

LEVELS = np.linspace(0, 1, 101)
DRAWS = {
    "normal": lambda rng: rng.normal(size=60_000),
    "bimodal": lambda rng: np.concatenate([rng.normal(-3, 0.1, 30_000), rng.normal(3, 0.1, 30_000)]),
    "far from zero": lambda rng: -122.4 + 1e-3 * rng.normal(size=60_000),
    "sparse": lambda rng: np.where(rng.random(60_000) < 0.02, rng.random(60_000), 0.0),
    "an atom among others": lambda rng: np.where(rng.random(60_000) < 0.3, 1.0, rng.normal(size=60_000)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_bins_of_quantiles_hold_equal_shares(draw):
    values = draw(np.random.default_rng(0)).astype(np.float32).astype(np.float64)
    made = Histogram(1)
    for part in np.array_split(values, 7):
        made.add(part[:, None])
    got, wanted = made.quantiles(LEVELS)[:, 0], np.quantile(values, LEVELS)
    assert np.abs(got - wanted).max() < 2e-4 * np.ptp(values)
    atoms, counts = np.unique(wanted, return_counts=True)
    for atom in atoms[counts > 1]:
        assert (got == atom).sum() == (wanted == atom).sum()
    if (counts == 1).all():
        shares = np.histogram(values, got)[0] / len(values)
        assert shares.min() > 0.0075
        assert shares.max() < 0.0125


FLOATS = hn.arrays(
    np.float64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.floats(-(2.0**99), 2.0**99, width=32)
)


@given(FLOATS, st.lists(st.integers(0, 60), max_size=4), st.sampled_from([2, 5, 4096]))
@settings(max_examples=80, deadline=None)
def test_any_grouping_gives_the_same_histogram(values, cuts, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "MOST_CELLS", most)
        whole, merged = Histogram(2), Histogram(2)
        whole.add(values)
        for part in np.split(values, sorted(min(c, len(values)) for c in cuts)):
            one = Histogram(2)
            one.add(part)
            merged.merge(one)
    for name in ("shift", *histogram.CELLS):
        assert np.array_equal(getattr(whole, name), getattr(merged, name)), name
    whole.check(len(values))
    if most == 4096:
        np.testing.assert_allclose(whole.quantiles(LEVELS), np.quantile(values, LEVELS, axis=0), rtol=1e-6, atol=1e-30)


TASK = TaskSpec(
    "walk",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (2,)),
        FieldSpec("action", "action", "discrete", "int64", values=3),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


def test_the_quantiles_of_a_dataset_and_of_its_returns_to_go(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [random_episode(TASK, f"e{i}", int(rng.integers(1, 30)), rng, observed(TASK)) for i in range(20)]
    with ShardWriter(str(tmp_path / "d"), [TASK]) as writer:
        for episode in episodes:
            writer.write(episode)
        writer.close()
    found = EpisodeIndex.open(str(tmp_path / "d")).statistics_with_histograms["walk"]
    togo = np.concatenate([np.cumsum(e.fields["reward"][::-1].astype(float))[::-1] for e in episodes]).astype(
        np.float32
    )
    np.testing.assert_allclose(found[RETURN_TO_GO].at(LEVELS)[:, 0], np.quantile(togo, LEVELS), rtol=1e-5, atol=1e-5)
    assert float(found[RETURN_TO_GO].mean) == pytest.approx(togo.mean(), abs=1e-5)
    seen = np.concatenate([e.fields["observation"] for e in episodes])
    np.testing.assert_allclose(found["observation"].at(LEVELS), np.quantile(seen, LEVELS, axis=0), rtol=1e-6)
    assert FieldStatistics.from_dict(found["reward"].to_dict()).histogram is None


def test_statistics_of_an_earlier_version_are_read(tmp_path: Path):
    """Its cells were 0.4 % of the value wide, without their extremes."""
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32).astype(np.float64)
    sketch = Sketch(())
    sketch.add(values[:, None])
    kept = Statistics()
    kept.sketches["walk", "reward"] = sketch
    kept.write(tmp_path / "new.parquet")
    bits = values.astype(np.float32).view(np.uint32)
    cells = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(MOST_SHIFT)
    keys, counts = np.unique(cells.astype(np.uint32), return_counts=True)
    table = pq.read_table(tmp_path / "new.parquet")
    table = table.drop_columns([name for name in table.column_names if name.startswith("cell_")])
    table = table.append_column("keys", pa.array([keys], pa.list_(pa.uint32())))
    table = table.append_column("counts", pa.array([counts], pa.list_(pa.int64())))
    pq.write_table(table, tmp_path / "old.parquet")
    old = Statistics.read(tmp_path / "old.parquet").sketches["walk", "reward"]
    old.check()
    np.testing.assert_allclose(old.cells.quantiles(LEVELS)[:, 0], np.quantile(values, LEVELS), rtol=0.004, atol=1e-3)
    new = Statistics.read(tmp_path / "new.parquet").sketches["walk", "reward"]
    assert np.array_equal(new.cells.quantiles(LEVELS), sketch.cells.quantiles(LEVELS))
    new.merge(old)
    assert new.cells.counts.sum() == new.count == 10_000
    new.cells.keys = new.cells.keys[::-1]
    with pytest.raises(DataError, match="histogram"):
        new.check()
