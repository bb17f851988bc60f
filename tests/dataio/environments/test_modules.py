"""Environments and experts by `module:name`: found in the current folder, imported only if the user named the module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY
from tiphys.dataio import environments
from tiphys.dataio.environments.agents import agent
from tiphys.dataio.environments.probe import LIMIT, declared
from tiphys.dataio.episode import DataError, TaskSpec

pytest.importorskip("gymnasium")
pytestmark = pytest.mark.envs

SOURCE = """
import gymnasium, os, pathlib, time
from helper_of_mine import LENGTH

class Line(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Discrete(9), gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return 0, {}
    def step(self, action):
        return 0, 1.0, False, False, {}

def hang():
    time.sleep(600)

def crash():
    os.abort()

def fail():
    raise KeyError("no level file")

gymnasium.register("Line-v0", entry_point=Line, max_episode_steps=LENGTH)
for made in (hang, crash, fail):
    gymnasium.register(f"{made.__name__.title()}-v0", entry_point=made)
pathlib.Path("imported").touch()
"""


def made(name: str, modules: Sequence[str] = ("my_line",), limit: float = LIMIT) -> TaskSpec:
    (found,) = declared([name], modules, limit)
    if isinstance(found, DataError):
        raise found
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with the modules `my_line` and `helper_of_mine`."""
    (tmp_path / "my_line.py").write_text(SOURCE)
    (tmp_path / "helper_of_mine.py").write_text("LENGTH = 7\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_of_the_current_folder_is_found(folder):
    (folder / "json.py").write_text("raise OSError('this folder hides no installed module')")
    assert made("my_line:Line-v0").max_steps == 7


def test_a_module_that_only_data_name_is_not_imported(folder):
    for modules in ([], ["my"], ["my_line.more"]):
        with pytest.raises(DataError, match=r"'my_line'.*comes from data.*evaluate\.modules: \[my_line\]"):
            made("my_line:Line-v0", modules)
    environments.allow(tasks=["my_line"])  # the name of a task allows nothing
    with pytest.raises(DataError, match="comes from data"):
        environments.make("my_line:Line-v0")
    with pytest.raises(DataError, match="`module:EnvId` is expected"):
        environments.make("../evil:Line-v0")
    assert not (folder / "imported").exists()


def test_an_environment_that_hangs_crashes_or_fails_harms_no_other(folder):
    names = ["Fail-v0", "Crash-v0", "Line-v0", "Hang-v0", "Lime-v0"]
    fail, crash, line, hang, lime = declared([f"my_line:{n}" for n in names], ["my_line"], limit=6)
    assert "'my_line:Fail-v0' cannot be made: KeyError: 'no level file'" in str(fail)
    assert "'my_line:Crash-v0': making it ended the process (signal 6)" in str(crash)
    assert isinstance(line, TaskSpec)
    assert "'my_line:Hang-v0': it was not made within 6 seconds" in str(hang)
    assert "did you mean my_line:Line-v0" in str(lime)


def test_a_module_that_does_not_exist_is_named(folder):
    with pytest.raises(DataError, match=r"'not_there' cannot be imported.*installed, on PYTHONPATH, or in the current"):
        made("not_there:Line-v0", ["not_there"])


def test_entry_points_of_installed_packages_are_found(folder):
    """A family of the group `tiphys.environments`, and ids of the group `gymnasium.envs`."""
    site = folder / "site"
    info = site / "mygame-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mygame\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tiphys.environments]\nmygame = mygame:Games\n\n[gymnasium.envs]\nplugged = mygame:register\n"
    )
    (site / "mygame.py").write_text(
        "import gymnasium\n"
        "from tiphys.dataio.environments import Family\n"
        "class Games(Family):\n"
        "    def names(self): return ['mygame/one']\n"
        "    def make(self, task, **options): return gymnasium.make('CartPole-v1', **options)\n"
        "def register():\n"
        "    gymnasium.register('In-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=9)\n"
    )
    code = (
        "import json; from tiphys.dataio import environments as e;"
        "print(json.dumps([e.spec('mygame/one').max_steps, e.spec('plugged/In-v0').max_steps, 'mygame/one' in e.names()]))"
    )
    path = os.pathsep.join([str(REPOSITORY), str(site)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [500, 9, True]


class Told:
    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def act(self, observation: Any) -> Any:
        return observation + self.resets


class Aware:
    def __init__(self, task: str, env: Any) -> None:
        self.task = task

    def act(self, observation: Any, taken: Any) -> Any:
        return (self.task, observation, taken)


def of_observation(observation: Any, scale: int = 2) -> Any:
    return observation * scale


def of_task(task: str, env: Any) -> Any:
    return of_observation


told, number = Told(), 3


def test_an_expert_is_any_callable_or_class_with_act():
    def acts(name: str, *more: Any) -> Any:
        expert = agent(f"{__name__}:{name}")("t", None)  # type: ignore[arg-type]
        expert.reset()
        return expert.act(5, *more)

    assert acts("of_observation") == acts("of_task") == 10
    assert acts("Told") == acts("told") == 6
    assert acts("Aware", 4) == ("t", 5, 4)
    with pytest.raises(DataError, match=f"expert {__name__}:number: a int cannot act"):
        acts("number")
    with pytest.raises(DataError, match="has no 'nobody'"):
        acts("nobody")


def test_a_child_that_is_not_needed_any_more_is_killed(folder, monkeypatch):
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    (found,) = declared(["my_line:Hang-v0"], ["my_line"], limit=600, stop=stop)
    assert isinstance(found, DataError)
