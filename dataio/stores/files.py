"""The backend of a local folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.atomic import TEMPORARY, atomic_file
from tiphys.dataio.stores.backend import Changed, ObjectInfo, Refused

if TYPE_CHECKING:
    from typing_extensions import Buffer


class LocalBackend:
    """A local folder. Its ETags are made of inode, time and size of a file. Writes are atomic."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, key: str) -> Path:
        """The file of an object."""
        return self.root / key

    def ranges(
        self, key: str, starts: Sequence[int], sizes: Sequence[int], etag: str
    ) -> tuple[list[bytes], ObjectInfo]:
        """Several ranges at once. Raises `Changed` if `etag` is given and differs."""
        # without O_NONBLOCK, opening a pipe would wait for its writer
        handle = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(handle, "rb", buffering=0) as file:
            info = _local_info(os.fstat(handle))
            if etag and info.etag != etag:
                raise Changed
            return [_pread(file.fileno(), size, start) for start, size in zip(starts, sizes, strict=True)], info

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        (part,), info = await asyncio.to_thread(self.ranges, key, [start], [size], etag)
        return part, info

    async def head(self, key: str) -> ObjectInfo:
        return _local_info(os.stat(self.path(key)))

    async def put(self, key: str, source: bytes | Path) -> None:
        await asyncio.to_thread(self._put, key, source)

    def _put(self, key: str, source: bytes | Path) -> None:
        target = self.path(key)
        with atomic_file(target) as file:
            if isinstance(source, Path):
                with open(source, "rb") as origin:
                    shutil.copyfileobj(origin, file, 1 << 20)
            else:
                file.write(source)

    async def keys(self, folder: str) -> list[str]:
        found = []
        for parent, _, names in os.walk(self.path(folder)):
            found += [os.path.relpath(os.path.join(parent, n), self.root) for n in names]
        return sorted(f for f in found if not TEMPORARY.search(f))

    async def delete(self, key: str) -> None:
        self.path(key).unlink()


def _local_info(found: os.stat_result) -> ObjectInfo:
    """Raises Refused if it is neither a file nor, for `head`, a folder."""
    if not stat.S_ISREG(found.st_mode):
        raise (
            IsADirectoryError(21, "it is a folder")
            if stat.S_ISDIR(found.st_mode)
            else Refused("it is not a regular file")
        )
    return ObjectInfo(found.st_size, f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}")


def _pread(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    while 0 < len(data) < size:  # a read may return fewer bytes: at 2 GiB, or on a network mount
        more = os.pread(file, size - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
