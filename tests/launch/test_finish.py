"""An evaluation beside training: `tiphys evaluate` in a process of its own gives the same scores."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")

import tests.pretrain.acting.acting_fixtures as acting
from tiphys.launch.cli import main
from tiphys.launch.finish import evaluation_command
from tiphys.launch.statuses import Status
from tiphys.pretrain.evaluate import evaluate

pytestmark = pytest.mark.envs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return acting.folder(tmp_path_factory.mktemp("policy"))


@pytest.mark.long
def test_a_process_of_its_own_writes_the_same(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    command = evaluation_command(folder, [acting.CART], out=out, episodes=2, processes=1, sample=True, videos=0)
    assert subprocess.run(command, timeout=120).returncode == Status.DONE
    assert json.loads(out.read_text()) == evaluate(folder, [acting.CART], episodes=2, processes=1, sample=True)


def test_the_command_refuses_an_unknown_task_and_leaves_no_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation.json"
    assert main(["evaluate", str(folder), "--tasks", "nowhere", "--out", str(out)]) == Status.REFUSED
    assert "nowhere" in capsys.readouterr().err
    assert not out.exists()
