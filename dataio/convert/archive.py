"""Untrusted zip archives. Members are read forward, never extracted to disk, and cannot expand beyond their limits."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, cast

from tiphys.dataio.convert.limits import EPISODE_BYTES, FILES, RATIO, RATIO_FREE, check_size
from tiphys.dataio.convert.source import SourceUnavailable
from tiphys.dataio.episode import DataError


@contextmanager
def open_zip(stream: BinaryIO, where: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip and check its directory.

    Raises DataError if the directory is unreadable, has too many members or lists a member twice, or if a member is
    encrypted, uses an unsupported compression method or states an implausible compression ratio.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except SourceUnavailable:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, OverflowError) as error:
        raise DataError(f"{where}: not a readable zip ({error})") from None
    with archive:
        seen: set[str] = set()
        if len(archive.filelist) > FILES:
            raise DataError(f"{where}: has {len(archive.filelist):,} members; at most {FILES:,} are read")
        for member in archive.filelist:
            here = f"{where}, member {member.filename!r}"
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{here}: is encrypted or uses a compression method other than deflate")
            if member.filename in seen:
                raise DataError(f"{here}: is listed twice")
            seen.add(member.filename)
            if member.file_size > RATIO_FREE and member.file_size > RATIO * max(member.compress_size, 1):
                raise DataError(
                    f"{here}: {member.compress_size:,} compressed bytes claim to hold {member.file_size:,} bytes; "
                    "refused as a decompression bomb"
                )
        yield archive


@contextmanager
def open_member(
    archive: zipfile.ZipFile, name: str, where: str, limit: int = EPISODE_BYTES
) -> Iterator[tuple[BinaryIO, int]]:
    """(stream, size) of a member. zipfile reads at most the size stated in the directory, and checks the CRC."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise DataError(f"{where}: has no member {name!r}") from None
    check_size(info.file_size, limit, f"{where}, {name}")
    try:
        with archive.open(info) as stream:
            yield cast(BinaryIO, _MemberStream(stream, f"{where}, {name}")), info.file_size
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OverflowError, ValueError, OSError) as error:
        if isinstance(error, DataError | SourceUnavailable):
            raise
        raise DataError(f"{where}, {name}: the member is damaged ({error})") from None


class _MemberStream(io.RawIOBase):
    """A member's stream. Its errors name the member."""

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
        except SourceUnavailable:
            raise
        except Exception as error:
            raise DataError(f"{self._where}: the member is damaged ({type(error).__name__}: {error})") from None
        view[: len(data)] = data
        return len(data)
