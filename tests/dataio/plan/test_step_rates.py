"""Every step of a task is equally likely: χ² tests over steps, episodes and instructions, with a stated error rate.

Each test has a fixed seed and fails if p < 1e-4. The steps of a window come together, so counts of steps are not independent.
Therefore counts are taken in blocks of planning steps, and χ² uses the measured variance between blocks (Rao and Scott 1981).
"""

import numpy as np
import pytest
from scipy.stats import chi2

from tests.dataio.plan.plans import columns, entry, mixture, plan

WORST = 1e-4
RANDOM = np.random.default_rng(5)
CASES = {
    "lognormal": {"window": 20, "per_unit": (10,)},
    "short context": {"window": 1000, "per_unit": (10,), "context": 200},
    "very unequal": {"window": 50, "per_unit": (4,), "length": np.concatenate([np.full(1500, 4), np.full(60, 400)])},
    "instructions": {"window": 1000, "per_unit": (5,), "context": 128, "fixed": 24, "length": RANDOM.integers(3, 60, 1500)},
    "windows longer than episodes": {
        "window": 1000, "per_unit": (3,), "context": 128, "fixed": 24, "length": RANDOM.integers(2, 12, 3000)
    },
    "prompts": {
        "window": 1000, "per_unit": (5,), "context": 128, "fixed": 24, "length": RANDOM.integers(3, 60, 3000),
        "prompt": 0.5, "prompt_units": 8,
    },
    "priorities": {"window": 20, "per_unit": (10,), "priority": RANDOM.integers(0, 4, 2000).astype(np.float32)},
}  # fmt: skip


def rates(e, **options):
    """[blocks, steps]: how often each step of an entry was delivered in each block of planning steps."""
    p = plan([e], rows=64, **options)
    base = np.concatenate([[0], np.cumsum(e.lengths.units)])
    out = []
    for block in range(20):
        drawn = columns(p, range(block * 60, block * 60 + 60))
        mine = ~drawn["prompt"]
        first = base[drawn["episode"][mine]] + drawn["start"][mine]
        seen = np.zeros(base[-1] + 1)
        np.add.at(seen, first, 1)
        np.add.at(seen, first + drawn["units"][mine], -1)
        out.append(np.cumsum(seen)[:-1])
    return np.array(out)


def p_value(counts, groups, weights):
    """p-value of χ² over groups of steps; the variance of each group is measured between blocks."""
    number = groups.max() + 1
    by_group = np.array([np.bincount(groups, c, number) for c in counts])
    share = np.bincount(groups, weights, number)
    expected = by_group.sum(1, keepdims=True) * share / share.sum()
    difference = (by_group - expected).sum(0)
    variance = (by_group - expected).var(0, ddof=1) * len(counts)
    degrees = number - 1
    statistic = (difference**2 / variance).sum() * (degrees / number)
    # Each term is F(1, 19) with the mean 19/17. This correction keeps the error rate of the test low.
    return chi2.sf(statistic * 17 / 19, degrees)


@pytest.mark.parametrize("buckets", [1, 0])
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_equally_likely(case, buckets):
    options = dict(CASES[case])
    budget = options.get("context", 1024)
    e = entry("a", 2000, 1, **options)
    counts = rates(e, budget=max(budget, 128), buckets=buckets)
    length = np.repeat(e.lengths.units, e.lengths.units)
    place = np.concatenate([np.arange(t) for t in e.lengths.units])
    weights = np.ones(len(length)) if e.priority is None else np.repeat(e.priority, e.lengths.units)
    fixed = np.repeat(e.lengths.fixed, e.lengths.units)

    def ranks(values, most):
        return np.minimum((np.argsort(np.argsort(values, kind="stable")) * most) // len(values), most - 1)

    near_end = np.where(place < 3, place, np.where(length - place <= 3, 2 + length - place, 6))
    assert p_value(counts, near_end, weights) > WORST, "first and last steps"
    assert p_value(counts, ranks(length, 8), weights) > WORST, "short and long episodes"
    assert p_value(counts, ranks(fixed, 8), weights) > WORST, "short and long instructions"
    assert p_value(counts, ranks(np.arange(len(length)), 16), weights) > WORST, "anything else"
    assert (counts.sum(0)[weights > 0] > 0).mean() > 0.999, "coverage"


def test_the_test_has_power():
    """`starts: windows` fails: there the first and last steps are rare."""
    e = entry("a", 2000, 1, **CASES["lognormal"])
    counts = rates(e, starts="windows")
    place = np.concatenate([np.arange(t) for t in e.lengths.units])
    assert p_value(counts, np.minimum(place, 6), np.ones(len(place))) < 1e-12


def test_calculated_rates_with_equally_likely_windows():
    e = entry("a", 400, 1, window=20, per_unit=(10,))
    counts = rates(e, starts="windows", buckets=1, budget=200).sum(0)
    low, high = plan([e], starts="windows", buckets=1, budget=200).describe()["step_rates"]["a"][0]
    first = np.concatenate([[0], np.cumsum(e.lengths.units)])[:-1]
    long = e.lengths.units > 60
    assert counts[first[long]].mean() / counts.mean() == pytest.approx(low, rel=0.1)
    middle = first[long] + e.lengths.units[long] // 2
    assert counts[middle].mean() / counts.mean() == pytest.approx(high, rel=0.1)


@pytest.mark.parametrize(
    ("seed", "steps", "tolerance"),
    [
        *((seed, 400, 0.02) for seed in range(3)),
        *(pytest.param(seed, 4000, 0.01, marks=pytest.mark.long) for seed in range(3, 15)),
    ],
)
def test_shares_and_fill_of_random_mixtures(seed, steps, tolerance):
    """Delivered shares of tokens are those of the weights, and the calculated fill is within 1 % of the measured one."""
    random = np.random.default_rng(seed)
    entries = [
        entry(
            name, int(random.integers(300, 4000)), int(random.integers(1, 4)), float(random.uniform(0.2, 1.0)),
            window=int(random.integers(1, 60)), per_unit=random.integers(1, 60, 3), fixed=int(random.integers(0, 20)),
            prompt=float(random.choice([0.0, 0.3])), prompt_units=int(random.integers(1, 6)), seed=i,
            steps=int(random.integers(3, 120)),
        )
        for i, name in enumerate("abc")
    ]  # fmt: skip
    p = plan(entries, weight_unit="tokens", rows=64, budget=768)
    tokens = np.zeros(len(entries))
    for begin in range(0, steps, 400):
        drawn = columns(p, range(begin, begin + 400))
        tokens += np.bincount(drawn["entry"], drawn["tokens"] * ~drawn["prompt"], len(entries))
    weight = sum(e.weight for e in entries)
    for i, e in enumerate(entries):
        assert tokens[i] / tokens.sum() == pytest.approx(e.weight / weight, rel=tolerance), e.name
    assert p.describe()["fill"] == pytest.approx(tokens.sum() / (steps * 64 * 768), rel=0.01)


@pytest.mark.parametrize("window", [20, 200])
def test_batches_vary_no_more_than_with_one_bucket(window):
    """Variance of the batch mean of a random value of each episode, divided by that of a plan with one bucket."""
    random = np.random.default_rng(1)
    top = (random.random(30000) < 0.5).astype(np.float32)
    entries = [
        entry("a", 30000, 1, 0.7, window=window, per_unit=(10,), priority=top, steps=100),
        entry("b", 6000, 2, 0.3, window=window, per_unit=(10,), seed=1, steps=100),
    ]
    p = plan(entries, rows=64, budget=window * 10)
    assert p.buckets > 1
    q = plan(entries, rows=64, budget=window * 10, buckets=1)
    value = random.standard_normal(36000)
    found = []
    for some in (p, q):
        drawn = columns(some, range(1500))
        each = value[drawn["episode"] + 30000 * drawn["entry"]] * drawn["tokens"]
        found.append((np.bincount(drawn["step"], each) / np.bincount(drawn["step"], drawn["tokens"])).var())
    # The quotient of two variances of 1,500 batches has a standard deviation of 0.052.
    assert found[0] / found[1] < 1.02 + 4 * 0.052


def test_no_rows_give_no_windows():
    """If there are more processes than rows, some have no rows."""
    for replacement in (True, False):
        p = plan(mixture(), replacement=replacement)
        assert len(p.windows(3, []).row) == 0
        parts = p.many([0, 1, 2], [np.array([], int), np.array([5]), np.array([], int)])
        assert [len(set(x.row.tolist())) for x in parts] == [0, 1, 0]
