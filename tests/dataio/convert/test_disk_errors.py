"""An error of the disk ends a conversion, with --skip-bad too; the same command goes on when the disk works again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.dataio.convert.convert_sources import npz
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.converter import BadEpisode, attempt
from tiphys.dataio.convert.source import Source, SourceUnavailable

# Runs first in the reader process: reads of 001.npz fail as those of a broken disk do.
BROKEN_DISK = """
import errno, io, os

class Disk(io.FileIO):
    def readinto(self, buffer):
        if str(self.name).endswith("001.npz"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)

if os.path.exists(os.environ["BROKEN"]):
    io.FileIO = Disk
"""


def test_a_disk_that_fails_and_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BROKEN_DISK)
    (tmp_path / "broken").touch()
    monkeypatch.setenv("BROKEN", str(tmp_path / "broken"))
    monkeypatch.syspath_prepend(str(site))
    expected = npz(tmp_path / "s")
    with pytest.raises(SourceUnavailable, match=r"001\.npz: \[Errno 5\]"):
        convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1, skip_bad=True)
    assert not (tmp_path / "out/dataset.json").exists()
    (tmp_path / "broken").unlink()
    report = convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1, skip_bad=True)
    assert (report.episodes, report.bad) == (len(expected), ())


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_errors_of_the_system_are_not_malformed_episodes(number: int) -> None:
    def fail() -> Any:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SourceUnavailable):
        attempt(fail, "x")


@pytest.mark.parametrize(
    "error", [OSError("broken data stream"), OSError(errno.EINVAL, "x"), FileNotFoundError(2, "x")]
)
def test_errors_of_the_data_are_malformed_episodes(error: OSError) -> None:
    def fail() -> Any:
        raise error

    assert isinstance(attempt(fail, "x"), BadEpisode)


def test_hdf5_states_the_error_of_the_disk_in_its_text() -> None:
    from tiphys.dataio.convert.hdf5 import check_disk

    text = "Can't read data (file read failed: time = x, errno = 5, error message = 'Input/output error', buf = 0x1)"
    with pytest.raises(SourceUnavailable):
        check_disk(OSError(text), "x")
    check_disk(OSError("Unable to synchronously open file (truncated file: eof = 96, stored_eof = 2048)"), "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_or_folder_that_may_not_be_read(tmp_path: Path) -> None:
    npz(tmp_path / "s")
    (tmp_path / "s/001.npz").chmod(0)
    with pytest.raises(SourceUnavailable, match=r"001\.npz.*Permission denied"):
        convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1, skip_bad=True)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s/locked").mkdir(parents=True)
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceUnavailable, match=r"cannot be listed.*locked"):
        _ = Source(str(tmp_path / "s")).files
