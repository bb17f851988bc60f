"""The backend of all other stores, by fsspec."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import redacted
from tiphys.dataio.stores.backend import Changed, ObjectInfo, Transient

if TYPE_CHECKING:
    from typing_extensions import Buffer


# Keys of fsspec's `info` whose values change if an object is replaced. `ukey` is not usable: it also depends on access times
_VERSIONS = (
    "ETag",
    "etag",
    "checksum",
    "md5",
    "blob_id",
    "version_id",
    "mtime",
    "modified",
    "last_modified",
    "created",
)


_TIMES = ("mtime", "modified", "last_modified", "LastModified", "created")


def _written(info: dict[str, Any]) -> float:
    """When a file was written, in seconds; infinite if the store does not say."""
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    return float(value.timestamp() if hasattr(value, "timestamp") else value) if value is not None else float("inf")


class FsspecBackend:
    """Any other scheme, by fsspec's synchronous interface in threads. Whether `put` is atomic depends on the store."""

    def __init__(self, url: str):
        import fsspec

        self.fs, self.root = fsspec.core.url_to_fs(url)

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}" if key else self.root

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        data = await self._call(self.fs.cat_file, self._path(key), start=start, end=start + size)
        # These stores do not say which version they served: it is looked up the first time, and if bytes are missing
        if not etag or len(data) < size:
            return data, await self.head(key)
        return data, ObjectInfo(-1, etag)

    async def head(self, key: str) -> ObjectInfo:
        self.fs.invalidate_cache(self.fs._parent(self._path(key)))
        info = await self._call(self.fs.info, self._path(key))
        if info["type"] == "directory":
            raise FileNotFoundError(key)
        version = [f"{name}={info[name]}" for name in _VERSIONS if info.get(name)]
        return ObjectInfo(int(info["size"]), ";".join([*version, str(info["size"])]) if version else "")

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        info = await self.head(key)
        if etag and info.etag == etag:
            return None
        return await self._call(self.fs.cat_file, self._path(key), start=0, end=limit), info

    async def put(self, key: str, source: bytes | Path, rate: int = 0) -> None:
        if isinstance(source, Path):
            if rate:  # these stores take whole files only, so the line rests before
                await asyncio.sleep(source.stat().st_size / rate)
            await self._call(self.fs.put_file, str(source), self._path(key))
        else:
            await self._call(self.fs.pipe_file, self._path(key), source)

    async def replace(self, key: str, data: bytes, etag: str) -> None:
        """These stores have no conditions: two writers at the very same moment are not noticed."""
        try:
            found = (await self.head(key)).etag
        except FileNotFoundError:
            found = ""
        if found != etag:
            raise Changed
        await self.put(key, data)

    async def times(self, folder: str) -> dict[str, float]:
        root = self.fs._strip_protocol(self.root).rstrip("/")
        self.fs.invalidate_cache()
        found = await self._call(self.fs.find, self._path(folder), detail=True)
        return {name[len(root) + 1 :]: _written(info) for name, info in found.items()}

    async def keys(self, folder: str) -> list[str]:
        root = self.fs._strip_protocol(self.root).rstrip("/")
        found = await self._call(self.fs.find, self._path(folder))
        return sorted(f[len(root) + 1 :] for f in found)

    async def delete(self, key: str) -> None:
        await self._call(self.fs.rm_file, self._path(key))

    async def _call(self, function: Any, *args: Any, **more: Any) -> Any:
        try:
            return await asyncio.to_thread(function, *args, **more)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:  # fsspec's file systems raise OSError for network failures
            raise Transient(redacted(str(error)) or type(error).__name__) from error
