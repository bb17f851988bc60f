"""The example of docs/own-loop.md learns, as it is written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.processes import REPOSITORY
from tests.test_docs import blocks

PAGE = REPOSITORY / "docs" / "own-loop.md"


def test_the_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = REPOSITORY / "tests" / "golden" / "data" / "cart"
    Path("own.yaml").write_text(next(blocks(PAGE, "yaml")).replace("datasets/quickstart/classic", str(data)))
    Path("loop.py").write_text(next(blocks(PAGE, "python")))
    losses = runpy.run_path("loop.py")["main"]()
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
