"""Texts are swapped within a row, never for an equal one, and nothing but the match is learned from a swapped window."""

import numpy as np
import pytest

from tests.pretrain.token_fixtures import GRID, make, window
from tiphys.pretrain.tokens.batch import TEXT, TokenBatch
from tiphys.pretrain.tokens.swap import swaps


@pytest.mark.parametrize("kinds", [1, 2, 3, 20])
def test_texts_change_places_within_a_row_and_never_with_an_equal_one(kinds):
    random = np.random.default_rng(kinds)
    swapped, possible = 0, 0
    for step in range(40):
        row_of = np.sort(random.integers(0, 4, 30))
        texts = [bytes([k]) for k in random.integers(0, kinds, 30).tolist()]
        given = swaps(texts, row_of, 0.5, (7, step, row_of, np.arange(30)))
        moved = given != np.arange(30)
        assert sorted(given.tolist()) == list(range(30))
        assert (row_of[given] == row_of).all()
        assert all(texts[i] != texts[g] for i, g in enumerate(given.tolist()) if g != i)
        swapped, possible = swapped + moved.sum(), possible + 30
    expected = {1: 0.0, 2: 0.3, 3: 0.4, 20: 0.5}[kinds]  # fewer if there are not enough different texts
    assert swapped / possible == pytest.approx(expected, abs=0.12)


def test_a_row_swaps_the_same_whatever_rows_are_with_it():
    texts, row_of, slot = [bytes([k % 5]) for k in range(20)], np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    both = swaps(texts, row_of, 0.5, (1, 2, row_of + 8, slot))
    alone = swaps(texts[10:], np.zeros(10, int), 0.5, (1, 2, np.full(10, 9), slot[10:]))
    assert (both[10:] - 10 == alone).all()


def test_only_the_match_is_learned_from_a_swapped_window():
    objectives, random = make([GRID], "mia", context=420, window=4), np.random.default_rng(0)
    windows = [window(objectives, "grid", 3, random, start=3 + i) for i in range(6)]
    own = ["a ball", "a ball", "the key now", "a box of it", "a ball", "the key now"]
    for w, text in zip(windows, own, strict=True):
        w.fields["observation.mission"] = text
    no, yes = objectives.vocabulary.answers
    seen = set()
    for step in range(8):
        batch = TokenBatch.from_arrays(objectives.make_batch(step, np.arange(1), [windows], seed=0))
        assert batch.real_tokens == 6 * (3 * 3 + 1) + sum(len(objectives.text.encode([t])[0]) for t in own)
        for number, text in enumerate(own, 1):
            mine = batch.segment[0] == number
            shown = objectives.text.decode(batch.tokens[0, mine & (batch.modality[0] == TEXT)])
            assert batch.target[0, mine][-1] == (yes if shown == text else no)
            assert (batch.target[0, mine][:-1] >= 0).sum() == (3 if shown == text else 0)
            seen.add(shown == text)
    assert seen == {True, False}
