"""Every row of the table of paradigms has a recipe that names its paper, and that runs on what its first lines collect."""

import shlex

import pytest

from tests import processes
from tests.launch import one_step
from tiphys.launch import cli
from tiphys.launch.check import check
from tiphys.pretrain.tokens.paradigms import PARADIGMS
from tiphys.recipes.load import FOLDER, load_recipe

LARGE = {"gato", "prompt-dt"}  # their datasets are collected in the long tests only
FEW = {"--episodes": "3"}


def lines(row):
    """The commands in the first lines of a recipe."""
    text = (FOLDER / f"{row}.yaml").read_text(encoding="utf-8").splitlines()
    return [line[1:].strip() for line in text if line.startswith("#   tiphys ")]


def small(command):
    """The command with few episodes, in one process."""
    words = shlex.split(command)[1:]
    for option, value in FEW.items():
        words[words.index(option) + 1] = value
    return [*words, "--processes", "1"]


@pytest.mark.parametrize("row", PARADIGMS)
def test_every_row_has_a_recipe_that_names_its_paper(row):
    head = (FOLDER / f"{row}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    author = PARADIGMS[row].source.partition(" et al.")[0].rpartition(" ")[2]
    assert author in head
    used = {entry.objective for entry in load_recipe(row).data.mixture}
    paradigms = {load_recipe(row).objectives[name].paradigm or name for name in used}
    assert row in paradigms
    assert any(command.startswith(f"tiphys train {row}") for command in lines(row))


def reads_effects(row):
    """Whether the row learns from what followed an action, so that the action must be the one that was executed."""
    it = PARADIGMS[row]
    given = any(part.kind in ("return", "reward") for part in it.timestep)
    seen = it.mask == "both" or it.views == "future" or any(p.kind == "observation" and p.weight for p in it.timestep)
    return given or (seen and it.loss != "pairs") or any(e.prefer == "top" for e in load_recipe(row).data.mixture)


@pytest.mark.parametrize("row", [row for row in PARADIGMS if reads_effects(row)])
def test_recorded_are_the_actions_that_the_returns_and_observations_follow_from(row):
    for command in lines(row):
        if command.startswith("tiphys collect "):
            given = cli._parser().parse_args(shlex.split(command)[1:])
            own = given.noise < 0 and ":" in given.tasks[0]  # an environment in a module is not disturbed by default
            assert given.record == "executed" or own


@pytest.mark.envs
@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.long if row in LARGE else ()) for row in (*PARADIGMS, "babyai")]
)
def test_the_recipe_trains_on_what_it_collects(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in lines(row):
        if command.startswith("tiphys collect "):
            assert cli.main(small(command)) == 0
    recipe = check(row, ["data.validation=0", "train.steps=1", "deepspeed.train_batch_size=2", *SMALL.get(row, ())])
    assert one_step.train(recipe, processes.alone()) > 0


SMALL = {
    "gato": ["deepspeed.train_micro_batch_size_per_gpu=2", "model.layers=2", "model.hidden=32", "model.heads=2"],
}
