"""Which schemes may be opened, and by which backend."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from tiphys.dataio.episode import DataError
from tiphys.dataio.stores.backend import Backend, redacted
from tiphys.dataio.stores.files import LocalBackend
from tiphys.dataio.stores.filesystems import FsspecBackend
from tiphys.dataio.stores.objects import ObjectBackend
from tiphys.paths import local

OBJECT_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "http", "https")
# Some schemes of fsspec run commands (pipe), open nested archives or chain others: only plain remote file systems are allowed
FSSPEC_SCHEMES = ("hf", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs", "oss", "webdav", "dbfs", "ftp")


def backend(url: str, timeout: float) -> Backend:
    """The backend for a folder's URL. Raises DataError if its scheme may not be opened."""
    scheme = urlsplit(url).scheme.lower() if "://" in url or re.match(r"[a-z0-9+.-]{2,}:", url) else ""
    if "::" in url or (scheme and scheme not in (*OBJECT_SCHEMES, *FSSPEC_SCHEMES, "file")):
        allowed = ", ".join(("file", *OBJECT_SCHEMES, *FSSPEC_SCHEMES))
        raise DataError(f"{redacted(url)}: the scheme {scheme or url!r} may not be opened; these may: {allowed}")
    if scheme in ("", "file"):
        try:
            return LocalBackend(Path(local(url)).absolute())
        except ValueError as error:
            raise DataError(str(error)) from None
    return ObjectBackend(url, timeout) if scheme in OBJECT_SCHEMES else FsspecBackend(url)
