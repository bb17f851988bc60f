"""A run whose loss becomes infinite ends with its own status, one sentence and a report."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.launch.small_recipe import small_recipe
from tests.processes import environment
from tiphys.dataio.python_path import python
from tiphys.launch.statuses import Status

pytestmark = pytest.mark.long


def test_divergence(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(small_recipe(steps=50, rate=1e30))
    command = python("-m", "tiphys", "train", "small.yaml", "--processes", "2")
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == Status.DIVERGED, done.stdout + done.stderr
    assert done.stderr.count("the loss is") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "policy").exists()
