"""`~` in paths. This module imports nothing else of Tiphys."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit


def expand(path: str | os.PathLike[str]) -> str:
    """The path or URL as text, with `~` or `~user` at its beginning replaced by that home folder.

    Raises ValueError if the user has none.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        return text
    full = os.path.expanduser(text)
    if full.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{text}: {user} has no home folder; write ./{text} for a folder of that name")
    return full


def local(url: str) -> str:
    """The local path of a plain path, where `~` is the home folder, or of a `file://` URL, which is complete and knows no `~`.

    Raises ValueError if a file URL names another host, as `file://~/data` and `file://data` do.
    """
    if not re.match(r"file:", url, re.IGNORECASE):
        return expand(url)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(
            f"{url}: a file URL holds a complete path, such as file:///home/me/data; write a path without file://"
        )
    return unquote(parts.path)


def absolute(url: str) -> str:
    """A folder as an absolute URL."""
    return url.rstrip("/") if "://" in url else Path(expand(url)).resolve().as_uri()
