import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.vocabulary import SPECIALS, EmbedderSpec, Vocabulary


@settings(deadline=None, max_examples=20)
@given(text=st.integers(256, 40000), continuous=st.integers(1024, 4096), discrete=st.integers(1024, 4096))
def test_ranges_are_disjoint_and_cover_every_id(text, continuous, discrete):
    v = Vocabulary.build(text, continuous=continuous, discrete=discrete)
    owner = [name for name, low, high in v.ranges for _ in range(low, high)]
    assert len(owner) == v.size
    assert v.range("text") == (0, text)
    for token in (0, text - 1, text, text + continuous, v.size - 1):
        assert v.name_of(token) == owner[token]
    specials = [getattr(v, name) for name in SPECIALS]
    assert len(set(specials)) == len(SPECIALS)
    assert {owner[s] for s in specials} == {"special"}


def test_json_round_trip():
    v = Vocabulary.build(
        300,
        embedders={"patch:3": EmbedderSpec("patch", (16, 16, 3)), "grid:g:7x7x3": EmbedderSpec("grid", (7, 7, 3), 11)},
        regressions={"action:6": 6},
        tasks=["a", "b"],
        text_tokenizer="{}",
    )
    again = Vocabulary.from_dict(json.loads(json.dumps(v.to_dict())))
    assert again == v
    assert again.embedders["patch:3"].shape == (16, 16, 3)


def test_ranges_are_numbered_from_one_for_the_softmax():
    v = Vocabulary.build(300)
    for i, (name, _, _) in enumerate(v.ranges):
        assert v.softmax(name) == i + 1


def test_ranges_that_overlap_or_leave_a_gap_are_refused():
    v = Vocabulary.build(300).to_dict()
    with pytest.raises(DataError, match="the range before it ends"):
        Vocabulary.from_dict({**v, "ranges": [("text", 0, 300), ("continuous", 299, v["size"])]})
    with pytest.raises(DataError, match="but its size is"):
        Vocabulary.from_dict({**v, "size": v["size"] + 1})


def test_two_tasks_share_an_embedder_or_the_error_names_it():
    assert EmbedderSpec("grid", (7, 7, 3), 5).merged(EmbedderSpec("grid", (7, 7, 3), 11), "g").values == 11
    with pytest.raises(DataError, match="'g'"):
        EmbedderSpec("grid", (7, 7, 3), 5).merged(EmbedderSpec("grid", (5, 7, 3), 5), "g")
