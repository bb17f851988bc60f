"""Statistics of discounted returns are those of the data, and quantile codes of returns follow from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ideas.toys import write
from tests.pretrain.token_fixtures import ARM
from tiphys.dataio import return_statistics as module
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.return_statistics import discounted_sums, return_statistics
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens import paradigms
from tiphys.pretrain.tokens.clips import AFTER, SPEC
from tiphys.pretrain.tokens.codecs import Quantiles
from tiphys.pretrain.tokens.paradigms import ACTION, OBSERVATION, RETURN, Paradigm, Part
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Objective


def episodes(seed: int, sparse: bool = False) -> list[Episode]:
    """Episodes with normal rewards, or with a reward in 3 % of the steps."""
    rng, made = np.random.default_rng(seed), []
    for number in range(150):
        steps = int(rng.integers(5, 40))
        reward = (rng.random(steps) < 0.001) * 10.0 if sparse else rng.normal(0.3, 1, steps)
        fields = {"observation": rng.normal(size=(steps, 5)), "action": rng.uniform((-2, 0), (2, 10), (steps, 2))}
        fields = {name: value.astype(np.float32) for name, value in (fields | {"reward": reward}).items()}
        made.append(Episode(f"e{number}", "arm", fields, steps))
    return made


def values(made: list[Episode], discount: float) -> np.ndarray:
    """Slowly, term by term."""
    rewards = [np.asarray(e.fields["reward"], np.float64) for e in made]
    return np.array([r[t + 1 :] @ discount ** np.arange(len(r) - t - 1) for r in rewards for t in range(len(r))])


def dataset(folder: Path, made: list[Episode], **changes: Any) -> EpisodeIndex:
    return EpisodeIndex.open(write(folder, [replace(ARM, **changes)], made))


def objectives(indexes: list[EpisodeIndex], paradigm: str = "tt") -> Objectives:
    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset=index.url, objective="it") for index in indexes]),
        objectives={"it": Objective(paradigm=paradigm, context=80)},
        model=Model(text_vocabulary=600),
        run=Run(dir="unused"),
    )
    return Objectives(recipe, indexes)


def codec(found: Objectives) -> Quantiles:
    return next(e.codec for e in found.layouts[0][0].elements if e.role == "return")  # type: ignore[return-value]


def test_they_are_those_of_all_steps_and_are_read_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = episodes(0)
    index, oracle = dataset(tmp_path / "data", made), values(made, 0.9)
    found = return_statistics(index, 0, 0.9)
    assert found.count == len(oracle)
    np.testing.assert_allclose([found.mean, found.min, found.max], [oracle.mean(), oracle.min(), oracle.max()], 1e-5)
    levels = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(found.at(levels)[:, 0], np.quantile(oracle, levels), atol=0.03)
    monkeypatch.setattr(module, "discounted_sums", None)
    again = return_statistics(index, 0, 0.9)
    assert again.to_dict() == found.to_dict()
    np.testing.assert_array_equal(again.at(levels), found.at(levels))
    with pytest.raises(TypeError):  # those of another discount are others
        return_statistics(index, 0, 0.5)
    (kept,) = (tmp_path / "data" / "returns").iterdir()
    kept.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"returns/.*: not statistics of returns discounted by 0.9; delete it"):
        return_statistics(index, 0, 0.9)


def test_the_rest_of_a_clip_counts(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=9)
    np.testing.assert_allclose(
        discounted_sums(whole, 0.9)[2:6], discounted_sums(whole[2:6], 0.9, discounted_sums(whole, 0.9)[5])
    )
    made = episodes(0)[:3]
    for episode in made:
        episode.fields[SPEC.name] = np.array([0, 50, 7.0, 0.99])
    index = dataset(tmp_path / "data", made, fields=(*ARM.fields, SPEC))
    found, without = return_statistics(index, 0, 0.99, AFTER), return_statistics(index, 0, 0.99)
    assert without.mean + 4 < found.mean < without.mean + 7
    assert codec(objectives([index])).edges[0][-1] == pytest.approx(found.max, rel=1e-6)


def test_each_bin_of_a_value_holds_as_many_steps_over_all_datasets(tmp_path: Path) -> None:
    both = [episodes(1), episodes(2)]
    found = codec(objectives([dataset(tmp_path / str(i), made) for i, made in enumerate(both)]))
    of_all = np.concatenate([values(made, 0.99) for made in both])
    shares = np.bincount(found.encode(of_all)[:, 0] - found.first) / len(of_all)
    assert 95 <= len(shares) == len(found.edges[0]) - 1
    alone = int(found.encode(np.zeros(1))[0, 0]) - found.first  # the value of each last step
    assert shares[alone] == pytest.approx((of_all == 0).mean())
    others = np.delete(shares, [alone - 1, alone, alone + 1])
    assert 0.007 < others.min() <= others.max() < 0.013


def test_a_value_that_most_steps_have_is_decoded_exactly(tmp_path: Path) -> None:
    made = episodes(3, sparse=True)
    found, of_all = codec(objectives([dataset(tmp_path / "data", made)])), values(made, 0.99)
    assert (of_all == 0).mean() > 0.9
    again = found.decode(found.encode(of_all))
    assert (again[of_all == 0] == 0).all()
    assert (again[of_all > 0] > 0).all()


def test_a_return_without_its_own_reward_has_quantiles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (Part(OBSERVATION), Part(RETURN, "quantile", weight=1.0, source="after"), Part(ACTION, weight=1.0))
    monkeypatch.setitem(paradigms.PARADIGMS, "it", Paradigm("it", "a test", parts))
    made = episodes(4)
    found, of_all = codec(objectives([dataset(tmp_path / "data", made)], "it")), values(made, 1.0)
    assert found.edges[0][0] == pytest.approx(of_all.min(), rel=1e-5)
    assert found.edges[0][-1] == pytest.approx(of_all.max(), rel=1e-5)
    plain = [replace(e, fields={n: v for n, v in e.fields.items() if n != "reward"}) for e in made]
    with pytest.raises(DataError, match=r"'arm', return: the code 'quantile' needs rewards, and the data have none"):
        objectives([dataset(tmp_path / "plain", plain, fields=ARM.fields[:2])], "it")
