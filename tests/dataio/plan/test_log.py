"""PlanLog: append-only, shared by processes, and intact if a writer dies."""

import json

import pytest

from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.log import PlanLog

WEIGHTS = {"step": 3, "kind": "weights", "weights": {"a": 1.0}}


def test_two_processes_append_and_refresh(tmp_path):
    path = str(tmp_path / "run" / "plan.jsonl")
    one, two = PlanLog(path), PlanLog(path)
    one.append(WEIGHTS)
    two.append({**WEIGHTS, "step": 5})
    assert [e["step"] for e in two.events] == [3, 5]
    assert [e["step"] for e in one.refresh()] == [5]
    assert one.events == two.events == PlanLog(path).events
    assert one.refresh() == []


def test_the_incomplete_line_of_a_writer_that_died_is_ignored(tmp_path):
    path = tmp_path / "plan.jsonl"
    log = PlanLog(str(path))
    log.append(WEIGHTS)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        late = PlanLog(str(path))
        assert late.events == (WEIGHTS,)
        late.append({**WEIGHTS, "step": 9})
        # A line that lacked only its newline is complete.
        assert [e["step"] for e in PlanLog(str(path)).events] in ([3, 9], [3, 3, 9])


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"step": 1, "kind": "colour"}, "none of"),
        ({"step": -1, "kind": "skip", "steps": 1}, "at least 0"),
        ({"step": True, "kind": "skip", "steps": 1}, "at least 0"),
        ({"step": 1, "kind": "skip", "steps": 0}, "at least 1"),
        ({"step": 1, "kind": "weights", "weights": {"a": -1}}, "finite numbers of at least 0"),
        ({"step": 1, "kind": "weights", "weights": {"a": float("nan")}}, "finite numbers of at least 0"),
        ({"step": 1, "kind": "quarantine", "entry": "a"}, "needs episode"),
        ({"step": 1, "kind": "priority", "entry": "a", "file": "x"}, "`file` and `digest`"),
        ({"step": 1, "kind": "dataset", "entry": "b", "dataset": "x", "weight": 1}, "needs digest, like"),
        (
            {"step": 1, "kind": "dataset", "entry": "b", "dataset": "x", "digest": "d", "like": "a", "weight": -1},
            "at least 0",
        ),
    ],
)
def test_an_invalid_event_is_an_error(event, message):
    with pytest.raises(DataError, match=message):
        PlanLog(events=[event])


def test_the_error_of_an_invalid_line_names_file_and_byte(tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text(json.dumps(WEIGHTS) + "\n" + json.dumps({"step": 1, "kind": "colour"}) + "\n")
    with pytest.raises(DataError, match=r"plan\.jsonl at byte \d+"):
        PlanLog(str(path))


def test_follow_ignores_invalid_lines_with_a_warning(tmp_path, caplog):
    path = tmp_path / "plan.jsonl"
    log = PlanLog(str(path))
    path.write_text("3\n" + json.dumps({"step": 1, "kind": "colour"}) + "\n" + json.dumps(WEIGHTS) + "\n")
    assert log.follow() == [WEIGHTS]
    assert log.follow() == []
    assert [record.getMessage().count("ignored") for record in caplog.records] == [1, 1]
