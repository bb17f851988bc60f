"""Mistakes of new users: the message of each says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.launch.small_recipe import GOLDEN, small_recipe
from tiphys.dataio.export import export
from tiphys.launch.cli import main

# Arguments of `check` after the recipe, and what its message contains: the place, what is wrong, what would be possible
RECIPES = {
    "a misspelt key": (
        ["train.stpes=5"],
        ["override 'train.stpes=5': train.stpes: unknown key", "Did you mean 'steps'?"],
    ),
    "a dataset that is not there": (
        ["data.mixture[0].dataset=nowhere"],
        [
            "override 'data.mixture[0].dataset=nowhere': data.mixture[0].dataset: nowhere: there is no dataset",
            "make one with `tiphys collect`",
        ],
    ),
    "an objective that is not there": (
        ["data.mixture[0].objective=bcc"],
        [
            "override 'data.mixture[0].objective=bcc'",
            "data.mixture[0].objective: no objective is called 'bcc'",
            "Did you mean 'bc'?",
        ],
    ),
    "a word instead of a number": (
        ["train.steps=many"],
        ["override 'train.steps=many': train.steps: must be a whole number, not 'many'; allowed: at least 1"],
    ),
    "a number out of range": (
        ["train.steps=-1"],
        ["override 'train.steps=-1'", "train.steps: -1 is out of range", "allowed: at least 1"],
    ),
    "heads that do not divide the width": (
        ["model.heads=3"],
        [
            "override 'model.heads=3': model.heads: model.hidden (32) must be a multiple of 2 × model.heads (6)",
            "set model.heads=2 or model.hidden=36",
        ],
    ),
    "two errors at once": (["train.steps=-1", "model.layers=0"], ["2 errors", "train.steps", "model.layers"]),
    "a field that the data do not have": (
        ["objectives.bc.fields.imgae.resize=64"],
        [
            "override 'objectives.bc.fields.imgae.resize=64': objectives",
            "no field matches 'imgae'",
            "those that the tasks have: action, observation",
        ],
    ),
    "a misspelt key of a field with a dot": (
        ["objectives.bc.fields.observation.state.encodng=gato"],
        ["objectives.bc.fields.observation.state.encodng: unknown key", "Did you mean 'encoding'?"],
    ),
}
MAPPINGS = {
    "a field that the source does not have": (
        "fields: {observaton: drop}",
        ["m.yaml: no field matches 'observaton'", "did you mean 'observation'?"],
    ),
    "bounds that are exchanged": (
        "fields: {observation: {low: 1, high: -1}}",
        ["m.yaml: fields.observation: low 1 is above high -1; exchange them"],
    ),
}


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to fail, and gives its message."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert main(list(words)) != 0
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("mistake", RECIPES)
def test_a_mistake_in_a_recipe(mistake: str, said: Callable[..., str]) -> None:
    arguments, wanted = RECIPES[mistake]
    Path("r.yaml").write_text(small_recipe())
    message = said("check", "r.yaml", *arguments)
    assert [part for part in wanted if part not in message] == [], message


def test_what_is_valid_but_hardly_meant_is_said(said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(small_recipe())
    assert main(["check", "r.yaml", "objectives.bc.context=4", "data.validation=0.001"]) == 0
    out = capsys.readouterr().out
    assert "at most 2 steps of task 'CartPole-v1' fit `context: 4`, so windows are shorter than `window: 4`" in out
    assert "no episode is held out, so there is no held-out loss: data.validation is 0.001 of 4 episodes" in out
    assert main(["check", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert "held out" not in out
    assert "context" not in out


def test_a_misspelt_recipe_and_a_misspelt_command(said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("arms.yaml").write_text(small_recipe())
    assert "arm.yaml: neither a file nor an installed recipe" in (message := said("check", "arm.yaml"))
    assert "Did you mean 'arms.yaml'?" in message
    for words, wanted in {
        "trian arms.yaml": "'trian' is not a command of 'tiphys'. Did you mean 'train'?",
        "dataset mrge a b": "'mrge' is not a command of 'tiphys dataset'. Did you mean 'merge'?",
    }.items():
        with pytest.raises(SystemExit):
            main(words.split())
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("mistake", MAPPINGS)
def test_a_mistake_in_a_mapping_file(mistake: str, said: Callable[..., str]) -> None:
    text, wanted = MAPPINGS[mistake]
    export(str(GOLDEN / "cart"), "source", format="npz")
    Path("m.yaml").write_text(text)
    message = said("convert", "source", "out", "--from", "npz", "--map", "m.yaml", "--processes", "1")
    assert [part for part in wanted if part not in message] == [], message


def test_values_that_are_not_numbers_are_said_when_data_are_made(
    said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    observations = np.zeros((5, 2), np.float32)
    observations[3, 1] = np.nan
    np.savez("one.npz", observations=observations, actions=np.zeros((5, 1), np.float32), episode_ends=[2, 5])
    assert main(["convert", "one.npz", "out", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "bad values: task 'one', field 'observation': 1 step with NaN or an infinity in 1 episode (first: one" in out
    assert "data.on_bad_value=quarantine" in out


def test_a_run_without_a_policy_yet(said: Callable[..., str]) -> None:
    Path("run").mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        Path("run", name).touch()
    assert "run: this run has no policy yet. It gets one after its last step" in said("publish", "run", "elsewhere")
