"""Ranks of a real launch that stand still without having ended: the one at fault is named, and the run is brought to its end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.small_recipe import small_recipe
from tiphys.launch import submit
from tiphys.launch import supervise as module
from tiphys.launch.launches import Launch
from tiphys.launch.statuses import Status

pytestmark = pytest.mark.long
MORE = "checkpoint: {every: 10}\nrestart: {attempts: 3}\n"


@pytest.fixture(autouse=True)
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "TRAIN", ("--module", "tests.launch.faulty_rank"))
    monkeypatch.setattr(module, "pause_after", lambda failures: 0.1)
    monkeypatch.chdir(tmp_path)


def restarts(said: str) -> list[str]:
    return re.findall(r"^tiphys: restart \d+: (.*)$", said, re.MULTILINE)


def test_a_rank_that_sleeps_inside_an_exchange_is_named_and_not_the_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULTS", "exchange,reduction,nothing")
    (tmp_path / "small.yaml").write_text(small_recipe(steps=40) + MORE)
    assert submit.submit("small.yaml", [], processes=2) == Status.DONE
    said = restarts(capfd.readouterr().err)
    assert len(said) == 2
    for line in said:
        assert re.match(
            r"rank 1 \(.*\) stands in \"\w+\" at step 2[56] for \d+ s; 1 other waits in exchange \d+; ", line
        )


def test_a_rank_without_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULTS", "memory")
    (tmp_path / "small.yaml").write_text(small_recipe(steps=60) + MORE)
    assert submit.submit("small.yaml", [], processes=2) in (Status.REFUSED, Status.CRASHED)
    reports = {report.rank: report for report in Launch("run", 1).reports()}
    assert re.search("[Mm]emory|thread", reports[1].cause)
    assert not reports[1].lost
    said = capfd.readouterr()
    assert "memory" in said.out + said.err
