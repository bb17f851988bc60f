"""The backend of web servers that data chose: it follows no redirect to another host that the user does not allow."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from tiphys.dataio.messages import redacted
from tiphys.dataio.stores import threads
from tiphys.dataio.stores.backend import Changed, ObjectInfo, OutOfRange, Refused, Throttled, Transient

if TYPE_CHECKING:
    from typing_extensions import Buffer

HOSTS = "TIPHYS_SHARD_HOSTS"  # hosts, separated by commas, that a dataset may name beside its own
_REFUSED = "a dataset's objects on a web server can only be read"


def allowed_hosts() -> list[str]:
    """The hosts that the user allows datasets to name."""
    return [host for host in os.environ.get(HOSTS, "").split(",") if host]


class WebBackend:
    """Reads from `http://` and `https://`. obstore follows every redirect, also into the user's own network, so it is not used.

    The user allows other hosts by the environment variable TIPHYS_SHARD_HOSTS.
    """

    def __init__(self, url: str, timeout: float):
        self._url, self._timeout = quote(url.rstrip("/"), safe=":/%[]@"), timeout
        self._opener = urllib.request.build_opener(_SameHost(urlsplit(url).hostname or ""))

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        if etag and not etag.startswith("W/"):
            headers["If-Match"] = etag

        def read(answer: Any) -> tuple[bytes, ObjectInfo]:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status != 206 or not found or int(found[1]) != start:
                raise Transient(f"the answer (status {answer.status}) does not have the range that was requested")
            return answer.read(size + 1), ObjectInfo(int(found[2]), answer.headers.get("ETag", ""))

        ends = asyncio.get_running_loop().time() + threads.patience(size, self._timeout)
        return await threads.by(ends, threads.call(self._request, "GET", key, headers, read))

    async def head(self, key: str) -> ObjectInfo:
        def read(answer: Any) -> ObjectInfo:
            length = answer.headers.get("Content-Length", "")
            return ObjectInfo(int(length) if length.isdigit() else -1, answer.headers.get("ETag", ""))

        return await threads.call(self._request, "HEAD", key, {}, read)

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        raise Refused(_REFUSED)

    async def put(self, key: str, source: bytes | Path, rate: int = 0) -> None:
        raise Refused(_REFUSED)

    async def replace(self, key: str, data: bytes, etag: str) -> None:
        raise Refused(_REFUSED)

    async def times(self, folder: str) -> dict[str, float]:
        raise Refused(_REFUSED)

    async def keys(self, folder: str) -> list[str]:
        raise Refused(_REFUSED)

    async def delete(self, key: str) -> None:
        raise Refused(_REFUSED)

    def _request(self, method: str, key: str, headers: dict[str, str], read: Any) -> Any:
        request = urllib.request.Request(f"{self._url}/{quote(key)}", headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return read(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise _translated(error, key) from None
        except (OSError, http.client.HTTPException) as error:
            raise Transient(redacted(str(error)) or type(error).__name__) from None


class _SameHost(urllib.request.HTTPRedirectHandler):
    def __init__(self, host: str) -> None:
        self._host = host

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        host = urlsplit(newurl).hostname or ""
        if urlsplit(newurl).scheme not in ("http", "https") or host not in (self._host, *allowed_hosts()):
            raise Refused(
                f"the server redirects to the host {host!r}, which the dataset does not name; "
                f"if you trust this dataset, allow it: {HOSTS}={host}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _translated(error: urllib.error.HTTPError, key: str) -> Exception:
    text = f"status {error.code} {error.reason}"
    if error.code in (404, 410):
        return FileNotFoundError(key)
    if error.code in (401, 403):
        return PermissionError(text)
    if error.code == 412:
        return Changed()
    if error.code == 416:
        return OutOfRange()
    if error.code in (429, 503):
        return Throttled(text)
    return Transient(text) if error.code >= 500 or error.code in (304, 408, 409, 425) else Refused(text)
