"""A recipe names a raw LeRobot folder: `check` says what that costs, and training makes the index first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.dataio.inplace.made import LENGTHS, source
from tests.processes import REPOSITORY, environment
from tiphys.dataio.format.table import Shard
from tiphys.dataio.index import EpisodeIndex
from tiphys.launch.check import check
from tiphys.launch.checks.data import QUOTA, hub_errors
from tiphys.recipes.load import RecipeError

RECIPE = """
name: robot
data: {mixture: [{dataset: robot, objective: bc}], validation: 0, cache: {memory: 32MiB}}
objectives: {bc: {context: 128, window: 4}}
model: {layers: 1, hidden: 32, heads: 2, text_vocabulary: 300}
deepspeed: {train_batch_size: 4, gradient_clipping: 0, optimizer: {type: AdamW, params: {lr: 1e-3}}}
train: {steps: 2}
run: {dir: run}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source(tmp_path / "robot", gop=4)
    (tmp_path / "robot.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_makes_the_index_only_if_it_is_asked_to(folder: Path) -> None:
    check("robot.yaml")
    assert not (folder / "robot.tiphys").exists()
    assert check("robot.yaml", index=True).name == "robot"
    assert EpisodeIndex.open("robot").episodes == len(LENGTHS)
    (folder / "robot/meta/info.json").write_text("{}")
    with pytest.raises(RecipeError, match="has changed since its index was made"):
        check("robot.yaml", index=True)


SMALL = ["data.validation=0", "data.cache.memory=32MiB", "objectives.bc.context=128", "objectives.bc.window=4"]
SMALL += [
    "model={layers: 1, hidden: 32, heads: 2, text_vocabulary: 300}",
    "deepspeed.train_batch_size=4",
    "train.steps=2",
]
SMALL += ["deepspeed.bf16.enabled=false", "run.dir=run"]


@pytest.fixture
def first_example(folder: Path) -> Path:
    """The first recipe of README.md, of the made dataset."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    assert text.count("hf://datasets/OWNER/NAME") == 1
    (folder / "first.yaml").write_text(text.replace("hf://datasets/OWNER/NAME", "robot"), encoding="utf-8")
    return folder


def test_the_first_example_of_the_readme_is_valid(first_example: Path) -> None:
    assert check("first.yaml", SMALL, index=True).data.mixture[0].dataset == "robot"


@pytest.mark.long
def test_the_first_example_of_the_readme_makes_the_index_and_reads_the_videos(first_example: Path) -> None:
    folder = first_example
    command = [sys.executable, "-m", "tiphys", "train", "first.yaml", "--processes", "2", *SMALL]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    assert (folder / "robot.tiphys/dataset.json").is_file()


def test_more_files_of_a_hub_than_its_quota_are_refused_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SimpleNamespace(url="hf://x", shards=[Shard(f"hf://datasets/a/b@c/{n}.mp4", 1) for n in range(6)])
    monkeypatch.setenv(QUOTA, "6")
    assert list(hub_errors(None, [index], str)) == []  # type: ignore[arg-type, list-item]
    monkeypatch.setenv(QUOTA, "5")
    (line,) = hub_errors(None, [index], str)  # type: ignore[arg-type, list-item]
    assert "data.mixture[0].dataset" in line
    assert "hf download" in line
