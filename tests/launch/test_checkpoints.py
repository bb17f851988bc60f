"""`tiphys checkpoint` lists, verifies and inspects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretrain.test_checkpoint import part
from tiphys.launch.cli import main
from tiphys.launch.statuses import Status
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import checkpoint_snapshot
from tiphys.pretrain.checkpoint_choice import ASIDE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 40, of which the first has a damaged byte, and one that is being written."""
    for step in (1, 2, 40):
        snap = part(step)
        snap.state |= {
            "recipe": {"name": "small"},
            "hash": "abc",
            "datasets": ["d1"],
            "loader": {"step": step, "log": []},
        }
        snap.state |= {"health": {"proven": 8}}
        checkpoint_snapshot.write(snap, tmp_path)
    file = files.folder_of(tmp_path, 1) / "rank00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    files.folder_of(tmp_path, 50).mkdir()
    return tmp_path


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run)]) == Status.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2", "40", "50", "it", "trusted:"]
    assert [line.split()[-1] for line in lines[1:5]] == ["trusted", "trusted", "whole", "incomplete"]
    assert lines[5] == "            it is being written, or its writer was stopped"
    assert max(map(len, lines)) < 80
    (files.folder_of(run, 2) / "rank00000.safetensors").unlink()
    assert main(["checkpoint", "list", str(run), "--json"]) == Status.DONE
    row = json.loads(capsys.readouterr().out)[1]
    assert row["state"] == "damaged"
    assert row["why"].startswith("rank00000.safetensors: is missing, but manifest.json says ")
    assert main(["checkpoint", "list", str(run / "nothing")]) == Status.REFUSED


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == Status.REFUSED
    out = capsys.readouterr().out
    assert "step-00000001: rank00000.safetensors: differs from its digest" in out
    assert "step-00000002: every byte is as it was saved" in out
    assert "step-00000050" not in out  # it may be being written
    assert main(["checkpoint", "verify", str(files.folder_of(run, 2))]) == Status.DONE
    assert main(["checkpoint", "verify", str(run / "nothing")]) == Status.REFUSED
    assert "nothing: there are no checkpoints" in capsys.readouterr().err


def test_a_checkpoint_that_was_set_aside_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.folder_of(run, 2)
    (folder / files.MANIFEST).rename(folder / ASIDE)
    assert main(["checkpoint", "list", str(run), "--json"]) == Status.DONE
    assert json.loads(capsys.readouterr().out)[1]["state"] == "damaged"
    assert main(["checkpoint", "verify", str(run)]) == Status.REFUSED
    assert "step-00000002: a launch found damaged bytes" in capsys.readouterr().out


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run)]) == Status.DONE
    out = capsys.readouterr().out
    assert "step         40, saved by 1 rank" in out
    assert "parameters   8 in 1 tensors, " in out
    assert "saved        master of 1 tensors" in out
    assert main(["checkpoint", "inspect", str(files.folder_of(run, 2)), "--json"]) == Status.DONE
    assert json.loads(capsys.readouterr().out)["tensors"] == [{"name": "w", "shape": [8], "saved": ["master"]}]
    assert main(["checkpoint", "inspect", str(run / "nothing")]) == Status.REFUSED
