"""Where weights are followed from: a folder, a bucket, or a repository of a hub. A place only reads."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import Store
from tiphys.pretrain.follow.chain import BEST, LARGEST_POINTER, LATEST, File
from tiphys.pretrain.hub_errors import FetchError, hub_message

_PART = 64 << 20  # bytes that are read at once


class Place(Protocol):
    """Raises FileNotFoundError if a file is not there; StoreError or FetchError if the place refuses or cannot be reached."""

    url: str

    def pointer(self, version: str) -> tuple[bytes, str] | None:
        """The pointer and its version, or None if that is the version. Less than 1 KB is sent if nothing is new."""

    def read(self, path: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, as it was when the pointer was read."""

    def download(self, file: File, to: Path) -> None:
        """Copy a file. Raises DataError if its size or SHA-256 differ."""


def place_of(url: str, *, best: bool = False) -> Place:
    """The place of a URL. `best`: its pointer is best.json."""
    name = BEST if best else LATEST
    return HubPlace(url, name) if url.startswith("hf://") else StorePlace(url, name)


class StorePlace:
    """A folder or a bucket. `name` is the file of its pointer."""

    def __init__(self, url: str, name: str = LATEST) -> None:
        self._store, self._name = Store(url), name
        self.url = self._store.url

    def pointer(self, version: str) -> tuple[bytes, str] | None:
        found = self._store.read_new(self._name, version, LARGEST_POINTER)
        if found is not None:
            fresh = Store(self.url)  # it knows no versions of objects, so one that was repaired is read
            fresh.traffic, self._store = self._store.traffic, fresh
        return found

    def read(self, path: str, limit: int) -> bytes:
        return self._store.read(path, limit)

    def download(self, file: File, to: Path) -> None:
        size = self._store.head(file.path).size
        if size != file.size:
            raise DataError(f"{self.url}/{file.path}: has {size} bytes, its manifest says {file.size}; it is damaged")
        _check_space(self.url, file, to)
        digest = hashlib.sha256()
        with to.open("wb") as out:
            for start in range(0, size, _PART):
                (part,) = self._store.read_ranges(file.path, [start], [min(_PART, size - start)])
                digest.update(part)
                out.write(part)
        _check_digest(self.url, file, digest.hexdigest())


class HubPlace:
    """A repository of a hub. All files are read from the commit in which the pointer was read. `name` is the pointer's file."""

    def __init__(self, url: str, name: str = LATEST) -> None:
        self.url, self._pointer = url.rstrip("/"), name
        self._name = self.url.removeprefix("hf://").strip("/")
        self._commit = ""

    def pointer(self, version: str) -> tuple[bytes, str] | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = self._ask(lambda: get_hf_file_metadata(hf_hub_url(self._name, self._pointer)))
        commit = str(found.commit_hash)
        if commit == version:
            return None
        self._commit = commit
        return self.read(self._pointer, LARGEST_POINTER), commit

    def read(self, path: str, limit: int) -> bytes:
        with tempfile.TemporaryDirectory(prefix="tiphys-hub-") as folder:
            file = self._fetch(path, Path(folder))
            if file.stat().st_size > limit:
                raise DataError(f"{self.url}/{path}: at most {limit:,} bytes are read of such a file, but it has more")
            return file.read_bytes()

    def download(self, file: File, to: Path) -> None:
        _check_space(self.url, file, to)
        with tempfile.TemporaryDirectory(prefix=".hub-", dir=to.parent) as folder:
            os.replace(self._fetch(file.path, Path(folder)), to)
        with to.open("rb") as got:
            _check_digest(self.url, file, hashlib.file_digest(got, "sha256").hexdigest())

    def _fetch(self, path: str, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(self._ask(lambda: hf_hub_download(self._name, path, revision=self._commit, local_dir=folder)))

    def _ask(self, call: Any) -> Any:
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            return call()
        except (EntryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(hub_message(self.url, error)) from None
        except Exception as error:  # of the hub's client, of its HTTP library, or of the network
            # not chained, because the original error holds a request whose headers contain the key
            raise FetchError(hub_message(self.url, error)) from None


def _check_space(url: str, file: File, to: Path) -> None:
    free = shutil.disk_usage(to.parent).free
    if file.size > free:
        raise DataError(
            f"{url}/{file.path}: has {file.size} bytes, but only {free} are free in {to.parent}; set TMPDIR"
        )


def _check_digest(url: str, file: File, found: str) -> None:
    if found != file.sha256:
        raise DataError(f"{url}/{file.path}: does not have the SHA-256 that its manifest says; it is damaged")
