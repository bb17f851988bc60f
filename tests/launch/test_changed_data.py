"""A run goes on with datasets of which only values were corrected, if the user accepts it; other changes are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch.checks.test_data import SILENT, TASK, dataset, recipe
from tiphys.launch.changed_data import settle
from tiphys.launch.mixture import show
from tiphys.launch.plan import make_plan
from tiphys.pretrain.checkpoint import recipe_state
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.load import load_recipe, to_yaml


class Saved:
    """The parts of a checkpoint that a resume looks at."""

    step, path = 12, Path("checkpoint")

    def __init__(self, settings: Any, index: Any) -> None:
        self._state = {**recipe_state(settings), "datasets": [index.fingerprint]}

    def state(self) -> dict[str, Any]:
        return self._state


@pytest.fixture
def begun(tmp_path):
    """(settings, index, plan, tokens) of a run that has begun with one bad value."""
    index = dataset(str(tmp_path / "old"), {"observation": np.nan})
    settings = load_recipe(recipe(tmp_path, index.url))
    objectives = Objectives(settings, [index])
    assert settle(settings, [index], objectives, resume=None, accept=False) == []
    return settings, index, make_plan(settings, [index], objectives), objectives.state()


def test_corrected_values_are_accepted_once_and_logged(begun, tmp_path):
    settings, old, plan, tokens = begun
    new, saved = dataset(str(tmp_path / "new")), Saved(settings, old)
    objectives = Objectives(settings, [new])
    assert objectives.state() != tokens  # the mean now counts the corrected step
    assert settle(settings, [new], objectives, resume=saved, accept=False) == []
    assert not (tmp_path / "run" / "plan.jsonl").exists()
    for accept in (True, False):  # the second start needs no word
        objectives = Objectives(settings, [new])
        earlier = settle(settings, [new], objectives, resume=saved, accept=accept)
        assert earlier == [[old.fingerprint]]
        assert json.dumps(objectives.state()) == json.dumps(tokens)
        assert make_plan(settings, [new], objectives, known_as=earlier[0]).fingerprint == plan.fingerprint
    (line,) = (tmp_path / "run" / "plan.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["kind"], event["step"]) == ("data", 12)
    assert (event["old"], event["new"]) == (old.fingerprint, new.fingerprint)
    plan.log.append(event)
    assert len(plan.windows(20).row)
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(settings))
    assert "changed: " in show(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"length": 21},
            r"the ids, the order or the lengths of its episodes differ \(8 episodes of 160 steps -> 8 of 168\)",
        ),
        (
            {
                "task": replace(
                    TASK, fields=(*TASK.fields[:2], replace(TASK.fields[2], high=(2.0, 2.0)), TASK.fields[3])
                )
            },
            r"task 'drive', field 'action': high \[1.0, 1.0\] -> \[2.0, 2.0\]",
        ),
        ({"task": SILENT}, "task 'silent' is new"),
    ],
)
def test_other_changes_are_refused_by_name(begun, tmp_path, change, words):
    settings, old, _, _ = begun
    new = dataset(str(tmp_path / "new"), **change)
    with pytest.raises(CheckpointError, match=words):
        settle(settings, [new], Objectives(settings, [old]), resume=Saved(settings, old), accept=True)
    assert not (tmp_path / "run" / "plan.jsonl").exists()


def test_a_run_without_a_record_is_refused(begun, tmp_path):
    settings, old, _, _ = begun
    (tmp_path / "run" / "objectives.json").unlink()
    new = dataset(str(tmp_path / "new"))
    with pytest.raises(CheckpointError, match="not known what the datasets looked like"):
        settle(settings, [new], Objectives(settings, [new]), resume=Saved(settings, old), accept=True)
