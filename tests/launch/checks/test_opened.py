"""Datasets are opened once for all checks. Environments are made meanwhile; a check that fails does not wait for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.launch.small_recipe import small_recipe
from tiphys.launch.checks import opened
from tiphys.launch.checks.opened import Opened
from tiphys.recipes.load import load_recipe


def small(folder: Path, *overrides: str) -> Any:
    (folder / "small.yaml").write_text(small_recipe())
    return load_recipe(folder / "small.yaml", overrides)


def test_environments_are_made_from_the_beginning_and_others_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def declared(names: Any, modules: Any, stop: Any = None) -> list[Any]:
        asked.append((list(names), list(modules)))
        return [f"spec of {name}" for name in names]

    monkeypatch.setattr(opened, "declared", declared)
    one = Opened(small(tmp_path, "evaluate.tasks=[CartPole-v1,CartPole-v1,unknown]", "evaluate.modules=[mine]"))
    assert one.declared(["other", "CartPole-v1"]) == ["spec of other", "spec of CartPole-v1"]
    one.close()
    assert asked == [(["CartPole-v1"], ["mine"]), (["other"], ["mine"])]
    assert [index.tasks[0].name for index in one.indexes] == ["CartPole-v1"]


def test_closing_ends_the_process_that_makes_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def declared(names: Any, modules: Any, stop: threading.Event) -> list[Any]:
        begun.set()
        assert stop.wait(60)
        ended.set()
        return []

    monkeypatch.setattr(opened, "declared", declared)
    one = Opened(small(tmp_path, "evaluate.tasks=[CartPole-v1]"))
    assert begun.wait(60)
    one.close()
    assert ended.is_set()


def test_a_dataset_that_cannot_be_opened_is_an_error_of_its_entry(tmp_path: Path) -> None:
    one = Opened(small(tmp_path, f"data.mixture[0].dataset={tmp_path / 'nothing'}"))
    one.close()
    assert one.indexes == []
    ((key, reason),) = one.errors
    assert key == "data.mixture[0].dataset"
    assert "nothing" in reason
