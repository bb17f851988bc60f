"""Requests for new weights reach a run once each, whole, and only for lines that it has."""

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


def test_a_request_is_seen_once_and_whole(run):
    request(run, ["a=0.5"])
    fresh = follow(run)
    assert fresh() == []  # made before this run began
    request(run, ["1=3", "0=1"], at=70)
    with open(run / REQUESTS, "a") as file:
        file.write('{"step": 1, "ki')  # still being written
    assert fresh() == [{"step": 70, "kind": "weights", "weights": {"1:s3://b/c": 3.0, "0:a": 1.0}}]
    with open(run / REQUESTS, "a") as file:
        file.write('nd": "weights", "weights": {}}\n')
    assert fresh() == [{"step": 1, "kind": "weights", "weights": {}}]
    assert fresh() == []


@pytest.mark.parametrize("wrong", ["b=1", "0", "0=-1", "0=nan", "0=inf", "2=1", "0=x"])
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(run, wrong):
    with pytest.raises(ValueError, match="weight"):
        request(run, ["1=1", wrong])
    assert not (run / REQUESTS).exists()


def test_show_lists_weights_and_requests(run):
    request(run, ["s3://b/c=4"])
    shown = show(run).splitlines()
    assert shown[:2] == ["0:a  2", "1:s3://b/c  1"]
    assert json.loads(shown[2].removeprefix("asked: "))["weights"] == {"1:s3://b/c": 4.0}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        request(tmp_path, ["0=1"])
