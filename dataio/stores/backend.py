"""`Backend`, the interface to one folder in a store, and the exceptions that say how an operation failed.

A backend tries each operation once. It raises FileNotFoundError, PermissionError, `Changed`, `OutOfRange`, `Refused`, `Throttled`
or `Transient`. `storage.Store` retries, joins requests and checks the results.
"""

from __future__ import annotations

import time
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


def pause(done: int, began: float, rate: int) -> float:
    """Seconds to wait, so that `done` bytes since `began` (`time.monotonic`) are at most `rate` a second; 0: no limit."""
    return max(0.0, began + done / rate - time.monotonic()) if rate else 0.0


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

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        """A whole object, or its first `limit` bytes; None if it still has this ETag."""

    async def put(self, key: str, source: bytes | Path, rate: int = 0) -> None:
        """Write an object atomically, from bytes or a local file. `rate`: most bytes a second; 0: no limit."""

    async def replace(self, key: str, data: bytes, etag: str) -> None:
        """Write an object atomically if it still has this ETag; "": if it does not exist. Raises `Changed` otherwise."""

    async def times(self, folder: str) -> dict[str, float]:
        """Keys of all objects in a folder, at any depth -> when they were written, in seconds of the store's clock."""

    async def keys(self, folder: str) -> list[str]:
        """Sorted keys of all objects in a folder, at any depth; empty if there is no such folder."""

    async def delete(self, key: str) -> None:
        """Remove an object."""
