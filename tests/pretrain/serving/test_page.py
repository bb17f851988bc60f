"""The example of docs/serving.md runs as it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="needs the envs extra")
pytest.importorskip("websockets", reason="needs the serve extra")

import tests.pretrain.acting.acting_fixtures as acting
from tests.processes import REPOSITORY
from tests.test_docs import blocks

pytestmark = pytest.mark.envs


def test_the_complete_example_runs(tmp_path: Path) -> None:
    (code,) = (code for code in blocks(REPOSITORY / "docs" / "serving.md", "python") if "POLICY = " in code)
    folder = acting.folder(tmp_path / "policy", acting.objectives((acting.CART,)))
    (tmp_path / "example.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "example.py", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'shape': [4]" in done.stdout
    assert done.stdout.count("[[") == 3
