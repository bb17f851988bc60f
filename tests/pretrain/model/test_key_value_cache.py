"""A key-value cache: rows of any length, read in any pieces, in any order, give the hidden states of one pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import EMBEDDERS, make_batch, make_config
from tiphys.pretrain.model.branches import Branches
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


@torch.no_grad()
def test_branches_share_the_tokens_of_their_row():
    """Rows of different lengths, branches that are chosen anew, one and several tokens at a time."""
    plain = {name: {k: v for k, v in spec.items() if k != "film"} for name, spec in EMBEDDERS.items()}
    model = DecisionModel(make_config(embedders=plain), seed=2).eval()  # plans hold no grids
    batch = make_batch(6, 30, seed=3, windows=(30, 31), bidirectional=False)
    lengths, cache = np.array([12, 20]), KeyValueCache(3, 30)
    rows = np.array([2, 0])
    prefixes = batch.part(np.array([0, 1]), np.zeros(2, int), lengths)
    model(to_tensors(prefixes), cache=cache.extend(lengths, rows))
    branches, before = Branches(cache, rows, 3, 10), cache.bytes
    done: list[list[tuple[int, int, int]]] = [[] for _ in range(6)]  # of each branch: (source row, start, stop)
    for new, chosen in ((1, None), (3, [1, 1, 0, 5, 3, 4]), (2, [0, 2, 3, 3]), (1, None)):
        if chosen is not None:
            branches.select(np.array(chosen))
            done = [list(done[c]) for c in chosen]
        n = len(done)
        start = np.repeat(lengths, n // 2) + branches.length
        part = continuation(batch, start, new)
        out = model(to_tensors(part), cache=branches).hidden.view(n, new, -1)
        branches.grow(new)
        for i in range(n):
            done[i].append((i, int(start[i]), int(start[i]) + new))
            whole = joined(batch, i // (n // 2), int(lengths[i // (n // 2)]), done[i])
            wanted = model(to_tensors(whole)).hidden[-new:]
            torch.testing.assert_close(out[i], wanted, rtol=1e-4, atol=1e-5)
    assert cache.bytes == before


def continuation(batch, start, new):
    """Tokens [start, start + new) of the first rows, side by side."""
    parts = [batch.part(np.array([i]), int(s), int(s) + new) for i, s in enumerate(start)]
    return type(batch).concatenate([replace(p, row=np.array([i])) for i, p in enumerate(parts)])


def joined(batch, prefix, length, pieces):
    """One row: the beginning of a row, and pieces of others behind it."""
    parts = [batch.part(np.array([prefix]), 0, length)]
    parts += [batch.part(np.array([row]), start, stop) for row, start, stop in pieces]
    dense = {n: np.concatenate([getattr(p, n) for p in parts], 1) for n in batch.DENSE if n != "row"}
    total, at, embedded = dense["tokens"].shape[1], 0, {}
    for name in batch.embedded:
        at, index, value, place = 0, [], [], []
        for p in parts:
            index.append(p.embedded[name].index + at)
            value.append(p.embedded[name].value)
            place.append(p.embedded[name].place)
            at += p.length
        embedded[name] = type(batch.embedded[name])(np.concatenate(index), np.concatenate(value), np.concatenate(place))
    assert not total or at in (0, total)
    return replace(batch.part(np.array([0]), 0, 1), **dense, embedded=embedded, regression={}).without_targets()
