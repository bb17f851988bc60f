"""Which schemes may be opened, and by which backend."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import redacted
from tiphys.dataio.stores.backend import Backend, Refused
from tiphys.dataio.stores.files import LocalBackend
from tiphys.dataio.stores.filesystems import FsspecBackend
from tiphys.dataio.stores.hub import HubBackend
from tiphys.dataio.stores.objects import ObjectBackend
from tiphys.dataio.stores.web import WebBackend
from tiphys.paths import local

OBJECT_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "http", "https")
# Some schemes of fsspec run commands (pipe), open nested archives or chain others: only plain remote file systems are allowed
HOST_SCHEMES = ("http", "https", "sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "ftp")  # whose URLs name a host
FSSPEC_SCHEMES = ("hf", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs", "oss", "webdav", "dbfs", "ftp")


# Schemes whose URLs name a user or, for Azure, a container before an @
_NAMED = ("sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "ftp", "abfs", "abfss")


def check_url(url: str) -> None:
    """Raises DataError if a URL contains credentials: user info or a query. They would end up in files and logs."""
    if "://" not in url or url.startswith("file:"):
        return
    authority = re.split(r"[/?#]", url.split("://", 1)[1], maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    scheme = url.split(":", 1)[0].lower()
    if at and (":" in user or scheme not in _NAMED):
        raise DataError(
            f"{redacted(url)}: a URL must not contain a user or a password, because URLs are written to files and logs; give "
            "credentials by the environment variables or profiles of the store"
        )
    if "?" in url:
        raise DataError(
            f"{redacted(url)}: a URL must not have a query (?…), because signatures and keys in it would be written to files and "
            "logs; give credentials by the environment variables or profiles of the store"
        )


def backend(url: str, timeout: float, by_data: bool = False) -> Backend:
    """The backend for a folder's URL. Raises DataError if its scheme may not be opened, or if it contains credentials.

    by_data   data chose the URL: a web server may not redirect to other hosts
    """
    check_url(url)
    scheme = urlsplit(url).scheme.lower() if "://" in url or re.match(r"[a-z0-9+.-]{2,}:", url) else ""
    if "::" in url or (scheme and scheme not in (*OBJECT_SCHEMES, *FSSPEC_SCHEMES, "file")):
        allowed = ", ".join(("file", *OBJECT_SCHEMES, *FSSPEC_SCHEMES))
        raise DataError(f"{redacted(url)}: the scheme {scheme or url!r} may not be opened; these may: {allowed}")
    if scheme in ("", "file"):
        try:
            return LocalBackend(Path(local(url)).absolute())
        except ValueError as error:
            raise DataError(str(error)) from None
    if by_data and scheme in ("http", "https"):
        return WebBackend(url, timeout)
    if scheme == "hf":
        try:
            return HubBackend(url, timeout)
        except Refused as error:
            raise DataError(str(error)) from None
    return ObjectBackend(url, timeout) if scheme in OBJECT_SCHEMES else FsspecBackend(url)
