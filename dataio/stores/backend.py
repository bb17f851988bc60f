"""`Backend`, the interface to one folder in a store, and the exceptions that say how an operation failed.

A backend tries each operation once. It raises FileNotFoundError, PermissionError, `Changed`, `OutOfRange`, `Refused`, `Throttled`
or `Transient`. `storage.Store` retries, joins requests and checks the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Transient(Exception):
    """The same request may succeed later."""


class Throttled(Transient):
    """The store asks for fewer requests (429, 503)."""


class Changed(Exception):
    """The object no longer has the ETag that was given."""


class OutOfRange(Exception):
    """The object ends before the first requested byte."""


class Refused(Exception):
    """The store refuses this request, and would refuse it later too."""


class ObjectInfo(NamedTuple):
    """Size and version of an object."""

    size: int  # bytes of the whole object; −1 if the answer did not say
    etag: str  # changes whenever the object changes; empty if the store has none


class Backend(Protocol):
    """One folder. Keys are paths relative to it, with forward slashes."""

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        """Bytes [start, start + size), or fewer if the object ends before. Raises `Changed` if `etag` is given and differs."""

    async def head(self, key: str) -> ObjectInfo:
        """Size and version of an object."""

    async def put(self, key: str, source: bytes | Path) -> None:
        """Write an object atomically, from bytes or a local file."""

    async def keys(self, folder: str) -> list[str]:
        """Sorted keys of all objects in a folder, at any depth; empty if there is no such folder."""

    async def delete(self, key: str) -> None:
        """Remove an object."""
