"""Credentials that expire during a run: renewed ones are found, otherwise the error comes at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Fault, FaultyFront, Request, moto_server, s3_environment
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.storage import AccessError, Store
from tiphys.dataio.stores.schemes import check_url

DATA = bytes(range(256)) * 400
EXPIRED = Fault(status=400, code="ExpiredToken")


@pytest.fixture(scope="module")
def front() -> Iterator[FaultyFront]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        Store("s3://bucket/data").write("shard", DATA)
        yield front


@pytest.fixture
def accepted(front: FaultyFront, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The access keys that the store accepts."""
    keys = {"first"}

    def rule(request: Request) -> Fault | None:
        header = request.headers.get("authorization", "")
        return None if any(f"Credential={key}/" in header for key in keys) else EXPIRED

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    front.rule = rule
    yield keys
    front.rule = lambda request: None


def read(store: Store) -> None:
    starts = list(range(0, 90_000, 9_000))
    assert store.read_ranges("shard", starts, [100] * 10) == [DATA[s : s + 100] for s in starts]


def test_renewed_keys_of_a_profile_are_found(
    front: FaultyFront, accepted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = a-secret\naws_session_token = a-token\n"
    file.write_text(text.format("first"))
    store = Store("s3://bucket/data")
    read(store)
    accepted.clear()
    front.requests.clear()
    with pytest.raises(AccessError, match=r"shard.*ExpiredToken") as caught:
        read(store)
    assert "a-secret" not in str(caught.value)
    assert "a-token" not in str(caught.value)
    assert len(front.requests) <= 21  # each range once in bulk and once alone, not more
    accepted.add("second")
    file.write_text(text.format("second"))
    read(store)
    assert store.traffic.retries < 60


PROCESS = """
import json, pathlib
print(json.dumps({"Version": 1, "SecretAccessKey": "a-secret", "SessionToken": "a-token",
                  "AccessKeyId": pathlib.Path(FILE).read_text(), "Expiration": "2099-01-01T00:00:00Z"}))
"""


def test_renewed_keys_from_a_program_are_found(
    accepted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    key, script, config = tmp_path / "key", tmp_path / "login.py", tmp_path / "config"
    script.write_text(PROCESS.replace("FILE", json.dumps(str(key))))
    config.write_text(f"[profile work]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    key.write_text("first")
    store = Store("s3://bucket/data")
    read(store)
    accepted.clear()
    accepted.add("second")
    key.write_text("second")
    read(store)
    accepted.clear()
    with pytest.raises(AccessError, match=r"shard.*ExpiredToken"):
        read(store)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secretword@host/data",
        "https://secretword@host/data",
        "https://host/data?X-Amz-Signature=secretword",
        "az://container/data?sig=secretword",
        "sftp://user:secretword@host/data",
        "s3://secretword@bucket/data",
    ],
)
def test_urls_with_credentials_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    for use in (Store, EpisodeIndex.open, lambda u: Store(str(tmp_path)).read(f"{u}/x")):
        with pytest.raises(DataError, match="a URL must not") as caught:
            use(url)
        assert "secretword" not in str(caught.value)


def test_a_user_or_a_container_may_stand_in_a_url() -> None:
    for url in (
        "sftp://user@host/data",
        "abfs://container@account/data",
        "s3://bucket/data",
        "/data?x/y@z",
        "file:///a?b",
    ):
        check_url(url)
