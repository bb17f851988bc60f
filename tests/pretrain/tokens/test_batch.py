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


def test_concatenate_is_the_inverse_of_select(batch):
    equal(TokenBatch.concatenate([batch.select(slice(0, 2)), batch.select(slice(2, 5))]), batch)
    equal(TokenBatch.concatenate([batch.select(slice(i, i + 1)) for i in range(5)]), batch)


@pytest.mark.parametrize(("rows", "start", "stop"), [([0, 2, 3], 7, 31), ([4], 0, 1), ([1, 4], 100, 120), ([], 3, 9)])
def test_a_part_has_the_values_of_its_rows_and_positions(batch, rows, start, stop):
    part = batch.part(np.array(rows, int), start, stop)
    assert (part.rows, part.length) == (len(rows), stop - start)
    for name in TokenBatch.DENSE:
        whole = getattr(batch, name)
        assert np.array_equal(getattr(part, name), whole[rows] if name == "row" else whole[rows, start:stop]), name
    for kind in ("embedded", "regression"):
        for name, values in getattr(batch, kind).items():
            kept = getattr(part, kind)[name]
            row, position = np.divmod(values.index, batch.length)
            cells = [
                (rows.index(r) * part.length + p - start, i)
                for i, (r, p) in enumerate(zip(row.tolist(), position.tolist(), strict=True))
                if r in rows and start <= p < stop
            ]
            assert kept.index.tolist() == [cell for cell, _ in cells]
            assert np.array_equal(kept.value, values.value[[i for _, i in cells]])


def test_a_part_with_all_rows_and_positions_is_the_whole_batch(batch):
    equal(batch.part(np.arange(batch.rows), 0, batch.length), batch)


def test_without_targets_only_the_targets_are_gone(batch):
    bare = batch.without_targets()
    assert (batch.targets > 0, bare.targets) == (True, 0)
    assert not bare.weight.any()
    for name in TokenBatch.DENSE.keys() - {"target", "softmax", "weight"}:
        assert getattr(bare, name) is getattr(batch, name)
    assert bare.embedded is batch.embedded


def test_filler_rows_have_no_tokens_and_no_targets(batch):
    full = batch.fill(8)
    assert full.rows == 8
    assert full.row[5:].tolist() == [-1] * 3
    assert (full.targets, full.real_tokens) == (batch.targets, batch.real_tokens)
    equal(full.select(slice(0, 5)), batch)
    assert TokenBatch.empty(1, 16, 2).real_tokens == 0
    with pytest.raises(ValueError, match="5 rows cannot be filled up to 3"):
        batch.fill(3)
