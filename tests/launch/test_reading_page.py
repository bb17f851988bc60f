"""docs/reading-a-run.md explains every key that a run writes into metrics.jsonl, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import processes
from tests.launch import one_step
from tests.processes import REPOSITORY
from tests.test_docs import blocks
from tiphys.launch.aside import Aside
from tiphys.launch.check import check
from tiphys.pretrain.callbacks.metrics_writer import MetricsWriter
from tiphys.pretrain.engine import StepResult
from tiphys.pretrain.metrics import StepMetrics
from tiphys.pretrain.phases import PHASES

PAGE = REPOSITORY / "docs" / "reading-a-run.md"


def documented() -> dict[str, set[str]]:
    """Title of a section -> the keys in the first column of its table."""
    found: dict[str, set[str]] = {}
    for title, text in re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        keys = [k for line in text.splitlines() if line.startswith("| `") for k in line.split("|")[1].split(",")]
        if keys:
            assert len(keys) == len(set(keys)), title
            found[title.strip("`")] = {key.strip(" `") for key in keys}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, with experts, held-out rows and a line whose weight is chosen."""
    folder = tmp_path_factory.mktemp("run")
    values = one_step.make(folder)
    values["data"]["mixture"][0]["loss_weight"] = "auto"
    one_step.train(check(one_step.write(folder, values)), processes.alone())
    return folder / "run"


def written(run: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    optional: Any = dict.fromkeys(("all_to_all", "bubble", "bubble_bound"), 0.1)
    result = StepResult(1, 1.0, 0.0, 1.0, 1e-3, 1, 1, 1, 1.0, {}, {"a": 1.0}, {"a": 1.0}, **optional)
    yield StepMetrics(result, 1.0, 0.0, 1.0, {}, dict.fromkeys(PHASES, 0.0)).to_json()
    beside: list[dict[str, Any]] = []
    writer = MetricsWriter(run)
    writer.write = beside.append  # type: ignore[method-assign]
    writer._file, writer._append = object(), lambda line: beside.append(json.loads(line))  # type: ignore[method-assign]
    writer.on_change(SimpleNamespace(step=1), [{"kind": "weights"}])  # type: ignore[arg-type]
    aside: Any = SimpleNamespace(writer=writer, _done=lambda *_: None, _pause=0.0)
    aside._failed = lambda *given: Aside._failed(aside, *given)
    scores = {"expert_normalized": 0.5}
    for answer in (
        {"event": "evaluated", "result": {"tasks": {"t": scores}}, "seconds": 1.0},
        {"event": "published", "said": "done"},
        {"event": "failed", "task": "publish", "why": "away"},
    ):
        Aside._heard(aside, SimpleNamespace(step=1), answer)  # type: ignore[arg-type]
    yield from beside


def test_the_page_has_every_key_and_no_other(run: Path) -> None:
    found: dict[str, set[str]] = {}
    for line in written(run):
        found.setdefault(line.get("kind", "A training step"), set()).update(line)
        for part in ("phases", "loader"):
            found.setdefault(part, set()).update(line.get(part, ()))
        for entry in line.get("entries", {}).values():
            found["plan"].update(entry)
    assert documented() == found


def test_the_example_reads_a_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(run)
    exec(compile(next(blocks(PAGE, "python")), str(PAGE), "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"loss \d.*\ndata wait \d.*\nheld out \[\d", said)
    assert np.isfinite(float(said.split()[1]))
