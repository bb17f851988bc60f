"""A policy is found in a folder, a bucket or a hub; only files of a policy are fetched; refusals are sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="needs the envs extra")
pytest.importorskip("minigrid", reason="needs the envs extra")
pytest.importorskip("moto", reason="needs the dev extra")

import tests.pretrain.acting.acting_fixtures as acting
from tests.servers import moto_server, s3_environment
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import Store, StoreError
from tiphys.dataio.stores.objects import _translated
from tiphys.launch.cli import main
from tiphys.launch.statuses import Status
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.follow import follower
from tiphys.pretrain.hub_errors import FetchError
from tiphys.pretrain.policy_files import local_policy
from tiphys.pretrain.publish import PublishError, publish
from tiphys.pretrain.sources import code_files

pytestmark = pytest.mark.envs
URL = "s3://bucket/policies/small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return acting.folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[Store]:
    with moto_server() as endpoint, s3_environment(endpoint):
        publish(folder, URL)
        yield Store(URL)


def test_a_policy_acts_from_a_bucket(folder: Path, bucket: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert Policy.load(URL).tasks == Policy.load(folder).tasks
    found = evaluate(URL, [acting.CART], episodes=2, processes=1)
    assert found == evaluate(folder, [acting.CART], episodes=2, processes=1)
    words = ["--tasks", acting.CART, "--episodes", "1", "--processes", "1"]
    assert main(["evaluate", URL, *words]) == Status.DONE
    assert acting.CART in capsys.readouterr().out


def test_a_policy_goes_from_a_bucket_to_a_folder_with_its_code(bucket: Store, tmp_path: Path) -> None:
    assert main(["publish", URL, str(tmp_path / "copy")]) == Status.DONE
    (step,) = (tmp_path / "copy" / "steps").iterdir()
    names = {p.name for p in step.iterdir()}
    assert {"model.safetensors", "processor.json", *code_files()} <= names


def test_only_files_of_a_policy_are_fetched(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ("transformer.py", "model.bin", "sub/config.json", "model-1-of-2.safetensors", "processor.json.pkl")
    for name in foreign:
        bucket.write(name, b"x")
    got = {p.name for p in local_policy(URL).rglob("*")}
    assert {"config.json", "model.safetensors", "processor.json"} <= got
    assert not {Path(name).name for name in foreign if name != "sub/config.json"} & got
    monkeypatch.setattr(follower, "LARGEST_TEXT", 10)
    with pytest.raises(DataError, match=r"config.json: \d+ bytes are too many"):
        local_policy(URL)


def test_what_is_not_there_is_named(bucket: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="s3://bucket/none: there is no policy"):
        local_policy("s3://bucket/none")
    for words in (["evaluate", "s3://nobody/policy"], ["evaluate", "s3://bucket/none"], ["evaluate", str(tmp_path)]):
        assert main(words) == Status.REFUSED
        said = capsys.readouterr().err
        assert words[1] in said
        assert "Traceback" not in said
    with pytest.raises(StoreError, match=r"s3://nobody/policy/.*there is no such bucket"):
        local_policy("s3://nobody/policy")


def test_missing_credentials_say_so() -> None:
    from obstore.exceptions import GenericError

    text = "Error performing PUT http://169.254.169.254/latest/api/token in 3ms - Server returned status code: 403"
    found = _translated(GenericError(text), "key")
    assert isinstance(found, PermissionError)
    assert "AWS_ACCESS_KEY_ID" in str(found)
    unreachable = _translated(
        GenericError("Error performing PUT http://169.254.169.254/latest/api/token: timeout"), "key"
    )
    assert str(unreachable).startswith("no credentials")


@pytest.mark.parametrize("damage", ["weights cut off", "other model", "other sizes", "no processor", "bad processor"])
def test_a_damaged_policy_is_a_sentence(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "policy")
    config, weights, processor = (
        tmp_path / "policy" / n for n in ("config.json", "model.safetensors", "processor.json")
    )
    if damage == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other model":
        config.write_text('{"model_type": "bert"}')
    elif damage == "other sizes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    elif damage == "no processor":
        processor.unlink()
    else:
        processor.write_text('{"version": 1}')
    assert main(["evaluate", str(tmp_path / "policy")]) == Status.REFUSED
    said = capsys.readouterr().err
    assert str(tmp_path / "policy") in said
    assert "Traceback" not in said


def test_a_device_that_is_not_there_is_refused_before_any_process_starts(folder: Path) -> None:
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(DataError, match=device):
            evaluate(folder, [acting.CART], episodes=1, device=device)


def test_a_hub_that_is_off_or_refuses_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for error in (ConnectionError("no route"), TimeoutError("slow"), RuntimeError("no hf_abcdefghij0123")):

        def fails(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
        for kind, act in (
            (PublishError, lambda: publish(folder, "hf://a/b")),
            (FetchError, lambda: local_policy("hf://a/b")),
        ):
            with pytest.raises(kind, match=r"hf://a/b: the hub .* cannot be reached") as caught:
                act()
            assert "\n" not in str(caught.value)
            assert "abcdefghij" not in str(caught.value)


def test_the_result_s_folder_is_made_before_anything_is_played(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evaluate(folder, [acting.CART], episodes=10**6, processes=1, out=tmp_path / "file" / "found.json")
