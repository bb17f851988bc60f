"""A recipe that could not publish, or not as it says, is refused before it trains; a run keeps its place when it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.follow.publishing import policy
from tiphys.launch.checks.publishing import holder_errors, rate_errors
from tiphys.launch.finish import publish_policy, published
from tiphys.pretrain.follow.chain import FollowError
from tiphys.recipes.load import load_recipe
from tiphys.recipes.schema import Recipe


def recipe(run: Path, to: str, *more: str) -> Recipe:
    return load_recipe("quickstart", [f"run.dir={run}", f"publish.to={to}", f"name={run.name}", *more])


def test_a_limit_that_a_hub_would_not_keep_is_refused(tmp_path: Path) -> None:
    (found,) = rate_errors(recipe(tmp_path, "hf://owner/small", "publish.rate=1MiB"))
    assert found[0] == "publish.rate"
    assert not [*rate_errors(recipe(tmp_path, "hf://owner/small")), *rate_errors(recipe(tmp_path, "s3://a/b"))]


def test_a_run_keeps_its_place_and_another_one_is_refused_by_check(tmp_path: Path) -> None:
    to, first, second = str(tmp_path / "to"), tmp_path / "arm", tmp_path / "leg"
    assert not list(holder_errors(recipe(first, to)))
    for run in (first, second):
        run.mkdir()
    publish_policy(recipe(first, to), policy(tmp_path, 1), None, final=False)
    publish_policy(recipe(first, to), policy(tmp_path, 2), None, final=False)  # as after a resume
    assert published(first).to == to
    ((key, reason),) = holder_errors(recipe(second, to))
    assert (key, "the run 'arm'" in reason) == ("publish.to", True)
    with pytest.raises(FollowError, match="the run 'arm'"):
        publish_policy(recipe(second, to), policy(tmp_path, 3), None, final=False)

    taking = recipe(second, to, "publish.take_over=true")
    assert not list(holder_errors(taking))
    publish_policy(taking, policy(tmp_path, 4), None, final=False)
    assert list(holder_errors(recipe(first, to)))
    again = recipe(first, to, "publish.take_over=true")  # or both would take it from each other for ever
    assert list(holder_errors(again))
    with pytest.raises(FollowError, match="the run 'leg'"):
        publish_policy(again, policy(tmp_path, 5), None, final=False)
