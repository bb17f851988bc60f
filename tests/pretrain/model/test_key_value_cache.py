"""A key-value cache: rows of any length, read in any pieces, in any order, give the hidden states of one pass."""

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.key_value_cache import KeyValueCache
from tiphys.pretrain.model.transformer import DecisionModel


@pytest.fixture(scope="module")
def model():
    return DecisionModel(make_config(), seed=2).eval()


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_pieces_of_any_length_equal_one_pass(model, seed):
    rows, length, rng = 6, 60, np.random.default_rng(seed)
    batch = make_batch(rows, length, seed=seed, windows=(length, length + 1), bidirectional=False)
    full = unpack(model(to_tensors(batch)).hidden, to_tensors(batch), rows, length)
    cache, place = KeyValueCache(rows, length), rng.permutation(rows)  # row i of the batch is row place[i] of the cache
    done = np.zeros(rows, int)
    while (done < length).any():
        if rng.random() < 0.2:  # forget the end of a row
            done[rng.integers(rows)] //= 2
            cache.lengths[place] = done
        some = np.flatnonzero((done < length) & (rng.random(rows) < 0.7))
        new = np.minimum(rng.choice([1, 2, 5, 20, 40], len(some)), length - done[some])
        if not len(some):
            continue
        part = batch.part(some, done[some], done[some] + new)
        inputs = to_tensors(part)
        hidden = unpack(model(inputs, cache=cache.extend(new, place[some])).hidden, inputs, len(some), part.length)
        for row, here in zip(some, hidden, strict=True):
            there = here[here.abs().sum(-1) > 0]
            wanted = full[row, done[row] : done[row] + len(there)]
            torch.testing.assert_close(there, wanted, rtol=1e-4, atol=1e-5)
        done[some] += new
        assert (cache.lengths[place] == done).all()


@torch.no_grad()
def test_tokens_of_one_row_are_copied_to_others(model):
    batch = make_batch(1, 30, seed=3, windows=(30, 31), bidirectional=False)
    full = model(to_tensors(batch)).hidden
    cache = KeyValueCache(4, 30)
    model(to_tensors(batch.part(np.array([0]), 0, 20)), cache=cache.extend(np.array([20]), np.array([2])))
    cache.paste(np.array([0, 3]), cache.copy_row(2, 0, 20), 0)
    for row in (0, 2, 3):
        found = model(
            to_tensors(batch.part(np.array([0]), 20, 30)), cache=cache.extend(np.array([10]), np.array([row]))
        )
        torch.testing.assert_close(found.hidden, full[20:], rtol=1e-4, atol=1e-5)


def test_misuse_is_refused(model):
    batch = make_batch(2, 30, seed=3, windows=(30, 31), bidirectional=False)
    cache = KeyValueCache(2, 20)
    with pytest.raises(ValueError, match="30 tokens, but the cache holds 20"):
        cache.extend(np.array([30, 30]))
    with pytest.raises(ValueError, match="one window each"):
        model(to_tensors(batch), cache=cache.extend(np.array([9, 20])))
