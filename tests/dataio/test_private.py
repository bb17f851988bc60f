"""Another user's links and folders where a cache would be are refused, and nothing behind them changes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dataio.making import small_dataset
from tiphys.dataio.caching.tiers import DiskTier, InheritedTier
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.private import is_private, open_private, private_folder, read_regular
from tiphys.dataio.storage import Store
from tiphys.launch.node_cache import survey


def link(folder: Path, outside: Path) -> None:
    folder.symlink_to(outside)


def for_everybody(folder: Path, outside: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def tier(folder: Path) -> DiskTier:
    return DiskTier(1 << 20, 1 << 16, np.array([1 << 12, 1 << 16]), str(folder), "x")


@pytest.mark.parametrize("plant", [link, for_everybody])
def test_a_folder_that_may_hold_the_files_of_others_is_refused(tmp_path: Path, plant: Callable[..., None]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    plant(tmp_path / "loader-0", outside)
    with pytest.raises(DataError, match="is not used as a cache, because"):
        tier(tmp_path / "loader-0")
    assert InheritedTier.open(str(tmp_path / "loader-0"), "x") is None
    assert survey(tmp_path, 0, 1 << 20, []) == []  # a left-over folder would be removed, and its record rewritten
    assert not list(outside.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "cache")
    os.chown(folder, 12345, -1)
    assert not is_private(folder)
    with pytest.raises(DataError, match="belongs to another user"):
        private_folder(folder)


def test_our_own_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    for folder in (tmp_path / "cache", tmp_path / "new" / "cache"):
        assert private_folder(folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["items", "journal", "geometry.json", "lock", "journal.new", "home.json"])
@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling"])
def test_links_within_a_cache_folder_change_nothing_elsewhere(tmp_path: Path, name: str, kind: str) -> None:
    precious = b"precious" * (1 << 18)  # more bytes than the tier has room for
    target, folder = tmp_path / "precious", private_folder(tmp_path / "loader-0")
    tier(folder).close()  # so that what is planted beside its files is believed
    (folder / name).unlink(missing_ok=True)
    if kind != "dangling":
        target.write_bytes(precious)
    (folder / name).hardlink_to(target) if kind == "hard" else (folder / name).symlink_to(target)
    with contextlib.suppress(DataError, OSError):  # then the run stops with a sentence
        used = tier(folder)
        used.write(np.array([0]), np.array([1]), {1: memoryview(b"x" * 100)})
        used.flush()
        used.close()
    survey(tmp_path, 0, 1 << 20, [])
    assert target.exists() == (kind != "dangling")
    assert kind == "dangling" or target.read_bytes() == precious


def test_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        open_private(tmp_path / "link", os.O_RDONLY)


def test_a_forged_or_damaged_decoded_index_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, index = small_dataset(str(tmp_path / "d"))
    cache = tmp_path / "cache"
    steps = np.array(EpisodeIndex.open(index.url, str(cache)).steps)
    (folder,) = (cache / "index").iterdir()
    np.save(folder / "steps.npy", np.ones_like(steps))
    assert (EpisodeIndex.open(index.url, str(cache)).steps == steps).all()
    os.truncate(folder / "rows.npy", 200)
    assert (EpisodeIndex.open(index.url, str(cache)).steps == steps).all()
    stolen = tmp_path / "stolen"
    folder.rename(stolen)
    np.save(stolen / "steps.npy", np.ones_like(steps))
    folder.symlink_to(stolen)
    assert (EpisodeIndex.open(index.url, str(cache)).steps == steps).all()
    assert caplog.text.count("is made again") == 3
    assert stolen.is_dir()


def test_only_regular_files_of_limited_size_are_read_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a regular file"):
        read_regular("/dev/zero", 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        Store(str(tmp_path)).read("pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    assert read_regular(tmp_path / "large", 11) == bytes(11)
    with pytest.raises(DataError, match="more than 10 bytes"):
        Store(str(tmp_path)).read("large", 10)
