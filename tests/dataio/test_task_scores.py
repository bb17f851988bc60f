"""Scores of converted data are measured in the environment that a task names, for its horizon, and stored beside all else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium")

from tiphys.dataio import environments
from tiphys.dataio.collect import Players, collect
from tiphys.dataio.dataset import verify
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.dataio.task_scores import measure

pytestmark = pytest.mark.envs
CART = "CartPole-v1"


def written(url: Path, played: str = CART, **changes: Any) -> str:
    """A dataset with one demonstration of CartPole whose task says something else about its environment."""
    with Players(1) as players, ShardWriter(str(url)) as writer:
        (episode,) = players.demonstrations(environments.spec(CART), 1, 0, 0.0)
        spec = replace(environments.spec(played), **{"name": "balance", **changes})
        writer.add_task(replace(spec, fields=environments.spec(CART).fields))
        writer.write(replace(episode, task="balance"))
        writer.close()
    return str(url)


def test_the_scores_are_those_that_collect_measures_and_nothing_else_changes(tmp_path: Path) -> None:
    collect(CART, str(tmp_path / "data"), 2, processes=1, score_episodes=5)
    other = collect(CART, str(tmp_path / "other"), 2, processes=1, score_episodes=2)
    before = EpisodeIndex.open(str(tmp_path / "data"))
    found = measure(str(tmp_path / "data"), episodes=2, processes=1)
    after = EpisodeIndex.open(str(tmp_path / "data"))
    assert [one.task for one in found] == list(after.tasks) == list(other.tasks) != list(before.tasks)
    kept = {key: value for key, value in before.document.items() if key not in ("tasks", "digests")}
    assert kept == {key: value for key, value in after.document.items() if key not in ("tasks", "digests")}
    assert verify(str(tmp_path / "data")).ok


@pytest.mark.parametrize("steps", [20, 520])
def test_episodes_last_as_long_as_the_task_says(tmp_path: Path, steps: int) -> None:
    url = written(tmp_path / "data", environment=CART, max_steps=steps)
    assert measure(url, episodes=1, processes=1)[0].task.expert == steps
    (task,) = EpisodeIndex.open(url).tasks
    assert (task.name, task.environment, task.expert) == ("balance", CART, steps)
    assert task.random is not None
    assert 0 < task.random < 100


def test_without_an_expert_its_stored_score_stays(tmp_path: Path) -> None:
    url = written(tmp_path / "data", "Acrobot-v1", expert=-70.0)
    (found,) = measure(url, episodes=1, processes=1)
    assert "has no expert" in found.no_expert
    assert (found.task.random, found.task.expert) == (-500.0, -70.0)


def test_a_task_without_an_environment_is_refused(tmp_path: Path) -> None:
    url = written(tmp_path / "data", environment="")
    with pytest.raises(DataError, match="balance has no environment to be measured in; name one with `environment`"):
        measure(url)
    with pytest.raises(DataError, match="no task matches 'x'; it has balance"):
        measure(url, ["x"])
