"""Source: the files of one folder or one file, on a disk or in any store, read-only and never outside of itself."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, BinaryIO, cast

from tiphys.dataio.convert.limits import FILES, JSON_BYTES, check_size, parse_json
from tiphys.dataio.episode import DataError

_BLOCK = 1 << 20  # a remote file is read ahead by this much


class SourceUnavailable(OSError):
    """The store or disk failed (not the data): never taken for a malformed episode, whatever is skipped."""


class Source:
    """A folder, or a single file, at a path or URL. Paths in here are relative, with forward slashes.

    Links of a local folder are followed only inside the folder, or into the `blobs` of a Hugging Face cache, whose
    snapshots are made of links.
    """

    def __init__(self, url: str):
        self.url = os.fspath(url).rstrip("/") or "/"
        scheme, separator, rest = self.url.partition("://")
        self._store: Any = None
        self.failed = ""  # what the store said, should a library swallow the SourceUnavailable in which it said so
        if separator and scheme != "file":
            self._open_remote()
        else:
            path = os.path.realpath(rest if separator else self.url)
            if not os.path.exists(path):
                raise DataError(f"{self.url}: there is no such file or folder")
            self.single = "" if os.path.isdir(path) else os.path.basename(path)
            self._folders: dict[str, str] = {}  # folder -> where it lies, links resolved and checked
            self._root = os.path.dirname(path) if self.single else path
            head, snapshots = os.path.split(os.path.dirname(self._root))
            self._allowed = [self._root, os.path.join(head, "blobs")] if snapshots == "snapshots" else [self._root]

    def _open_remote(self) -> None:
        from tiphys.dataio.storage import Store

        parent, _, name = self.url.rpartition("/")
        self.single = ""
        if os.path.splitext(name)[1] and not parent.endswith(":/"):  # x.hdf5: a file, unless it is a folder (x.zarr/)
            store = Store(parent)
            try:
                store.head(name)
                self._store, self.single = store, name
                return
            except FileNotFoundError:
                pass
            except OSError as error:
                raise SourceUnavailable(f"{self.url}: {error}") from error
        self._store = Store(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL without a suffix: what a dataset without a name is called."""
        base = self.single or self.url.rstrip("/").rpartition("/")[2] or "dataset"
        return re.sub(r"(\.zarr)?(\.(zip|hdf5|h5|tar|npz|parquet|jsonl|txt|zarr))?$", "", base) or "dataset"

    @property
    def is_local(self) -> bool:
        return self._store is None

    def check(self, path: str) -> str:
        """The path itself, if it stays inside the source. DataError otherwise."""
        parts = path.split("/")
        if not path or path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
            raise DataError(f"{self.url}: the path {path!r} leads out of the source; it is not followed")
        return path

    def _local(self, path: str) -> str:
        folder, _, name = self.check(path).rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._inside(os.path.realpath(os.path.join(self._root, folder)), path)
        full = os.path.join(self._folders[folder], name)
        return self._inside(os.path.realpath(full), path) if os.path.islink(full) else full

    def _inside(self, full: str, path: str) -> str:
        if not any(full == root or full.startswith(root.rstrip("/") + "/") for root in self._allowed):
            raise DataError(f"{self.where(path)}: a link that leads out of the source ({full}); it is not followed")
        return full

    def where(self, path: str) -> str:
        """How messages name a file."""
        return self.url if self.single else f"{self.url}/{path}"

    @cached_property
    def files(self) -> list[str]:
        """All files, sorted. A store that cannot list (plain https) raises SourceUnavailable."""
        if self.single:
            return [self.single]
        found: list[str] = []
        if self._store is not None:
            try:
                found = [p for p in self._store.list("") if not p.endswith("/")]
            except OSError as error:
                raise SourceUnavailable(f"{self.url}: cannot be listed ({error})") from error
        else:
            for folder, folders, names in os.walk(self._root):  # does not enter folders that are links
                folders.sort()
                relative = os.path.relpath(folder, self._root)
                found += [n if relative == "." else f"{relative}/{n}" for n in names]
                if len(found) > FILES:
                    raise DataError(f"{self.url}: more than {FILES:,} files")
        return sorted(p for p in found if not any(part.startswith(".") and part not in _ZARR for part in p.split("/")))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes. FileNotFoundError where there is no such file."""
        if self._store is None:
            full = self._local(path)
            if not os.path.isfile(full):
                raise FileNotFoundError(f"{self.where(path)}: there is no such file")
            return os.path.getsize(full)
        try:
            return int(self._store.head(self.check(path)).size)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.where(path)}: there is no such file") from None
        except OSError as error:
            raise SourceUnavailable(f"{self.where(path)}: {error}") from error

    def version(self, path: str) -> str:
        """What changes when the file does: size with ETag (stores) or modification time (disks)."""
        if self._store is None:
            status = os.stat(self._local(path))
            return f"{status.st_size}-{status.st_mtime_ns}"
        info = self._store.head(self.check(path))
        return f"{info.size}-{info.etag}"

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """The file as a seekable stream. FileNotFoundError where there is none."""
        if self._store is None:
            try:
                stream = open(self._local(path), "rb")  # noqa: SIM115 (closed by the next line)
            except (FileNotFoundError, IsADirectoryError):
                raise FileNotFoundError(f"{self.where(path)}: there is no such file") from None
            with stream:
                yield stream
        else:
            size = self.size(path)
            with io.BufferedReader(_RemoteFile(self, path, size), _BLOCK) as remote:
                yield cast(BinaryIO, remote)

    def read(self, path: str, limit: int = JSON_BYTES) -> bytes:
        """The whole file, if it has at most `limit` bytes."""
        with self.open(path) as stream:
            check_size(stream.seek(0, os.SEEK_END), limit, self.where(path))
            stream.seek(0)
            return stream.read()

    def local_path(self, path: str) -> str | None:
        """Where a file of a local source lies, for libraries that read a file faster than a stream; None in a store."""
        return None if self._store is not None else self._local(path)

    def json(self, path: str, limit: int = JSON_BYTES) -> Any:
        return parse_json(self.read(path, limit), self.where(path))

    def json_lines(self, path: str, limit: int = JSON_BYTES) -> list[dict[str, Any]]:
        """The objects of a `.jsonl`, one a line."""
        out = []
        for number, line in enumerate(self.read(path, limit).splitlines(), 1):
            if line.strip():
                value = parse_json(line, f"{self.where(path)}, line {number}")
                if not isinstance(value, dict):
                    raise DataError(f"{self.where(path)}, line {number}: not a JSON object")
                out.append(value)
        return out


class _RemoteFile(io.RawIOBase):
    """A file in a Store as a seekable stream of range reads."""

    def __init__(self, source: Source, path: str, size: int):
        self._source, self._path, self._size, self._at = source, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size - self._at)
        if count <= 0:
            return 0
        try:
            (data,) = self._source._store.read_ranges(self._path, [self._at], [count])
        except OSError as error:
            self._source.failed = f"{self._source.where(self._path)}, bytes {self._at}–{self._at + count}: {error}"
            raise SourceUnavailable(self._source.failed) from error
        view[:count] = memoryview(data).cast("B")
        self._at += count
        return count


_ZARR = (".zarray", ".zgroup", ".zattrs", ".zmetadata")


def expand(template: str, where: str, **values: int | str) -> str:
    """A path template of a stranger: `{name}` and `{name:03d}` only, unlike str.format, which reads attributes."""
    if not isinstance(template, str):
        raise DataError(f"{where}: {template!r} is not a path template")

    def one(match: re.Match[str]) -> str:
        name, width = match.group(1), match.group(2)
        if name not in values:
            raise DataError(f"{where}: the path template {template!r} asks for {name!r}; known: {', '.join(values)}")
        return f"{int(values[name]):0{int(width)}d}" if width else str(values[name])

    path = re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", one, template)
    if "{" in path or "}" in path:
        raise DataError(f"{where}: the path template {template!r} is not understood")
    return path
