"""Every request reaches a run once, complete, and only if it fits the run's mixture."""

import json

import pytest

from tests.dataio.loading_fixtures import CONTROL, dataset
from tests.dataio.plan.plans import entry, plan
from tiphys.launch.mixture import REQUESTS, add, follow, request, show

RECIPE = """
name: small
data: {mixture: [{dataset: a, weight: 2}, {dataset: "s3://b/c", weight: 1}]}
deepspeed: {train_batch_size: 4}
run: {dir: x}
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def running(**options):
    """The plan of a run of that recipe."""
    return plan([entry("0:a", 200, 1), entry("1:s3://b/c", 200, 1, seed=1)], **options)


def test_a_request_is_seen_once_and_complete(run):
    fresh = follow(run, running())
    request(run, ["1=3", "0=1"], at=70)
    with open(run / REQUESTS, "a") as file:
        file.write('{"step": 1, "ki')  # half written
    assert fresh() == [{"step": 70, "kind": "weights", "weights": {"1:s3://b/c": 3.0, "0:a": 1.0}}]
    with open(run / REQUESTS, "a") as file:
        file.write('nd": "weights", "weights": {}}\n')
    assert fresh() == [{"step": 1, "kind": "weights", "weights": {}}]
    assert fresh() == []


def test_a_request_that_the_checkpoint_does_not_know_reaches_the_resumed_run(run):
    for weight in (
        "1",
        "2",
        "3",
        "2",
    ):  # one that the checkpoint has, two that were adopted later, one while the run stood still
        request(run, [f"0={weight}"])
    events = [{"kind": "weights", "step": 10 * i, "weights": {"0:a": float(i)}} for i in (1, 2, 3)]
    lines = [{"kind": "change", "step": event["step"] - 2, "event": event} for event in events]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fresh = follow(run, running(), events[:1])
    assert fresh() == [*events[1:], {"kind": "weights", "step": 0, "weights": {"0:a": 2.0}}]
    assert fresh() == []
    assert follow(run, running(), [*events, {"kind": "weights", "step": 44, "weights": {"0:a": 2.0}}])() == []


def test_what_does_not_fit_the_run_is_named_and_passed_over(run, capsys, caplog):
    fresh = follow(run, running())
    lines = ["3", '{"step": 1, "kind": "colour"}', '{"step": 1, "kind": "weights", "weights": {"nobody": 1}}']
    (run / REQUESTS).write_text("".join(line + "\n" for line in lines))
    request(run, ["0=2"])
    assert [event["weights"] for event in fresh()] == [{"0:a": 2.0}]
    assert "nobody" in capsys.readouterr().err
    assert len(caplog.records) == 4  # by the run, and by the request


def test_a_dataset_is_added_by_its_fingerprint(run, tmp_path):
    more = dataset(str(tmp_path / "more"), 20, (CONTROL,))
    joined = entry("2:more", 20, 1, seed=2)
    joined.index.fingerprint = more.fingerprint
    fresh = follow(run, running(open_entry=lambda event: joined))
    add(run, [f"{more.url}=0.5"], like="0", at=9)
    (event,) = fresh()
    assert event == {
        "step": 9, "kind": "dataset", "entry": f"2:{more.url}", "dataset": more.url, "digest": more.fingerprint,
        "like": "0:a", "weight": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="not one of the entries"):
        add(run, [f"{more.url}=0.5"], like="7")


@pytest.mark.parametrize("wrong", ["b=1", "0", "0=-1", "0=nan", "0=inf", "2=1", "0=x"])
def test_an_invalid_request_is_refused_and_nothing_is_written(run, wrong):
    with pytest.raises(ValueError, match=r"weight|entries"):
        request(run, ["1=1", wrong])
    assert not (run / REQUESTS).exists()


def test_show_lists_weights_and_requests(run):
    request(run, ["s3://b/c=4"])
    shown = show(run).splitlines()
    assert shown[:2] == ["0:a  2", "1:s3://b/c  1"]
    assert shown[2] == "asked: mixture weights 1:s3://b/c = 4"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        request(tmp_path, ["0=1"])


def test_show_lists_adopted_changes_and_the_weights_now(run):
    request(run, ["s3://b/c=4"])
    request(run, ["0=0.5"], at=90)
    event = {"kind": "weights", "step": 72, "weights": {"1:s3://b/c": 4.0}}
    lines = [{"step": 70, "loss": 1.0}, {"kind": "change", "step": 71, "event": event}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "change", "st')
    shown = show(run).splitlines()
    assert shown[:2] == ["0:a  2", "1:s3://b/c  4  (recipe: 1)"]
    assert shown[2] == "adopted from step 72 on: mixture weights 1:s3://b/c = 4"
    assert shown[3] == "asked from step 90 on: mixture weights 0:a = 0.5"


def test_a_finished_run_is_refused(run):
    checkpoint = run / "checkpoints" / "step-00001000"
    checkpoint.mkdir(parents=True)
    request(run, ["0=1"])  # it is not whole yet
    (checkpoint / "manifest.json").write_text("{}")
    for ask in (lambda: request(run, ["0=2"]), lambda: add(run, ["more=1"], like="0")):
        with pytest.raises(ValueError, match="has finished its 1000 steps"):
            ask()


@pytest.mark.parametrize(
    "line",
    [
        b"not json", b"\xff\xfe", b"[" * 20_000, b'{"kind": ["a"], "step": 1}', b'{"kind": "skip", "step": 1, "steps": 1e99}',
        b'{"kind": "weights", "step": 1' + b"0" * 40 + b', "weights": {"0:a": 1}}',
        b'{"kind": "quarantine", "step": 1, "entry": "0:a", "episode": "x"}',
        b'{"kind": "priority", "step": 1, "entry": ["x"], "prefer": "return"}',
        b'{"kind": "priority", "step": 1, "entry": "0:a", "file": "/nope", "digest": "x"}',
        b'{"kind": "dataset", "step": 1, "entry": 3, "dataset": 5, "digest": 1, "like": "zz", "weight": 1}',
        b'{"kind": "weights", "step": 1, "weights": {"0:a": 0, "1:s3://b/c": 0}}',
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_passed_over(run, line, capsys, caplog):
    fresh = follow(run, running())
    good = {"kind": "weights", "step": 5, "weights": {"0:a": 3}}
    (run / REQUESTS).write_bytes(line + b"\n" + json.dumps(good).encode() + b"\n")
    assert fresh() == [good]
    assert REQUESTS in capsys.readouterr().err + caplog.text
