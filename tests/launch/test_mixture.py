"""Every request for new weights reaches a run once, complete, and only if the run has the entry."""

import json

import pytest

from tiphys.launch.mixture import REQUESTS, follow, request, show

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


def test_a_request_is_seen_once_and_complete(run):
    request(run, ["a=0.5"])
    fresh = follow(run)
    assert fresh() == []  # older than this call of follow
    request(run, ["1=3", "0=1"], at=70)
    with open(run / REQUESTS, "a") as file:
        file.write('{"step": 1, "ki')  # half written
    assert fresh() == [{"step": 70, "kind": "weights", "weights": {"1:s3://b/c": 3.0, "0:a": 1.0}}]
    with open(run / REQUESTS, "a") as file:
        file.write('nd": "weights", "weights": {}}\n')
    assert fresh() == [{"step": 1, "kind": "weights", "weights": {}}]
    assert fresh() == []


@pytest.mark.parametrize("wrong", ["b=1", "0", "0=-1", "0=nan", "0=inf", "2=1", "0=x"])
def test_an_invalid_request_is_refused_and_nothing_is_written(run, wrong):
    with pytest.raises(ValueError, match="weight"):
        request(run, ["1=1", wrong])
    assert not (run / REQUESTS).exists()


def test_show_lists_weights_and_requests(run):
    request(run, ["s3://b/c=4"])
    shown = show(run).splitlines()
    assert shown[:2] == ["0:a  2", "1:s3://b/c  1"]
    assert json.loads(shown[2].removeprefix("asked: "))["weights"] == {"1:s3://b/c": 4.0}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        request(tmp_path, ["0=1"])
