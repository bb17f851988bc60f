"""Which backend opens a URL, and which schemes may be opened at all."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tiphys.dataio.episode import DataError
from tiphys.dataio.stores.backend import Backend, redacted
from tiphys.dataio.stores.files import LocalBackend
from tiphys.dataio.stores.filesystems import FsspecBackend
from tiphys.dataio.stores.objects import ObjectBackend

OBJECT_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "http", "https")
# fsspec knows schemes that run commands (pipe), open nested archives or chain others: plain remote file systems may pass
FSSPEC_SCHEMES = ("hf", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs", "oss", "webdav", "dbfs", "ftp")


def backend(url: str, timeout: float) -> Backend:
    """The backend of a folder's URL. DataError where its scheme is not on the list of those that may be opened."""
    scheme = urlsplit(url).scheme.lower() if "://" in url or re.match(r"[a-z0-9+.-]{2,}:", url) else ""
    if "::" in url or (scheme and scheme not in (*OBJECT_SCHEMES, *FSSPEC_SCHEMES, "file")):
        allowed = ", ".join(("file", *OBJECT_SCHEMES, *FSSPEC_SCHEMES))
        raise DataError(f"{redacted(url)}: the scheme {scheme or url!r} may not be opened; these may: {allowed}")
    if scheme in ("", "file"):
        return LocalBackend(Path(unquote(urlsplit(url).path) if scheme else url).absolute())
    return ObjectBackend(url, timeout) if scheme in OBJECT_SCHEMES else FsspecBackend(url)
