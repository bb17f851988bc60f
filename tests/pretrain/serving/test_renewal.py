"""A server that follows what is published: an episode keeps its weights, and the next one has the newest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting import acting_fixtures as acting
from tests.pretrain.serving.serving_fixtures import ARM, asked, client, serving
from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.follow.follower import Follower
from tiphys.pretrain.follow.weights import Weights
from tiphys.pretrain.follow.writer import How
from tiphys.pretrain.publish import publish
from tiphys.pretrain.serving import wire
from tiphys.pretrain.serving.renewal import Renewal, with_weights
from tiphys.pretrain.serving.served import Served, Settings


def published(tmp_path: Path, seed: int) -> Path:
    """Publish a policy. Returns its folder."""
    objectives = fixtures.make([fixtures.ARM], "bc", context=80, scheme="compact")
    folder = acting.folder(tmp_path / f"seed{seed}", objectives, seed)
    publish(folder, str(tmp_path / "place"), how=How())
    return folder


def first_action(folder: Path) -> np.ndarray:
    policy = Policy.load(folder)
    policy.reset("arm")
    return np.asarray(policy.act(ARM))


def test_episodes_keep_their_weights_and_new_ones_have_the_newest(tmp_path: Path) -> None:
    folders = [published(tmp_path, 0)]
    with Follower(str(tmp_path / "place")) as follower:
        of = Served.load(follower.fetch(), Settings(sessions=4))
        with serving(of) as server, client(server) as one:
            renewal = Renewal(server, follower)
            assert not renewal.look()
            assert wire.decode(one.recv(30))["digest"] == of.digest
            np.testing.assert_allclose(asked(one, observation=ARM)["actions"][0], first_action(folders[0]), atol=1e-5)
            own = Policy.load(folders[0])
            own.reset("arm")
            own.act(ARM)
            folders.append(published(tmp_path, 1))
            assert renewal.look()
            np.testing.assert_allclose(asked(one, observation=ARM)["actions"][0], own.act(ARM), atol=1e-5)
            with client(server) as two:
                assert wire.decode(two.recv(30))["digest"] != of.digest
                newest = asked(two, observation=ARM)["actions"][0]
                np.testing.assert_allclose(newest, first_action(folders[1]), atol=1e-5)
            asked(one, endpoint="reset")
            np.testing.assert_allclose(asked(one, observation=ARM)["actions"][0], newest, atol=1e-5)
            assert not np.allclose(newest, first_action(folders[0]), atol=1e-3)


def test_newer_weights_leave_the_model_that_is_served_as_it_was(tmp_path: Path) -> None:
    policies = [Policy.load(published(tmp_path, seed)) for seed in (0, 1)]
    old, new = (policy.model for policy in policies)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    made = with_weights(old, Weights.load(tmp_path / "seed1"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    wanted = new.state_dict()
    assert wanted.keys() == before.keys()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
        assert tensor.data_ptr() != old.state_dict()[name].data_ptr()


def test_models_that_are_still_in_use_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiphys.pretrain.serving.renewal._MOST_MODELS", 2)
    published(tmp_path, 0)
    with Follower(str(tmp_path / "place")) as follower:
        of = Served.load(follower.fetch(), Settings(sessions=4))
        with serving(of) as server, client(server) as one:
            del of
            renewal = Renewal(server, follower)
            one.recv(30)
            asked(one, observation=ARM)
            published(tmp_path, 1)
            assert renewal.look()
            published(tmp_path, 2)
            with pytest.raises(DataError, match=r"2 models are in memory\), so step 0 waits"):
                renewal.look()
            asked(one, endpoint="reset")
            assert renewal.look()
            assert not renewal.look()
