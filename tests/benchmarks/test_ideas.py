"""Every row of the table of paradigms has an experiment; in each the idea works, and the control fails."""

import pytest

from benchmarks.ideas import marks, page
from benchmarks.ideas.__main__ import main
from benchmarks.ideas.marks import Mark, at_least, at_most
from tiphys.pretrain.tokens.paradigms import PARADIGMS

SHORT = ["dt", "prompt-dt", "tt", "unimask"]  # in `make test`: one seed, without controls


def test_every_row_has_an_experiment():
    assert marks.rows() == [*PARADIGMS, *marks.MORE]


@pytest.mark.parametrize("row", SHORT)
def test_the_idea_works(row):
    assert marks.faults(list(marks.measure(row, 0, control=False))) == []


@pytest.mark.long
@pytest.mark.parametrize("row", marks.rows())
def test_the_idea_works_and_its_control_fails(row):
    found = [mark for seed in (0, 1, 2) for mark in marks.measure(row, seed)]
    assert marks.faults(found) == []
    assert all(mark["control"] is not None and mark["broken"] for mark in found)


def test_a_missed_bar_and_a_control_that_passes_are_faults():
    good = Mark("slope", 0.95, at_least(0.9), 0.05, at_most(0.1), "returns of others")
    assert good.fault == ""
    assert "bar is missed" in Mark("slope", 0.85, at_least(0.9), 0.05, at_most(0.1)).fault
    assert "control passes" in Mark("slope", 0.95, at_least(0.9), 0.5, at_most(0.1)).fault
    assert "bar is missed" in Mark("slope", float("nan"), at_least(0.9)).fault
    assert "control passes" in Mark("error", 0.1, at_most(0.5), float("nan"), at_least(1)).fault


def test_the_command_exits_with_1_if_a_control_passes(monkeypatch, capsys):
    def one(limit):
        mark = Mark("slope", 0.95, at_least(0.9), 0.05, at_most(limit), "returns of others")
        return lambda row, seed, control: iter([mark.to_dict(row, seed)])

    monkeypatch.setattr(marks, "measure", one(0.1))
    assert main(["dt", "--control", "--seeds", "0,1", "--json"]) == 0
    assert capsys.readouterr().out.count('"bar": "≥ 0.9"') == 2
    monkeypatch.setattr(marks, "measure", one(0.01))
    assert main(["dt", "--control", "--seeds", "0"]) == 1
    assert "the control passes" in capsys.readouterr().err


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["decision-transformer"])
    assert "no experiment is called 'decision-transformer'" in capsys.readouterr().err


def test_the_page_of_paradigms_is_that_of_the_table():
    """After a change: `python -m benchmarks.ideas.page`."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.page()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == marks.rows()
