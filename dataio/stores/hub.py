"""The backend of `hf://`: each file is resolved once, and its signed URL is used until the store behind it refuses it.

A hub counts what it resolves (5,000 files in five minutes for a free account), but not reads of signed URLs.
https://huggingface.co/docs/hub/rate-limits
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from tiphys.dataio.messages import logger, redacted
from tiphys.dataio.stores import threads
from tiphys.dataio.stores.backend import ObjectInfo, OutOfRange, Refused, Throttled, Transient
from tiphys.dataio.stores.filesystems import FsspecBackend

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logger(__name__)
_KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}
_LONGEST_WAIT = 600.0  # seconds until a quota is renewed; a hub that asks for more is not waited for
_UNKNOWN_WAIT = 30.0  # seconds, if a hub does not say when its quota is renewed
_LIMITED = 3  # answers that a quota is used up, for one file
_QUOTA_STATUS, _DENIED = 429, (401, 403)


class _Place(NamedTuple):
    """Where the bytes of a file are: a signed URL, or the hub itself."""

    location: str
    info: ObjectInfo


class HubBackend(FsspecBackend):
    """A folder of a repository on a hub. It reads by signed URLs; fsspec's driver does everything else."""

    def __init__(self, url: str, timeout: float):
        super().__init__(url)
        self._timeout = timeout
        self._kind, self._name, self._revision, self._folder = parsed(url)
        self._places: dict[str, _Place] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._renewed = 0.0  # when the quota will have been renewed, by time.monotonic()

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        await threads.call(self._resolved, key)  # waits for quotas, so it has no time limit of its own
        ends = asyncio.get_running_loop().time() + threads.patience(size, self._timeout)
        return await threads.by(ends, threads.call(self._range, key, start, size))

    async def head(self, key: str) -> ObjectInfo:
        self._places.pop(key, None)
        place: _Place = await threads.call(self._resolved, key)
        return place.info

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        info = await self.head(key)
        if etag and info.etag == etag:
            return None
        size = min(limit, info.size) if info.size >= 0 else limit
        return (await self.fetch(key, 0, size, "") if size else (b"", info))[0], info

    async def keys(self, folder: str) -> list[str]:
        return await threads.call(self._list, folder)

    def _list(self, folder: str) -> list[str]:
        from huggingface_hub import HfApi

        base = "/".join(part for part in (self._folder, folder) if part)
        found = HfApi(endpoint=endpoint()).list_repo_tree(
            self._name, base or None, recursive=True, revision=self._revision, repo_type=self._kind
        )
        skipped = len(self._folder) + 1 if self._folder else 0
        try:
            return sorted(entry.path[skipped:] for entry in found if hasattr(entry, "size"))
        except OSError as error:
            if _status(error) == 404:
                return []
            raise _translated(error, folder) from None

    def _resolved(self, key: str) -> _Place:
        """The place of a file. Of several threads, one asks the hub."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._places:
                self._places[key] = self._resolve(key)
            return self._places[key]

    def _resolve(self, key: str) -> _Place:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        path = "/".join(part for part in (self._folder, key) if part)
        url = hf_hub_url(self._name, path, repo_type=self._kind, revision=self._revision, endpoint=endpoint())
        for _ in range(_LIMITED):
            time.sleep(max(0.0, self._renewed - time.monotonic()))
            try:
                found = get_hf_file_metadata(url, timeout=self._timeout, endpoint=endpoint())
            except (OSError, ValueError) as error:  # ValueError: an unexpected answer
                if _status(error) != _QUOTA_STATUS:
                    raise _translated(error, key) from None
                self._wait_for_quota(error)
                continue
            size = -1 if found.size is None else int(found.size)
            return _Place(str(found.location), ObjectInfo(size, str(found.etag or "")))
        raise Throttled("the hub's quota of requests is used up")

    def _wait_for_quota(self, error: Exception) -> None:
        from huggingface_hub.utils._http import parse_ratelimit_headers

        headers = getattr(getattr(error, "response", None), "headers", {})
        stated = parse_ratelimit_headers(headers)
        seconds = _UNKNOWN_WAIT if stated is None else float(stated.reset_in_seconds)
        if seconds > _LONGEST_WAIT:
            raise Refused(f"the hub's quota of requests is used up, and renewed in {seconds:.0f} s only")
        log.warning("hf://%s: the hub's quota of requests is used up; waiting for %.0f s", self._name, seconds)
        self._renewed = max(self._renewed, time.monotonic() + seconds)

    def _range(self, key: str, start: int, size: int) -> tuple[Buffer, ObjectInfo]:
        place = self._resolved(key)
        status, data = self._get(key, place.location, start, size)
        if status in _DENIED and self._is_signed(place.location):
            with self._lock:  # the signature has expired: whoever comes first asks for another
                if self._places.get(key) is place:
                    del self._places[key]
            again = self._resolved(key)
            if again.info.etag == place.info.etag:
                place, (status, data) = again, self._get(key, again.location, start, size)
        if status == 200 and start:
            raise Refused("the server sends whole files and no parts of them; download the dataset instead")
        if status == 416:
            raise OutOfRange
        if status == 404:
            raise FileNotFoundError(key)
        if status in _DENIED:
            raise PermissionError(f"status {status}")
        if status in (_QUOTA_STATUS, 503):
            raise Throttled(f"status {status}")
        if status not in (200, 206):
            raise Transient(f"status {status} for a range")
        return data, place.info

    def _get(self, key: str, location: str, start: int, size: int) -> tuple[int, bytes]:
        """Status and bytes of an answer: at most those that were asked for, whatever the server sends."""
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        if not self._is_signed(location):  # the key is for the hub only
            headers = {**build_hf_headers(), **headers}
        try:
            with get_session().stream(
                "GET", location, headers=headers, timeout=self._timeout, follow_redirects=False
            ) as answer:
                status = int(answer.status_code)
                return status, _first_bytes(answer, size) if status == 206 or (status == 200 and not start) else b""
        except Exception as error:  # the HTTP library of huggingface_hub depends on its version
            if isinstance(refused := _translated(error, key), Refused):
                raise refused from None
            raise Transient(redacted(str(error)) or type(error).__name__) from None

    def _is_signed(self, location: str) -> bool:
        return urlsplit(location).netloc != urlsplit(endpoint()).netloc


def _first_bytes(answer: Any, size: int) -> bytes:
    """The first `size` bytes of a body, which is not read further; fewer if it ends before."""
    parts, have = [], 0
    for part in answer.iter_raw():
        parts.append(part[: size - have])
        have += len(parts[-1])
        if have == size:
            break
    return b"".join(parts)


def parsed(url: str) -> tuple[str, str, str | None, str]:
    """Kind, OWNER/NAME, revision and folder of `hf://[datasets/|spaces/]OWNER/NAME[@REVISION][/FOLDER]`.

    Raises Refused if the URL names no repository.
    """
    found = re.fullmatch(r"hf://(?:(datasets|spaces|models)/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", url.rstrip("/"))
    if found is None:
        raise Refused(f"{url}: expected hf://datasets/OWNER/NAME, with @REVISION and a folder if needed")
    return _KINDS[found[1] or "models"], found[2], found[3], found[4] or ""


def endpoint() -> str:
    """The hub's URL."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _translated(error: Exception, key: str) -> Exception:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return Refused("HF_HUB_OFFLINE is set; unset it")
    status = _status(error)
    text = redacted(str(error).splitlines()[0] if str(error) else type(error).__name__)
    if status in (404, 410):
        return FileNotFoundError(key)
    if status in _DENIED:
        # a hub says 401 of a repository that does not exist, too
        return PermissionError(text)
    return Throttled(text) if status == 503 else Transient(text)
