"""Trackers get every line of metrics.jsonl once, whatever fails and whoever resumes. The real W&B and MLflow are read back."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launch.small_recipe import GOLDEN, small_recipe
from tests.pretrain.training import train
from tests.processes import alone
from tiphys.launch.check import check
from tiphys.pretrain.callbacks import track
from tiphys.pretrain.callbacks.metrics_writer import _drop_later
from tiphys.pretrain.callbacks.track import Tracked, TrackRun, send_rest
from tiphys.recipes.load import RecipeError
from tiphys.recipes.sections.results import Track

Sent = tuple[int, dict[str, float]]


class Fake:
    """A tracker in memory. It fails at the steps in `bad`."""

    sent: list[Sent] = []
    ids: set[str] = set()
    bad: set[int] = set()
    finished = 0

    def __init__(self, project: str, name: str, id: str, config: Mapping[str, Any], folder: str) -> None:
        assert (project, name, config) == ("nightly", "run", {"name": "small"})
        self.ids.add(id)

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        if step in self.bad:
            raise ConnectionError("https://user:secret@host/x?key=secret is gone")
        self.sent.append((step, dict(numbers)))

    def finish(self) -> None:
        type(self).finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    found = type("Mine", (Fake,), {"sent": [], "ids": set(), "bad": set()})
    monkeypatch.setitem(track.TRACKERS, "wandb", found)
    monkeypatch.setattr(track, "_LOOK", 0.01)
    return found


def run(folder: Path) -> Tracked:
    return Tracked("small", str(folder), {"name": "small"})


def trainer(rank: int = 0) -> Any:
    return SimpleNamespace(world=SimpleNamespace(rank=rank))


def launch(folder: Path, *steps: int, after: int | None = None, to: str = "wandb", rank: int = 0) -> None:
    """A launch that does these steps. It resumes after step `after`, or after all that was done."""
    folder.mkdir(exist_ok=True)
    if after is not None:
        _drop_later(folder / "metrics.jsonl", after)
    callback = TrackRun(Track([to], "nightly", "run"), run(folder))
    callback.on_start(trainer(rank))
    write(folder, *steps)
    callback.close(trainer(rank))


def write(folder: Path, *steps: int) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": step / 2, "loss_by_task": {"reach": 1.0}}) + "\n")
            if step % 3 == 0:
                for kind in ("validation", "validation", "evaluation"):
                    file.write(json.dumps({"kind": kind, "step": step, "loss": 9}) + "\n")
                file.write(json.dumps({"kind": "publication", "step": step, "said": "done"}) + "\n")


def expected(*steps: int) -> list[Sent]:
    out: list[Sent] = []
    for step in steps:
        out.append((step, {"train/loss": step / 2, "train/loss_by_task/reach": 1.0}))
        out += [(step, {f"{kind}/loss": 9}) for kind in ("validation", "validation", "evaluation") if step % 3 == 0]
    return out


def test_a_resumed_run_sends_what_is_missing_and_nothing_twice(tmp_path: Path, fake: type[Fake]) -> None:
    launch(tmp_path, 1, 2, 3, 4, 5)
    assert fake.sent == expected(1, 2, 3, 4, 5)
    launch(tmp_path, 3, 4, 5, 6, 7, after=2)
    assert fake.sent == expected(*range(1, 8))
    launch(tmp_path)
    assert fake.sent == expected(*range(1, 8))
    assert len(fake.ids) == 1


def test_a_run_that_was_tracked_late_is_filled_in(tmp_path: Path, fake: type[Fake]) -> None:
    write(tmp_path, *range(1, 250))
    launch(tmp_path, 250)
    assert fake.sent == expected(*range(1, 251))


def test_a_failing_tracker_is_one_warning(tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    fake.bad = {3}
    launch(tmp_path, 1, 2, 3, 4)
    said = capsys.readouterr().err
    assert said.count("track.to: wandb failed") == 1
    assert "secret" not in said
    assert fake.sent == expected(1, 2)
    fake.bad = set()
    launch(tmp_path, 5, 6)
    assert fake.sent == expected(*range(1, 7))


def test_any_sequence_of_crashes_sends_each_line_once(tmp_path: Path, fake: type[Fake]) -> None:
    rng = random.Random(0)
    for case in range(20):
        folder, step = tmp_path / str(case), 0
        fake.sent.clear()
        while step < 12:
            after = rng.randint(0, step)
            stop = rng.randint(after, 12)
            fake.bad = {rng.randint(1, 12)} if rng.random() < 0.5 else set()
            launch(folder, *range(after + 1, stop + 1), after=after)
            step = stop
        fake.bad = set()
        launch(folder)
        assert sorted(fake.sent, key=str) == sorted(expected(*range(1, 13)), key=str)


def test_lines_after_training_and_other_ranks(tmp_path: Path, fake: type[Fake]) -> None:
    launch(tmp_path, 1, 2, rank=1)
    assert fake.sent == []
    launch(tmp_path, 3)
    finished = fake.finished
    send_rest(Track(["wandb"], "nightly", "run"), run(tmp_path))
    assert fake.finished == finished  # there was nothing to send
    write(tmp_path, 4)
    send_rest(Track(["wandb"], "nightly", "run"), run(tmp_path))
    assert fake.sent == expected(1, 2, 3, 4)


def test_names_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small_recipe(GOLDEN / "cart"))
    with pytest.raises(RecipeError, match="Did you mean 'wandb'"):
        check(recipe, ["track.to=[wandbb]"], data=False)
    monkeypatch.setattr("tiphys.launch.checks.trackers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"wandb is not installed; install it with: pip install 'tiphys\[wandb\]'"):
        check(recipe, ["track.to=[wandb]"], data=False)


def trained(folder: Path, to: str, steps: int) -> None:
    """A run of the trainer itself, that resumes from the newest checkpoint there is."""
    tracked = TrackRun(Track([to], "nightly", "run"), run(folder))
    assert train(folder, steps, more=[tracked])[0]


def cut_off(folder: Path) -> None:
    """As if the machine had failed before the newest checkpoint: its steps are done again."""
    newest = max((folder / "checkpoints").iterdir())
    shutil.rmtree(newest)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "kind" not in line}


def test_a_training_that_resumes_sends_each_step_once(tmp_path: Path, fake: type[Fake]) -> None:
    alone()
    trained(tmp_path, "wandb", 4)  # checkpoints after steps 3 and 4
    cut_off(tmp_path)
    trained(tmp_path, "wandb", 6)
    found = [(step, numbers["train/loss"]) for step, numbers in fake.sent if "train/loss" in numbers]
    assert found == list(losses(tmp_path).items())
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    assert len(fake.ids) == 1


def test_mlflow_has_each_step_of_a_training_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("mlflow.tracking", reason="needs the mlflow extra").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    alone()
    trained(tmp_path, "mlflow", 4)
    cut_off(tmp_path)
    trained(tmp_path, "mlflow", 6)
    found = client()
    (mine,) = found.search_runs([found.get_experiment_by_name("nightly").experiment_id])
    history = found.get_metric_history(mine.info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == pytest.approx(losses(tmp_path))
    assert len(history) == 6


def test_mlflow_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("mlflow.tracking", reason="needs the mlflow extra").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    launch(tmp_path, 1, 2, 3, to="mlflow")
    launch(tmp_path, 3, 4, 5, after=2, to="mlflow")
    found = client()
    experiment = found.get_experiment_by_name("nightly")
    (mine,) = found.search_runs([experiment.experiment_id])
    history = found.get_metric_history(mine.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, step / 2) for step in range(1, 6)]
    assert (mine.data.params["name"], mine.info.run_name, mine.info.status) == ("small", "run", "FINISHED")


def test_wandb_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the wandb extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    launch(tmp_path, 1, 2, 3, to="wandb")
    launch(tmp_path, 3, 4, 5, after=2, to="wandb")
    rows, ids = [], set()
    for file in sorted(tmp_path.glob("track/wandb/offline-run-*/*.wandb")):
        found, run_id = history(file)
        rows += found
        ids.add(run_id)
    assert len(ids) == 1
    assert sorted((row["step"], row["train/loss"]) for row in rows if "train/loss" in row) == [
        (step, step / 2) for step in range(1, 6)
    ]


def history(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows and the run's id in a file that W&B wrote offline."""
    from wandb.proto import wandb_internal_pb2

    rows, run_id = [], ""
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
        elif record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
    return rows, run_id


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: 7 bytes of its own, then a log as LevelDB writes it, in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""
