"""Zip archives of strangers: members read forward, never extracted to a disk, never swelling past their bounds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, cast

from tiphys.dataio.convert.limits import EPISODE_BYTES, FILES, RATIO, RATIO_FREE, check_size
from tiphys.dataio.convert.source import Source, SourceUnavailable
from tiphys.dataio.episode import DataError


@contextmanager
def open_zip(stream: BinaryIO, where: str) -> Iterator[zipfile.ZipFile]:
    """A zip whose directory is sound: no encryption, no unknown compression, no absurd ratio, no member twice."""
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, OverflowError) as error:
        raise DataError(f"{where}: not a readable zip ({error})") from None
    with archive:
        seen: set[str] = set()
        if len(archive.filelist) > FILES:
            raise DataError(f"{where}: more than {FILES:,} members")
        for member in archive.filelist:
            here = f"{where}, member {member.filename!r}"
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{here}: encrypted, or compressed in a way that is not read")
            if member.filename in seen:
                raise DataError(f"{here}: is there twice")
            seen.add(member.filename)
            if member.file_size > RATIO_FREE and member.file_size > RATIO * max(member.compress_size, 1):
                raise DataError(
                    f"{here}: {member.compress_size:,} bytes claim to hold {member.file_size:,}; a decompression bomb"
                )
        yield archive


@contextmanager
def open_member(
    archive: zipfile.ZipFile, name: str, where: str, limit: int = EPISODE_BYTES
) -> Iterator[tuple[BinaryIO, int]]:
    """(stream, size) of a member; zipfile gives at most the size that the directory states, and checks the CRC."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise DataError(f"{where}: has no member {name!r}") from None
    check_size(info.file_size, limit, f"{where}, {name}")
    try:
        with archive.open(info) as stream:
            yield cast(BinaryIO, _Guarded(stream, f"{where}, {name}")), info.file_size
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OverflowError, ValueError, OSError) as error:
        if isinstance(error, DataError | SourceUnavailable):
            raise
        raise DataError(f"{where}, {name}: damaged ({error})") from None


class _Guarded(io.RawIOBase):
    """A member's stream whose errors name it."""

    def __init__(self, stream: IO[bytes], where: str):
        self._stream, self._where = stream, where

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        try:
            data = self._stream.read(min(len(view), 1 << 22))
        except Exception as error:
            raise DataError(f"{self._where}: damaged ({type(error).__name__}: {error})") from None
        view[: len(data)] = data
        return len(data)


def zip_of(source: Source, path: str) -> bool:
    """Whether a file begins like a zip."""
    with source.open(path) as stream:
        return stream.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
