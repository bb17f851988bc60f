import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, CAMERA, GRID, make, window
from tiphys.pretrain.tokens.batch import TokenBatch


@pytest.fixture(scope="module")
def batch():
    o = make([GRID, ARM, CAMERA], "bc", context=120, discretise="no")
    rng = np.random.default_rng(0)
    names = ("grid", "arm", "camera")
    rows = [[window(o, names[(r + k) % 3], 2, rng) for k in range(3)] for r in range(5)]
    return TokenBatch.from_arrays(o.make_batch(3, np.arange(5) * 7, rows, seed=0))


def equal(one, other):
    a, b = one.to_arrays(), other.to_arrays()
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def test_arrays_round_trip(batch):
    assert {"patch:3", "vector:action:2", "vector:action.arm:2"} <= batch.embedded.keys()
    equal(TokenBatch.from_arrays(batch.to_arrays()), batch)


def test_select_and_concatenate_are_inverse(batch):
    equal(TokenBatch.concatenate([batch.select(slice(0, 2)), batch.select(slice(2, 5))]), batch)
    equal(TokenBatch.concatenate([batch.select(slice(i, i + 1)) for i in range(5)]), batch)


def test_fillers_count_nothing(batch):
    full = batch.fill(8)
    assert full.rows == 8
    assert full.row[5:].tolist() == [-1] * 3
    assert (full.targets, full.real_tokens) == (batch.targets, batch.real_tokens)
    equal(full.select(slice(0, 5)), batch)
    assert TokenBatch.empty(1, 16, 2).real_tokens == 0
    with pytest.raises(ValueError, match="5 rows cannot be filled up to 3"):
        batch.fill(3)
