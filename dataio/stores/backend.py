"""What every backend is: one folder in a store, and the common words for how an operation failed.

A backend does one operation once. It raises FileNotFoundError, PermissionError, `Changed`, `OutOfRange`, `Refused`, `Throttled`
or `Transient`. Retries, joined requests and verification are the work of `storage.Store`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Transient(Exception):
    """The same request may succeed later."""


class Throttled(Transient):
    """The store asks for fewer requests (429, 503)."""


class Changed(Exception):
    """The object is no longer the one whose ETag was given."""


class OutOfRange(Exception):
    """The object ends before the first byte asked for."""


class Refused(Exception):
    """The store does not take this request, and would not take it later."""


class ObjectInfo(NamedTuple):
    size: int  # bytes of the whole object; −1 where the answer did not say
    etag: str  # changes whenever the object does; empty where the store has none


class Backend(Protocol):
    """One folder. Keys are relative to it, with forward slashes."""

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        """Bytes [start, start + size), fewer where the object ends; `Changed` unless `etag` is empty or matches."""

    async def head(self, key: str) -> ObjectInfo: ...

    async def put(self, key: str, source: bytes | Path) -> None:
        """All of it or nothing."""

    async def keys(self, folder: str) -> list[str]: ...

    async def delete(self, key: str) -> None: ...


def redacted(text: str) -> str:
    """Without what may be secret in a URL: user info and query strings (SAS tokens, signatures)."""
    return re.sub(r"://[^/@\s]*@", "://", re.sub(r"(://[^\s\"'?]*)\?[^\s\"']*", r"\1", text))
