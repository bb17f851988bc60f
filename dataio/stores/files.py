"""The backend of a local folder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.atomic import TEMPORARY, atomic_file
from tiphys.dataio.stores.backend import Changed, ObjectInfo, Refused, pause

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

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        if etag and (await self.head(key)).etag == etag:
            return None
        return await self.fetch(key, 0, limit, "")

    async def put(self, key: str, source: bytes | Path, rate: int = 0) -> None:
        await asyncio.to_thread(self._put, key, source, rate)

    def _put(self, key: str, source: bytes | Path, rate: int) -> None:
        target = self.path(key)
        with atomic_file(target) as file:
            if isinstance(source, Path):
                began = time.monotonic()
                with open(source, "rb") as origin:
                    while part := origin.read(1 << 20):
                        file.write(part)
                        time.sleep(pause(file.tell(), began, rate))
            else:
                file.write(source)

    async def replace(self, key: str, data: bytes, etag: str) -> None:
        await asyncio.to_thread(self._replace, key, data, etag)

    def _replace(self, key: str, data: bytes, etag: str) -> None:
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # other writers wait, also those of other processes
            found = _local_info(os.stat(target)).etag if target.exists() else ""
            if found != etag:
                raise Changed
            self._put(key, data, 0)
        finally:
            os.close(folder)

    async def times(self, folder: str) -> dict[str, float]:
        found = {}
        for key in await self.keys(folder):
            with contextlib.suppress(FileNotFoundError):
                found[key] = self.path(key).stat().st_mtime
        return found

    async def keys(self, folder: str) -> list[str]:
        found = []
        for parent, _, names in os.walk(self.path(folder)):
            found += [os.path.relpath(os.path.join(parent, n), self.root) for n in names]
        return sorted(f for f in found if not TEMPORARY.search(f))

    async def delete(self, key: str) -> None:
        self.path(key).unlink()


def _local_info(found: os.stat_result) -> ObjectInfo:
    """Raises Refused if it is no file."""
    if not stat.S_ISREG(found.st_mode):
        raise Refused("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
    return ObjectInfo(found.st_size, f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}")


def _pread(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    while 0 < len(data) < size:  # a read may return fewer bytes: at 2 GiB, or on a network mount
        more = os.pread(file, size - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
