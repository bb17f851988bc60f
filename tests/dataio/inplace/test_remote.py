"""LeRobot datasets in stores: how many requests an index costs, and what a hub's signatures and quotas do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dataio.inplace.made import CAMERAS, LENGTHS, batches, source
from tests.dataio.signing_hub import COMMIT, SigningHub, hub_of
from tests.servers import moto_server, s3_environment
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.inplace.prepare import prepare
from tiphys.dataio.storage import Store, StoreError

HUB = "hf://datasets/owner/robot"
TOP = "observation.images.top"


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("raw") / "robot")


@pytest.fixture
def hub(robot: Path) -> Iterator[SigningHub]:
    with hub_of(robot) as server:
        yield server


def test_a_dataset_on_a_hub_is_pinned_and_each_video_costs_two_reads(
    hub: SigningHub, robot: Path, tmp_path: Path
) -> None:
    index = index_lerobot(HUB, str(tmp_path / "indexed"))
    videos = [s for s in index.shards if s.name.endswith(".mp4")]
    assert len(videos) == sum(map(len, CAMERAS.values()))
    assert all(s.name.startswith(f"{HUB}@{COMMIT}/") and s.etag for s in videos)
    reads = Counter(path for path, _ in hub.reads if path.endswith(".mp4"))
    first = {f"videos/{camera}/chunk-000/file-000.mp4" for camera in CAMERAS}  # a picture tells size and bits
    assert all(count <= 2 for path, count in reads.items() if path not in first)
    local = index_lerobot(str(robot), str(tmp_path / "local"))
    assert list(index.ids) == list(local.ids)
    assert batches(index, stop=2) == batches(local, stop=2)
    assert set(hub.keys) == {""}  # the key of the hub is not sent to the store


def test_the_index_of_a_hub_is_made_once_and_opened_by_the_name_without_a_commit(
    hub: SigningHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIPHYS_CACHE", str(tmp_path / "cache"))
    place = prepare(HUB)
    assert prepare(HUB) == place
    assert EpisodeIndex.open(HUB).episodes == len(LENGTHS)


def test_a_file_is_resolved_once_until_its_signature_expires(hub: SigningHub, robot: Path) -> None:
    store, path = Store(f"{HUB}@{COMMIT}"), f"videos/{TOP}/chunk-000/file-001.mp4"
    data = (robot / path).read_bytes()
    for start in range(0, 2000, 100):
        assert bytes(store.read_ranges(path, [start], [50], len(data))[0]) == data[start : start + 50]
    assert hub.resolved == [path]
    hub.signature = "two"
    assert bytes(store.read_ranges(path, [7], [50])[0]) == data[7:57]
    assert hub.resolved == [path, path]
    with pytest.raises(FileNotFoundError):
        store.head("missing.mp4")


def test_a_quota_is_waited_for(hub: SigningHub, robot: Path) -> None:
    hub.limited = 2
    path = "meta/info.json"
    assert Store(f"{HUB}@{COMMIT}").read(path) == (robot / path).read_bytes()
    assert hub.resolved == [path]


def test_of_a_server_that_ignores_ranges_no_more_is_read_than_was_asked_for(hub: SigningHub, robot: Path) -> None:
    hub.whole = True
    path = f"videos/{TOP}/chunk-000/file-001.mp4"
    data, store = (robot / path).read_bytes(), Store(f"{HUB}@{COMMIT}", attempts=1)
    assert bytes(store.read_ranges(path, [0], [100], len(data))[0]) == data[:100]
    found = store.read_new(path)
    assert found is not None
    assert found[0] == data
    with pytest.raises(StoreError, match="sends whole files and no parts of them"):
        store.read_ranges(path, [7], [100], len(data))


def test_a_video_that_was_replaced_is_not_mixed_with_its_index(
    hub: SigningHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_lerobot(HUB, str(tmp_path / "indexed"))
    read_episode(index, 0)
    monkeypatch.setattr("tests.dataio.signing_hub._etag", lambda data: '"another"')
    with pytest.raises(OSError, match="ETag changed"):
        read_episode(EpisodeIndex.open(index.url), 0)


def test_a_published_index_is_used_from_another_machine(robot: Path, tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="needs the dev extra")
    with moto_server() as endpoint, s3_environment(endpoint):
        bucket = Store("s3://bucket/robot")
        for file in sorted(p for p in robot.rglob("*") if p.is_file()):
            bucket.upload(str(file.relative_to(robot)), str(file))
        made = index_lerobot("s3://bucket/robot", "s3://bucket/index")
        other = EpisodeIndex.open("s3://bucket/index", str(tmp_path / "other"))
        assert other.fingerprint == made.fingerprint
        local = index_lerobot(str(robot), str(tmp_path / "local"))
        assert batches(other, stop=2) == batches(local, stop=2)
        path = f"videos/{TOP}/chunk-000/file-002.mp4"
        bucket.write(path, (robot / path).read_bytes()[:-1] + b"\1")
        with pytest.raises(OSError, match="ETag changed"):
            read_episode(other, 6)
