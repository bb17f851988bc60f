"""The example of docs/environments.md works as it is written, and `check` finds what would fail after the training."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, environment
from tests.test_docs import blocks
from tiphys.launch.check import check
from tiphys.recipes.load import RecipeError

pytest.importorskip("gymnasium")
pytestmark = pytest.mark.envs
PAGE = REPOSITORY / "docs" / "environments.md"


def tiphys(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page. Python is told not to put the current folder on its path."""
    words = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A folder with the files of the page, and the dataset of its first command."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "corridor.py").write_text(next(blocks(PAGE, "python")))
    (folder / "corridor.yaml").write_text(next(blocks(PAGE, "yaml")))
    collect, _ = (code.strip() for code in list(blocks(PAGE, "sh")))
    tiphys(folder, collect)
    return folder


@pytest.fixture
def folder(collected, tmp_path, monkeypatch) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(collected, copy)
    monkeypatch.chdir(copy)
    return copy


def errors(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check("corridor.yaml", overrides)
    return caught.value.errors


def test_the_example_can_be_collected_and_checked(folder):
    document = json.loads((folder / "datasets/corridor/dataset.json").read_text())
    (task,) = document["tasks"]
    assert (task["name"], task["environment"], task["max_steps"]) == ("corridor:Corridor-v0",) * 2 + (50,)
    action = next(f for f in task["fields"] if f["name"] == "action")
    assert (action["low"], action["high"]) == ([-1.0], [1.0])
    assert "is valid" in tiphys(folder, "tiphys check corridor.yaml").stdout


def test_check_finds_a_task_that_does_not_exist(folder):
    (error,) = errors("evaluate.tasks=[corridor:Corridor-v1]")
    assert "evaluate.tasks[0]: no task that is trained is called 'corridor:Corridor-v1'. Did you mean" in error


def test_check_compares_the_spaces_of_the_environment(folder):
    source = (folder / "corridor.py").read_text()
    (folder / "corridor.py").write_text(source.replace("Box(0, 1, (2,)", "Box(0, 1, (3,)"))
    (error,) = errors()
    assert (
        "field 'observation': its data have shape (2,), but environment 'corridor:Corridor-v0' has shape (3,)" in error
    )
    (folder / "corridor.py").write_text("raise OSError('no licence')")
    (error,) = errors()
    assert "'corridor' cannot be imported: OSError: no licence" in error


def test_check_imports_no_module_that_only_the_dataset_names(folder):
    shutil.move(folder / "corridor.py", folder / "hallway.py")
    file = folder / "datasets/corridor/dataset.json"
    document = json.loads(file.read_text())
    document["tasks"][0]["environment"] = "hallway:Corridor-v0"
    file.write_text(json.dumps(document))
    with (folder / "hallway.py").open("a") as source:
        source.write("\nimport pathlib; pathlib.Path('imported').touch()\n")
    (error,) = errors()
    assert "evaluate.modules: [hallway]" in error
    assert not (folder / "imported").exists()
    assert check("corridor.yaml", ["evaluate.modules=[hallway]"]).evaluate.modules == ["hallway"]
    assert (folder / "imported").exists()


@pytest.mark.long
def test_the_example_can_be_trained_and_evaluated(folder):
    os.environ.pop("LOCAL_RANK", None)
    _, commands = (code.strip() for code in list(blocks(PAGE, "sh")))
    for line in commands.splitlines():
        tiphys(folder, line)
    for file in ("runs/corridor/evaluation.json", "runs/corridor/report.html"):
        assert (folder / file).is_file()
    found = json.loads((folder / "runs/corridor/evaluation.json").read_text())["tasks"]["corridor:Corridor-v0"]
    assert found["episodes"] == 20
