"""Source: read-only access to the files of one folder, or to one file, on a disk or in a store, and to nothing else."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, BinaryIO, cast

from tiphys.dataio.convert.limits import FILES, JSON_BYTES, check_size, parse_json
from tiphys.dataio.episode import DataError
from tiphys.paths import local

_READ_AHEAD = 1 << 20  # bytes that a read of a remote file fetches at least
_LOCAL_BUFFER = 1 << 17  # bytes


class SourceUnavailable(OSError):
    """The store or the disk failed, not the data. This is never treated as a malformed episode, not even with `skip_bad`."""


# system errors that say something about a path, not about the disk or the rights of this process
_ABOUT_PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


def is_failure(number: int | None) -> bool:
    """Whether an OSError with this errno is a failure of the disk or of the process (EIO, EACCES, EMFILE, …).

    Libraries raise an OSError without an errno, or with EINVAL, for damaged data.
    """
    return bool(number) and number not in _ABOUT_PATHS


class Source:
    """A folder or a single file, at a path or URL. All paths are relative to the folder and use forward slashes.

    Symbolic links in a local folder are followed only if they stay inside the folder. In a Hugging Face cache, where a
    snapshot consists of links, they may also lead into its `blobs`.
    """

    def __init__(self, url: str):
        self.url = os.fspath(url).rstrip("/") or "/"
        scheme, separator, _ = self.url.partition("://")
        self._store: Any = None
        self.failed = ""  # why a read from the store failed, because a library may swallow the SourceUnavailable
        if separator and scheme != "file":
            self._open_remote()
        else:
            try:
                path = os.path.realpath(local(self.url))
            except ValueError as error:
                raise DataError(str(error)) from None
            if not os.path.exists(path):
                raise DataError(f"{self.url}: no such file or folder")
            self.single = "" if os.path.isdir(path) else os.path.basename(path)
            self._folders: dict[str, str] = {}  # folder -> its real path, checked to lie inside the source
            self._root = os.path.dirname(path) if self.single else path
            head, snapshots = os.path.split(os.path.dirname(self._root))
            self._allowed = [self._root, os.path.join(head, "blobs")] if snapshots == "snapshots" else [self._root]

    def _open_remote(self) -> None:
        from tiphys.dataio.storage import Store

        parent, _, name = self.url.rpartition("/")
        self.single = ""
        if os.path.splitext(name)[1] and not parent.endswith(
            ":/"
        ):  # x.hdf5 is a file, x.zarr may be a folder: ask the store
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
        """The last part of the URL without its suffix. It names datasets that have no name of their own."""
        base = self.single or self.url.rstrip("/").rpartition("/")[2] or "dataset"
        if self.url.startswith("hf://"):
            base = base.partition("@")[0]  # the revision
        return re.sub(r"(\.zarr)?(\.(zip|hdf5|h5|tar|npz|parquet|jsonl|txt|zarr))?$", "", base) or "dataset"

    @property
    def is_local(self) -> bool:
        return self._store is None

    def check(self, path: str) -> str:
        """Returns the path. Raises DataError if it leads out of the source."""
        parts = path.split("/")
        if not path or path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
            raise DataError(f"{self.url}: the path {path!r} leads out of the source; it is not followed")
        return path

    def _local(self, path: str) -> str:
        folder, _, name = self.check(path).rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._check_inside(os.path.realpath(os.path.join(self._root, folder)), path)
        full = os.path.join(self._folders[folder], name)
        return self._check_inside(os.path.realpath(full), path) if os.path.islink(full) else full

    def _check_inside(self, full: str, path: str) -> str:
        if not any(full == root or full.startswith(root.rstrip("/") + "/") for root in self._allowed):
            raise DataError(f"{self.where(path)}: the link leads out of the source ({full}); it is not followed")
        return full

    def where(self, path: str) -> str:
        """The name of a file for messages."""
        return self.url if self.single else f"{self.url}/{path}"

    @cached_property
    def files(self) -> list[str]:
        """The paths of all files, sorted; hidden files only if Zarr needs them, and none that macOS added.

        Raises SourceUnavailable if the store cannot list (plain https).
        """
        if self.single:
            return [self.single]
        found: list[str] = []
        if self._store is not None:
            try:
                found = [p for p in self._store.list("") if not p.endswith("/")]
            except OSError as error:
                raise SourceUnavailable(f"{self.url}: cannot be listed ({error})") from error
        else:
            # os.walk does not enter folders that are links
            for folder, folders, names in os.walk(self._root, onerror=self._unlistable):
                folders.sort()
                relative = os.path.relpath(folder, self._root)
                found += [n if relative == "." else f"{relative}/{n}" for n in names]
                if len(found) > FILES:
                    raise DataError(f"{self.url}: more than {FILES:,} files")
        return sorted(p for p in found if not any(_is_hidden(part) for part in p.split("/")))

    def _unlistable(self, error: OSError) -> None:
        raise SourceUnavailable(f"{self.url}: cannot be listed ({error})") from error

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Size in bytes. Raises FileNotFoundError if there is no such file."""
        if self._store is None:
            status = self._status(path)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(f"{self.where(path)}: no such file")
            return status.st_size
        try:
            return int(self._store.head(self.check(path)).size)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.where(path)}: no such file") from None
        except OSError as error:
            raise SourceUnavailable(f"{self.where(path)}: {error}") from error

    def _status(self, path: str) -> os.stat_result:
        try:
            return os.stat(self._local(path))
        except OSError as error:
            if is_failure(error.errno):
                raise SourceUnavailable(f"{self.where(path)}: {error}") from error
            raise FileNotFoundError(f"{self.where(path)}: no such file") from None

    def version(self, path: str) -> str:
        """A text that changes if the file changes: its size, with its ETag (store) or modification time (disk)."""
        if self._store is None:
            status = self._status(path)
            return f"{status.st_size}-{status.st_mtime_ns}"
        info = self._store.head(self.check(path))
        return f"{info.size}-{info.etag}"

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """The file as a seekable stream. Raises FileNotFoundError if there is no such file."""
        if self._store is None:
            self.size(path)  # a regular file: opening a pipe or a device could block for ever
            try:
                raw = _LocalFile(self, path, self._local(path))
            except OSError as error:
                raise SourceUnavailable(f"{self.where(path)}: {error}") from error
            with io.BufferedReader(raw, _LOCAL_BUFFER) as stream:
                yield cast(BinaryIO, stream)
        else:
            size = self.size(path)
            with io.BufferedReader(_RemoteFile(self, path, size), _READ_AHEAD) as remote:
                yield cast(BinaryIO, remote)

    def read(self, path: str, limit: int = JSON_BYTES) -> bytes:
        """The whole file. Raises DataError if it has more than `limit` bytes."""
        with self.open(path) as stream:
            check_size(stream.seek(0, os.SEEK_END), limit, self.where(path))
            stream.seek(0)
            return stream.read()

    def local_path(self, path: str) -> str | None:
        """The path on disk, for libraries that read files faster than streams; None if the source is in a store."""
        return None if self._store is not None else self._local(path)

    def json(self, path: str, limit: int = JSON_BYTES) -> Any:
        return parse_json(self.read(path, limit), self.where(path))

    def json_lines(self, path: str, limit: int = JSON_BYTES) -> list[dict[str, Any]]:
        """The JSON objects of a `.jsonl` file, one per line."""
        out = []
        for number, line in enumerate(self.read(path, limit).splitlines(), 1):
            if line.strip():
                value = parse_json(line, f"{self.where(path)}, line {number}")
                if not isinstance(value, dict):
                    raise DataError(f"{self.where(path)}, line {number}: not a JSON object")
                out.append(value)
        return out


class _LocalFile(io.FileIO):
    """A file on disk. If a read fails, the source has failed; libraries that catch the OSError cannot hide that."""

    def __init__(self, source: Source, path: str, full: str):
        super().__init__(full, "rb")
        self._source, self._where = source, source.where(path)

    def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise self._failure(error) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> SourceUnavailable:
        self._source.failed = f"{self._where}: {error}"
        return SourceUnavailable(self._source.failed)


class _RemoteFile(io.RawIOBase):
    """A file in a store as a seekable stream. Each read is a range request."""

    def __init__(self, source: Source, path: str, size: int):
        self._source, self._path, self._size, self._position = source, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size - self._position)
        if count <= 0:
            return 0
        try:
            (data,) = self._source._store.read_ranges(self._path, [self._position], [count])
        except OSError as error:
            self._source.failed = (
                f"{self._source.where(self._path)}, bytes {self._position}–{self._position + count}: {error}"
            )
            raise SourceUnavailable(self._source.failed) from error
        view[:count] = memoryview(data).cast("B")
        self._position += count
        return count


_ZARR_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata")


def _is_hidden(part: str) -> bool:
    """Whether a part of a path hides the file: `.git`, `._a.txt`, `.DS_Store`, `__MACOSX`."""
    return part == "__MACOSX" or (part.startswith(".") and part not in _ZARR_METADATA)


def expand(template: str, where: str, **values: int | str) -> str:
    """Fill in an untrusted path template. Only `{name}` and `{name:03d}` are allowed; str.format would read attributes.

    Raises DataError if the template is not understood or names an unknown value.
    """
    if not isinstance(template, str):
        raise DataError(f"{where}: {template!r} is not a path template")

    def substitute(match: re.Match[str]) -> str:
        name, width = match.group(1), match.group(2)
        if name not in values:
            raise DataError(
                f"{where}: the path template {template!r} needs {name!r}, which is not one of {', '.join(values)}"
            )
        return f"{int(values[name]):0{int(width)}d}" if width else str(values[name])

    path = re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", substitute, template)
    if "{" in path or "}" in path:
        raise DataError(
            f"{where}: the path template {template!r} is not understood; only {{name}} and {{name:03d}} are allowed"
        )
    return path
