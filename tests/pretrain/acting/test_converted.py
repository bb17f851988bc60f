"""Policies of converted data act in the environment of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tests.dataio.convert.convert_sources import LENGTHS, lerobot_v2
from tests.dataio.convert.test_lerobot import TOP, add_feature
from tiphys.dataio import environments
from tiphys.dataio.convert import convert
from tiphys.dataio.index import EpisodeIndex
from tiphys.pretrain.acting.play import play_group
from tiphys.pretrain.acting.policy import Policy

_MAPPING = {
    "environment": acting.CART,
    "text": {},
    "fields": {
        "observation.state": "drop",
        TOP: "drop",
        "action": "drop",
        "instruction": "drop",
        "pushed": {"name": "action", "role": "action", "values": 2},
        "seen": {"name": "observation", "role": "observation"},
    },
}


def test_a_discrete_action_of_a_lerobot_source_plays_cartpole(tmp_path: Path) -> None:
    """LeRobot writes a number as shape [1]; CartPole takes a number."""
    lerobot_v2(tmp_path / "s")
    r = np.random.default_rng(0)
    pushed = [pa.array(r.integers(0, 2, n)) for n in LENGTHS]
    add_feature(tmp_path / "s", "pushed", {"dtype": "int64", "shape": [1], "names": None}, pushed)
    seen = [pa.array(r.normal(size=(n, 4)).tolist(), pa.list_(pa.float32())) for n in LENGTHS]
    add_feature(tmp_path / "s", "seen", {"dtype": "float32", "shape": [4], "names": None}, seen)
    report = convert(str(tmp_path / "s"), str(tmp_path / "out"), mapping=_MAPPING, processes=1)
    assert any(n.startswith("pushed: has shape [1]") for n in report.notes)
    (task,) = EpisodeIndex.open(str(tmp_path / "out")).tasks
    assert task.field("action").shape == ()
    of = fixtures.make([task], "bc", context=60, scheme="compact")
    policy = Policy.load(acting.folder(tmp_path / "policy", of), "cpu")
    (played,) = play_group(policy, task, [environments.make(acting.CART)], [1_000_000])
    assert played.outcome.steps >= 1
    assert set(played.actions) <= {0, 1}
