"""Philox: the published test vectors, and the properties that the plan relies on."""

import numpy as np
import pytest

from tiphys.dataio import philox
from tiphys.dataio.philox import generator, uniform32, uniform53, words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123 1.14: philox4x32, 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_test_vectors(counter, key, expected):
    got = philox.philox(tuple(np.array([c], np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in got) == expected


def test_words_are_the_same_alone_and_in_arrays():
    step, row, slot = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(7), np.arange(3)))
    together = words(9, step, row, slot)
    for i in range(len(step)):
        alone = words(9, step[i], row[i], slot[i])
        assert [int(w) for w in alone] == [int(w[i]) for w in together]


def test_every_argument_changes_the_words():
    base = {"seed": 1, "step": 2, "row": 3, "slot": 4, "attempt": 5, "purpose": 6}
    changes = [
        base,
        *({**base, k: v + 1} for k, v in base.items()),
        {**base, "step": 2 + 2**32},
        {**base, "seed": 1 + 2**32},
    ]
    drawn = {tuple(int(w) for w in words(**c)) for c in changes}
    assert len(drawn) == len(changes)


def test_uniform_numbers_stay_in_their_interval():
    edge = np.array([0, 2**32 - 1], np.uint64)
    assert (uniform32(edge) > 0).all()
    assert (uniform32(edge) < 1).all()
    assert uniform53(edge, edge)[0] == 0
    assert uniform53(edge, edge)[1] < 1
    many = uniform53(*words(0, np.arange(40000))[:2])
    assert abs(many.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(many))


def test_generators_of_different_purposes_and_slots_differ():
    drawn = [generator(7, 1, 2, purpose, slot).random(4) for purpose in (philox.HIDE, philox.DEPTH) for slot in (0, 1)]
    assert len({tuple(d) for d in drawn}) == 4
    assert (generator(7, 1, 2, philox.HIDE).random(4) == drawn[0]).all()
