"""What a user or a machine causes is a sentence with a status; a failed end of a run loses nothing before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tiphys.dataio.environments.workers import WorkerLost
from tiphys.dataio.episode import DataError
from tiphys.dataio.loader import LoaderLost
from tiphys.dataio.storage import AccessError, ObjectChanged, StoreError
from tiphys.launch import finish as ends
from tiphys.launch.lease import FolderInUse
from tiphys.launch.refusals import OF_A_RANK, outside, sentence, show, status_of
from tiphys.launch.statuses import Status
from tiphys.pretrain.checkpoint import Checkpoint
from tiphys.pretrain.checkpoint_files import CheckpointError, StorageFull
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.policy_files import FetchError
from tiphys.pretrain.publish import PublishError
from tiphys.pretrain.trainer import Diverged
from tiphys.recipes.load import load_recipe
from tiphys.recipes.schema import Recipe

RECIPE = """
name: small
data: {{mixture: [{{dataset: data}}]}}
deepspeed: {{train_batch_size: 4}}
evaluate: {{tasks: [CartPole-v1]}}
publish: {{to: "hf://owner/name"}}
run: {{dir: {run}}}
"""


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("c"), PublishError("p"), FetchError("f"), WorkerLost("w"), DataError("d"),
        OSError(28, "full"), PermissionError(13, "no"), MemoryError(), ImportError("i"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_a_rank_meets_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(error, OF_A_RANK) == status_of(error) == Status.REFUSED
    show(error, Status.REFUSED)
    said = capsys.readouterr().err
    assert said.startswith("tiphys: ")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error, status",
    [
        (LoaderLost("it was killed twice"), Status.GAVE_UP),
        (StoreError("s3://bucket/key: the store does not answer"), Status.GAVE_UP),
        (ConnectionResetError(104, "reset"), Status.GAVE_UP),
        (OSError(116, "Stale file handle"), Status.GAVE_UP),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), Status.GAVE_UP),
        (AccessError("no credentials"), Status.REFUSED),
        (ObjectChanged("it was replaced"), Status.REFUSED),
        (FileNotFoundError(2, "no such file"), Status.REFUSED),
        (FolderInUse("runs/x is trained by host a"), Status.IN_USE),
        (StorageFull("no checkpoint could be written"), Status.STORAGE_FULL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_class_of_an_error_decides_whether_another_launch_can_help(error: Exception, status: Status) -> None:
    assert status_of(error, OF_A_RANK) == status


def test_a_machine_is_not_to_blame_for_what_is_outside_it() -> None:
    others = [StoreError("down"), ConnectionResetError(104, "reset"), TimeoutError(), OSError(116, "Stale file handle")]
    own = [
        torch.AcceleratorError("ECC"),
        LoaderLost("killed"),
        OSError(5, "Input/output error"),
        OSError(12, "no memory"),
    ]
    assert [outside(error) for error in (*others, *own)] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyError("x"), RuntimeError("r"), TypeError("t")])
def test_a_defect_of_a_rank_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(error, OF_A_RANK) == Status.CRASHED
    show(error, Status.CRASHED)
    assert type(error).__name__ in capsys.readouterr().err


def test_sentences_name_the_file() -> None:
    assert sentence(PermissionError(13, "Permission denied", "a/b")) == "a/b: Permission denied"
    assert sentence(FileNotFoundError("s3://bucket/key")) == "s3://bucket/key: there is no such file"
    assert sentence(KeyError("this policy has no task 'x'")) == "this policy has no task 'x'"
    assert sentence(KeyError("tasks")) == "KeyError tasks; --traceback shows where"
    assert sentence(MemoryError()).startswith("no memory is left on this machine, or within a limit of it")
    assert sentence(OSError(12, "Cannot allocate memory", "x")) == sentence(MemoryError())
    assert sentence(MemoryError("Unable to allocate 3 GiB for an array")) == "Unable to allocate 3 GiB for an array"


def test_statuses_differ_and_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    for status in Status:
        assert f"| {status.value} |" in page
    assert (Status.IN_USE, Status.DIVERGED, Status.STORAGE_FULL, Status.NOT_SAVED, Status.GAVE_UP) == (4, 5, 6, 70, 75)
    assert not issubclass(Diverged, ValueError | OSError)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run that has trained one step. Export, evaluation and publication write one file each."""
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 1, "rows": 4, "tokens": 9, "loss": 1.0, "seconds": 1.0, "data_wait": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "evaluation.json").write_text('{"tasks": {"of": "an earlier policy"}}')
    (run / "policy").mkdir()
    (run / "policy" / "config.json").write_text("{}")
    checkpoint = type("Saved", (), {"step": 1, "path": run / "checkpoints"})()
    monkeypatch.setattr(Checkpoint, "newest_whole", lambda folder: checkpoint)
    monkeypatch.setattr(ends, "export_policy", lambda recipe, config, processor, checkpoint, folder: folder)
    monkeypatch.setattr(DecisionConfig, "from_recipe", lambda model, vocabulary: None)
    monkeypatch.setattr(ends, "_evaluate", lambda recipe, run, folder, command: {"tasks": {}})
    monkeypatch.setattr(ends, "publish_policy", lambda recipe, folder, found: (run / "published").touch())
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=run))
    return load_recipe(tmp_path / "recipe.yaml")


def fails(error: Exception) -> Any:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def test_a_refused_hub_has_its_status_and_the_report_exists(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ends, "publish_policy", fails(PublishError("hf://owner/name: no")))
    assert ends.finish(recipe, Mock()) == Status.NOT_PUBLISHED
    said = capsys.readouterr()
    assert said.err == "tiphys: not published: hf://owner/name: no\n"
    assert said.out.count("report  ") == 1
    assert (Path(recipe.run.dir) / "report.html").is_file()


def test_a_failed_evaluation_keeps_neither_report_nor_publication_from_being_made(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ends, "_evaluate", fails(DataError("no such task")))
    assert ends.finish(recipe, Mock()) == Status.NOT_EVALUATED
    run = Path(recipe.run.dir)
    assert (run / "report.html").is_file()
    assert (run / "published").is_file()
    assert not (run / "evaluation.json").exists()  # that of an earlier policy would be taken for this one's
    assert capsys.readouterr().err == "tiphys: not evaluated: no such task\n"


def test_the_report_is_there_before_evaluation_and_publication(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Path(recipe.run.dir) / "report.html"

    def killed(*arguments: Any) -> Any:
        assert report.is_file()
        raise KeyboardInterrupt

    for step in ("_evaluate", "publish_policy"):
        report.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(ends, step, killed)
            with pytest.raises(KeyboardInterrupt):
                ends.finish(recipe, Mock())


def test_a_run_without_a_step_publishes_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for saved in (None, type("Saved", (), {"step": 0, "path": Path("none")})()):
        monkeypatch.setattr(Checkpoint, "newest_whole", lambda folder, saved=saved: saved)
        with pytest.raises(CheckpointError, match="no training step was done"):
            ends.finish(recipe, Mock())
    assert not (Path(recipe.run.dir) / "published").exists()


def test_a_report_survives_a_picture_that_could_not_be_drawn(tmp_path: Path) -> None:
    from tiphys.launch.report.page import _pictures

    assert _pictures({"tasks": {"a": {"pictures": [{"seed": 1, "error": "no display"}]}}}, tmp_path) == ""
