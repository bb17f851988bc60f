"""No command imports a module of the folder in which it is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch.small_recipe import GOLDEN, small_recipe
from tests.processes import REPOSITORY
from tiphys.dataio import python_path

PLANTED = ("select", "signal", "numpy", "torch", "json", "argparse", "pickle", "socket", "random", "deepspeed")
EARLY = (
    "typing",
    "collections",
    "__future__",
    "logging",
)  # what other packages in site-packages may need at Python's start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with modules beside it. Each leaves a file `marker-NAME` if it is imported."""
    place = tmp_path / "data"
    shutil.copytree(GOLDEN / "cart", place)
    plant(place, *PLANTED)
    return place


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder.parent / f'marker-{name}')!r}, 'w')\n")


def run(folder: Path, *words: str, path: str = str(REPOSITORY), command: tuple[str, ...] = ("-m", "tiphys")) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in folder.parent.glob("marker-*")) == []
    return done.stdout


@pytest.fixture
def script(tmp_path: Path) -> str:
    """As pip writes the command into `bin`."""
    file = tmp_path / "bin" / "tiphys"
    file.parent.mkdir()
    file.write_text("import sys\nfrom tiphys.launch.cli import main\nsys.exit(main())\n")
    return str(file)


@pytest.mark.parametrize("end", ["", os.pathsep])  # an empty entry of PYTHONPATH means the current folder too
def test_a_conversion_imports_nothing_from_its_source(folder: Path, tmp_path: Path, script: str, end: str) -> None:
    np.savez(folder / "a.npz", action=np.zeros((4, 1), np.float32), observation=np.zeros((5, 1), np.float32))
    for name in ("dataset.json", "index.parquet", "statistics.parquet"):
        (folder / name).unlink()
    shutil.rmtree(folder / "shards")
    run(folder, "convert", ".", str(tmp_path / "out"), "--processes", "2", path=f"{REPOSITORY}{end}", command=(script,))
    assert (tmp_path / "out" / "dataset.json").is_file()


@pytest.mark.parametrize(
    "words",
    [("verify", "."), ("loader-bench", ".", "--steps", "2", "--rows", "2"), ("tokens", "../small.yaml")],
    ids=lambda words: words[0],
)
def test_no_command_on_data_imports_from_them(folder: Path, words: tuple[str, ...]) -> None:
    (folder.parent / "small.yaml").write_text(small_recipe("."))
    plant(folder, *EARLY)
    run(folder, *words)


@pytest.mark.long
def test_training_and_evaluation_import_nothing_from_their_folder(folder: Path) -> None:
    (folder / "small.yaml").write_text(small_recipe("."))
    more = ("evaluate.tasks=[CartPole-v1]", "evaluate.episodes=12", "evaluate.processes=2", "run.dir=run")
    pytest.importorskip("gymnasium", reason="needs the envs extra")
    run(folder, "train", "small.yaml", "--processes", "2", *more)
    for planted in folder.glob("*.py"):
        shutil.copy(planted, folder / "run" / "policy" / planted.name)
    run(folder / "run" / "policy", "evaluate", ".", "--episodes", "12", "--processes", "2", "--out", "found.json")
    run(folder, "collect", "CartPole-v1", "--to", "new", "--episodes", "2", "--processes", "2")


def test_only_the_implied_current_folder_leaves_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is restored
    named = str(tmp_path / "named")
    own = [p for p in sys.path if p and p != str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "named"]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path), named, *own])
    python_path.leave_current_folder()
    assert sys.path == [named, *own]
    assert (os.environ["PYTHONSAFEPATH"], os.environ["PYTHONPATH"]) == ("1", named)
    monkeypatch.setenv("PYTHONPATH", ".")  # a user who names the current folder means it
    monkeypatch.setattr(sys, "path", [str(tmp_path), *own])
    python_path.leave_current_folder()
    assert sys.path == [str(tmp_path), *own]


def test_every_process_starts_without_the_current_folder() -> None:
    """`sys.executable` stands in one place, which adds -P."""
    files = [p for room in ("dataio", "launch", "pretrain", "recipes") for p in (REPOSITORY / room).rglob("*.py")]
    users = {p.name for p in files if "[sys.executable" in p.read_text() or "get_context(" in p.read_text()}
    assert users == {"python_path.py", "process_pool.py"}
