"""Bootstrapped transitions: what is kept, what it is made of, and that no held-out episode is used."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.acting.acting_fixtures import folder, model
from tests.pretrain.token_fixtures import ARM, make, values
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli
from tiphys.launch.statuses import Status
from tiphys.pretrain import bootstrap as module
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.bootstrap import Drawing, bootstrap
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.tokens.clips import SPEC
from tiphys.pretrain.tokens.sequence import placements

HOW = Drawing(keep=0.25, draws=4, windows=2, validation=0.4)


def of():
    return make([ARM], "boot", context=80)


@pytest.fixture(scope="module")
def policy():
    objectives = of()
    return Policy(model(objectives), Processor.from_dict(objectives.processor()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes of 1 to 12 steps, with the observation after the last action."""
    rng, path = np.random.default_rng(0), str(tmp_path_factory.mktemp("bootstrap") / "data")
    with ShardWriter(path, [ARM]) as writer:
        for number, steps in enumerate([1, 2, 3, *[12] * 17]):
            rows = {f.name: values(f, steps + (f.role == "observation"), rng) for f in ARM.fields}
            writer.write(Episode(f"e{number}", "arm", rows, steps))
    return path


@pytest.fixture(scope="module")
def made(policy, data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("bootstrap") / "drawn")
    return bootstrap(policy, data, out, HOW), EpisodeIndex.open(out)


def parents(index, data):
    """Each clip, its `info`, and the episode that it was cut from."""
    source = EpisodeIndex.open(data)
    for number in range(index.episodes):
        clip = read_episode(index, number)
        whole = read_episode(source, source.ids.index(clip.info["parent"]))
        yield clip, clip.info, whole


def test_a_clip_is_a_window_whose_last_observation_and_action_are_drawn(made, data):
    found, index = made
    assert index.episodes == found.kept == max(1, found.drawn // 4)
    for clip, info, whole in parents(index, data):
        first = int(clip.fields[SPEC.name][0])
        assert clip.steps == info["step"] + 1 - first >= 2
        assert clip.agent == "bootstrap"
        for name in ("observation", "action", "reward"):
            kept = len(clip.fields[name]) - (name != "reward")
            np.testing.assert_array_equal(clip.fields[name][:kept], whole.fields[name][first:][:kept])
        for name in ("observation", "action"):
            assert (clip.fields[name][-1] != whole.fields[name][info["step"]]).any()
        rest = whole.fields["reward"][info["step"] + 1 :].astype(np.float64)
        assert clip.fields[SPEC.name][1:].tolist() == pytest.approx(
            [whole.steps, float(rest @ 0.99 ** np.arange(len(rest))), 0.99], abs=1e-5
        )


def test_no_episode_that_is_held_out_is_used_and_no_clip_is_held_out(made, data):
    found, index = made
    held = EpisodeIndex.open(data).held_out(HOW.validation)
    ids = np.array(EpisodeIndex.open(data).ids)[held]
    assert found.held_out == held.sum() > 0
    assert found.short == 1 - held[0]
    assert not {info["parent"] for _, info, _ in parents(index, data)} & set(ids)
    assert not index.held_out(HOW.validation).any()
    for parent in ("a", "b", "c" * 500):
        for share in (0.1, 0.3, 0.5):
            threshold = share * 2.0**64
            assert module.hash_id(parent) < threshold or module.hash_id(module._id(parent, 7, 1)) >= threshold


def test_the_confidence_is_the_mean_log_probability_of_what_was_drawn(made, policy, data):
    """Computed anew in one pass over the whole clip."""
    _, index = made
    layout = policy.processor.layouts["it"]["arm"].acting()
    drawn = []
    for clip, info, _ in parents(index, data):
        first = int(clip.fields[SPEC.name][0])
        window = module._window(layout, replace(clip, fields={**clip.fields}), 0, clip.steps)
        window.start, window.step = first, window.step + first
        batch = policy.processor.encode(layout, [[window]])
        with torch.inference_mode():
            logits = policy.model.logits(policy.model(to_tensors(batch)).hidden)
        sure = []
        for one in placements([window], [{0: layout}], policy.processor.vocabulary, policy.processor.text):
            if one.step == clip.steps - 1 and one.element.role in ("observation", "action"):
                for cell, (low, high) in enumerate(one.element.codec.choices(), start=one.first):
                    chance = logits[cell - 1, low:high].double().log_softmax(-1)
                    sure.append(float(chance[batch.tokens[0, cell] - low]))
        assert np.mean(sure) == pytest.approx(info["confidence"], abs=1e-4)
        drawn.append(info["confidence"])
    assert (min(drawn), max(drawn)) == made[0].confidence


def test_the_highest_confidence_is_kept():
    assert module.best(np.array([-3.0, -1.0, -2.0, -4.0]), 0.5).tolist() == [1, 2]
    assert module.best(np.array([-3.0, -1.0]), 0.0).tolist() == [1]


def test_the_same_seed_draws_the_same(made, policy, data, tmp_path):
    again = bootstrap(policy, data, str(tmp_path / "again"), HOW)
    assert again == made[0]
    assert EpisodeIndex.open(str(tmp_path / "again")).fingerprint == made[1].fingerprint
    other = bootstrap(policy, data, str(tmp_path / "other"), replace(HOW, seed=1))
    assert other.confidence != again.confidence


def test_a_run_learns_from_clips_like_from_the_entry_that_they_are_like(made, data):
    from tests.pretrain.token_fixtures import Data, Entry, Model, Objective, Recipe, Run
    from tiphys.pretrain.objectives import Objectives

    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset=data, objective="it")]),
        objectives={"it": Objective(paradigm="boot", context=80)},
        model=Model(text_vocabulary=300),
        run=Run(dir="unused"),
    )
    alone = Objectives(recipe, [EpisodeIndex.open(data)])
    both = alone.joined([(made[1], 0)])
    assert both.vocabulary == alone.vocabulary
    assert SPEC.name in both.needs(1).fields
    assert SPEC.name not in both.needs(0).fields
    assert [both.layouts[i][0].clipped for i in (0, 1)] == [False, True]
    assert both.lengths(1).units.tolist() == np.asarray(made[1].steps).tolist()
    fresh = Objectives(
        replace(
            recipe, data=replace(recipe.data, mixture=[Entry(dataset="drawn", objective="it"), *recipe.data.mixture])
        ),
        [made[1], EpisodeIndex.open(data)],
    )
    assert [t.name for t in fresh.tasks[0].fields] == [t.name for t in alone.tasks[0].fields]
    assert "clipped" not in json.dumps(fresh.processor())


def test_the_command_says_what_it_kept_and_needs_the_held_out_share(data, tmp_path, capsys):
    policy = str(folder(tmp_path / "policy", of()))
    assert cli.main(["bootstrap", policy, data, str(tmp_path / "out")]) == Status.REFUSED
    assert "give --validation SHARE" in capsys.readouterr().err
    line = ["bootstrap", policy, data, str(tmp_path / "out"), "--validation", "0.4", "--keep", "0.5", "--draws", "2"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "kept 1" in said
    assert "tiphys mixture RUN add" in said


def test_what_cannot_be_drawn_is_refused(policy, data, made, tmp_path):
    with pytest.raises(DataError, match="clips that a policy has drawn"):
        bootstrap(policy, made[1].url, str(tmp_path / "a"), HOW)
    with pytest.raises(DataError, match="no episode of at least two steps that is not held out"):
        bootstrap(policy, data, str(tmp_path / "a"), replace(HOW, validation=1.0))
    with pytest.raises(DataError, match="task 'leg': the policy was not trained on it"):
        module.drawing_layout(policy, replace(ARM, name="leg"))
    for paradigm in ("bc", "dt", "mgdt", "gato"):
        objectives = make([ARM], paradigm, context=80)
        other = Policy(model(objectives), Processor.from_dict(objectives.processor()))
        with pytest.raises(DataError, match=r"cannot draw its steps.*`boot`"):
            module.drawing_layout(other, ARM)
    one = make([ARM], "boot", context=80, window=1)
    with pytest.raises(DataError, match="windows have one step"):
        module.drawing_layout(Policy(model(one), Processor.from_dict(one.processor())), ARM)
    with pytest.raises(DataError, match="keep"):
        Drawing(keep=1.5)
