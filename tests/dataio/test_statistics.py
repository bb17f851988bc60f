"""Statistics equal those that NumPy computes from all values at once, and do not depend on the grouping."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from tests.dataio.making import RICH, SMALL, observed, random_episode
from tiphys.dataio import statistics
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.rows import RowLayout, pack_rows
from tiphys.dataio.statistics import QUANTILES, RETURN_TO_GO, FieldStatistics, Sketch, Statistics, pooled


def gathered(task, episodes):
    out, layout = Statistics(), RowLayout(task)
    for e in episodes:
        out.add(layout, e.id, pack_rows(layout, e))
    return out


@pytest.fixture(scope="module")
def episodes():
    rng = np.random.default_rng(0)
    return [random_episode(RICH, f"e{i}", int(rng.integers(1, 40)), rng, observed(RICH)) for i in range(60)]


def test_moments_extremes_and_clipping_equal_numpys(episodes):
    result = gathered(RICH, episodes).result(["rich"])["rich"]
    for name in ("observation.state", "action", "reward", "gripper", "terminated"):
        values = np.concatenate([e.fields[name] for e in episodes]).astype(np.float64)
        s = result[name]
        assert s.count == len(values)
        for got, wanted in (
            (s.mean, values.mean(0)),
            (s.std, values.std(0)),
            (s.min, values.min(0)),
            (s.max, values.max(0)),
        ):
            assert got.shape == wanted.shape
            assert np.allclose(got, wanted, rtol=1e-10)
    actions = np.concatenate([e.fields["action"] for e in episodes])
    assert result["action"].clipped == pytest.approx((np.abs(actions) > 1).mean())
    assert result["reward"].clipped == 0.0


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(size=20_000),
        lambda rng: rng.normal(size=20_000) * 1e-6 + 1e-5,
        lambda rng: rng.exponential(size=20_000) * 1e6,
        lambda rng: -rng.exponential(size=20_000),
        lambda rng: rng.integers(0, 5, 20_000).astype(float),
        lambda rng: np.full(1000, -0.0),
    ],
)
def test_quantiles_are_near_the_true_ones(draw):
    values = draw(np.random.default_rng(0)).astype(np.float32).astype(np.float64)
    sketch = Sketch(())
    for part in np.array_split(values, 7):
        sketch.add(part[:, None])
    got = sketch.result().quantiles
    below = np.quantile(values, np.clip(np.array(QUANTILES) - 1e-4, 0, 1), method="lower")
    above = np.quantile(values, np.clip(np.array(QUANTILES) + 1e-4, 0, 1), method="higher")
    assert (got >= below - np.abs(below) * 0.004 - 1e-12).all()
    assert (got <= above + np.abs(above) * 0.004 + 1e-12).all()
    assert (np.diff(got) >= 0).all()


@given(
    hn.arrays(
        np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    ),
    st.lists(st.integers(0, 40), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_grouping_gives_the_same(values, cuts):
    whole = Sketch((3,))
    whole.add(values)
    merged = Sketch((3,))
    for part in np.split(values, sorted(min(c, len(values)) for c in cuts)):
        one = Sketch((3,))
        one.add(part)
        merged.merge(one)
    a, b = whole.result(), merged.result()
    assert a.count == b.count
    for name in ("min", "max", "quantiles"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    scale = np.abs(values).max() + 1e-300
    assert np.allclose(a.mean / scale, b.mean / scale, atol=1e-12)
    assert np.allclose(a.std / scale, b.std / scale, atol=1e-7)


def test_values_that_are_not_finite_are_counted_separately():
    sketch = Sketch((2,))
    sketch.add(np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, np.inf], [5.0, 6.0]]))
    result = sketch.result()
    assert (result.count, result.invalid) == (2, 2)
    assert result.mean.tolist() == [3.0, 4.0]
    assert np.isfinite(result.quantiles).all()


BAD = TaskSpec(
    "bad",
    (
        FieldSpec("x", "observation", "continuous", "float32", (2,)),
        FieldSpec("gear", "observation", "discrete", "int64", (), (1.0,), (4.0,)),
        FieldSpec("switch", "observation", "discrete", "float32", (), values=2),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)


def bad_episodes():
    for number in range(12):
        x, gear, switch, reward = np.zeros((5, 2), "f4"), np.full(5, 4), np.ones(5, "f4"), np.ones(5, "f4")
        if number in (3, 7):
            x[2:4, 1] = np.nan
        if number == 5:
            gear[1], gear[2], switch[0], switch[4] = 0, 5, 0.5, np.inf
        if number == 6:
            reward[0] = -np.inf
        yield Episode(f"e{number:02d}", "bad", {"x": x, "gear": gear, "switch": switch, "reward": reward}, 5)


def test_bad_values_are_counted_with_their_episodes_whatever_the_grouping(tmp_path):
    whole = gathered(BAD, bad_episodes())
    merged = Statistics()
    for episode in bad_episodes():
        merged.merge(gathered(BAD, [episode]))
    merged.write(tmp_path / "statistics.parquet")
    for made in (whole, merged, Statistics.read(tmp_path / "statistics.parquet")):
        found = made.result(["bad"])["bad"]
        bad = {n: (s.invalid, s.beyond, s.bad_episodes, s.first_bad) for n, s in found.items()}
        assert bad == {
            "x": (4, 0, 2, ("e03", "e07")),
            "gear": (0, 2, 1, ("e05",)),
            "switch": (1, 1, 1, ("e05",)),
            "reward": (1, 0, 1, ("e06",)),
            RETURN_TO_GO: (0, 0, 0, ()),
        }
    assert whole.result(["bad"])["bad"]["switch"].bad() == (
        "1 step with NaN or an infinity and 1 step beyond the declared range in 1 episode"
    )


def test_a_negative_sum_of_squares_is_refused():
    sketch = Sketch((2,))
    sketch.add(np.array([[1.0, 2.0], [3.0, 4.0]]))
    sketch.check()
    sketch.square = -sketch.square
    with pytest.raises(DataError, match="negative sum of squares"):
        sketch.check()


@pytest.mark.filterwarnings("error")
def test_a_signalling_nan_of_damaged_data_is_counted_without_a_warning():
    x, reward = np.zeros((3, 2), "f4"), np.ones(3, "f4")
    for values in (x, reward):
        values.view(np.uint32).reshape(-1)[0] = 0x7F800001
    fields = {"x": x, "gear": np.full(3, 4), "switch": np.ones(3, "f4"), "reward": reward}
    found = gathered(BAD, [Episode("e", "bad", fields, 3)]).result(["bad"])["bad"]
    assert (found["x"].invalid, found["reward"].invalid) == (1, 1)


def test_counts_that_an_earlier_version_did_not_write_are_unknown(tmp_path):
    import pyarrow.parquet as pq

    one = gathered(BAD, bad_episodes())
    one.write(tmp_path / "new.parquet")
    old = pq.read_table(tmp_path / "new.parquet").drop_columns(["beyond", "bad_episodes", "first_bad", "invalid"])
    pq.write_table(old, tmp_path / "old.parquet")
    again = Statistics.read(tmp_path / "old.parquet")
    again.merge(one)
    found = again.result(["bad"])["bad"]["x"]
    assert (found.invalid, found.beyond, found.bad_episodes) == (None, None, None)
    document = {k: v for k, v in found.to_dict().items() if k not in ("beyond", "bad_episodes", "first_bad", "invalid")}
    assert FieldStatistics.from_dict(document).invalid is None
    assert pooled([found, one.result(["bad"])["bad"]["x"]]).invalid is None


def test_wide_fields_are_pooled():
    task = TaskSpec("wide", (FieldSpec("x", "observation", "continuous", "float32", (600,)),))
    rng = np.random.default_rng(0)
    episode = random_episode(task, "e", 30, rng)
    s = gathered(task, [episode]).result(["wide"])["wide"]["x"]
    assert s.mean.shape == ()
    assert s.count == 30 * 600
    assert s.mean == pytest.approx(episode.fields["x"].mean(dtype=np.float64))


def test_the_size_of_the_buffer_does_not_matter(episodes, monkeypatch):
    large = gathered(RICH, episodes).result(["rich"])["rich"]
    monkeypatch.setattr(statistics, "_BUFFER", 1)
    for name, s in gathered(RICH, episodes).result(["rich"])["rich"].items():
        assert np.array_equal(s.quantiles, large[name].quantiles)
        assert np.allclose(s.mean, large[name].mean, rtol=1e-12, atol=1e-15)


def test_statistics_survive_files_and_json(tmp_path, episodes):
    rng = np.random.default_rng(1)
    both = gathered(RICH, episodes)
    both.merge(gathered(SMALL, [random_episode(SMALL, "s", 9, rng)]))
    both.write(tmp_path / "a.parquet")
    again = Statistics.read(tmp_path / "a.parquet")
    again.write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    for fields in again.result(["rich", "small"]).values():
        for s in fields.values():
            t = FieldStatistics.from_dict(s.to_dict())
            assert all(np.array_equal(getattr(t, n), getattr(s, n)) for n in s.to_dict())
