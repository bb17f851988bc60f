"""`Store`: a folder in any store. Reads are byte ranges that are joined, retried and checked; writes are atomic.

Object stores (s3, gs, az, http) are accessed by obstore, other schemes by fsspec, local folders by the operating system.
A fault may cost time, but never gives a wrong byte: a failed request is repeated a limited number of times, after growing, random
pauses; after 429 and 503 fewer requests are sent at once; an object that is replaced while it is being read is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import redacted
from tiphys.dataio.private import read_regular
from tiphys.dataio.stores.backend import Changed, ObjectInfo, OutOfRange, Refused, Throttled, Transient
from tiphys.dataio.stores.files import LocalBackend
from tiphys.dataio.stores.limit import RequestLimit
from tiphys.dataio.stores.objects import ObjectBackend
from tiphys.dataio.stores.ranges import GAP, PART, Joined, join_ranges
from tiphys.dataio.stores.schemes import backend, check_url
from tiphys.paths import expand

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["AccessError", "ObjectChanged", "ObjectInfo", "Store", "StoreError"]

T = TypeVar("T")
WHOLE = 256 << 20  # bytes of an object that is read as a whole, if the caller gives no other limit
_BULK, _BULK_FLYING = 25, 10  # ranges in one bulk call, and how many of them obstore requests at once


class StoreError(OSError):
    """A store could not be read or written, even after repeated tries. The message names the object and the byte range."""


class AccessError(StoreError, PermissionError):
    """The store refuses access: credentials are missing or expired, or do not allow it."""


class ObjectChanged(StoreError):
    """An object was replaced while it was being read."""


@dataclass
class Traffic:
    """What a Store has done so far."""

    requests: int = 0
    bytes: int = 0  # bytes of the bodies that were received
    retries: int = 0
    throttled: int = 0  # answers that asked for fewer requests


class Store:
    """A folder in a store: local, `s3://`, `gs://`, `az://`, `https://`, or `hf://` and others by fsspec.

    In all methods, `path` is relative to the folder, or the complete URL of an object elsewhere: a dataset may point to shards of
    others. The blocking methods may be called from any thread.

    Parameters
    ----------
    url : str
        The folder. A plain path or `file://` is a local folder.
    requests : int
        Most requests in flight, for each event loop that uses this store.
    attempts : int
        Most tries of one request.
    timeout : float
        A request has stalled, and is repeated, if no byte arrives for this many seconds.
    gap : int
        Two ranges of one read are fetched by one request if at most this many bytes lie between them.
    by_data : bool
        Data chose the URL, not the user: a web server may redirect only to hosts that TIPHYS_SHARD_HOSTS lists.

    Attributes
    ----------
    url, requests, attempts, timeout, gap
        As given; `url` without a slash at its end.
    traffic : Traffic
        Counters of requests, bytes, retries and throttling.

    Raises
    ------
    DataError
        By the constructor: the scheme may not be opened. By the methods: the path leaves the folder, or the object does not have
        the range or the size.
    FileNotFoundError
        The object does not exist. The message is its URL.
    AccessError
        The store refuses access.
    ObjectChanged
        The object was replaced while it was being read.
    StoreError
        The store could not be read or written, even after repeated tries.
    """

    def __init__(
        self,
        url: str,
        *,
        requests: int = 64,
        attempts: int = 8,
        timeout: float = 30.0,
        gap: int = GAP,
        by_data: bool = False,
    ):
        try:
            url = expand(url)
        except ValueError as error:
            raise DataError(str(error)) from None
        self.url = url.rstrip("/") or url
        self.requests, self.attempts, self.timeout, self.gap = requests, attempts, timeout, gap
        self.traffic = Traffic()
        self._by_data = by_data
        self._backend = backend(self.url, timeout, by_data)
        self._etags: dict[str, str] = {}
        self._missed: dict[
            str, float
        ] = {}  # object that does not exist or has another size -> time when this was first seen
        self._limits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, RequestLimit] = weakref.WeakKeyDictionary()
        self._elsewhere: dict[str, Store] = {}

    def __reduce__(self) -> Any:  # a spawned process gets only the settings
        return _restore, (self.url, self.requests, self.attempts, self.timeout, self.gap, self._by_data)

    @property
    def local(self) -> bool:
        """Whether this is a local folder."""
        return isinstance(self._backend, LocalBackend)

    # Reading

    def read(self, path: str, limit: int = WHOLE) -> bytes:
        """Read a whole object, in its present version. Raises DataError if it has more than `limit` bytes."""
        return _wait(self._read(path, limit))

    async def _read(self, path: str, limit: int) -> bytes:
        place, key = self._locate(path)
        place._etags.pop(key, None)  # an earlier version does not matter
        if isinstance(place._backend, LocalBackend):
            try:
                return await asyncio.to_thread(read_regular, place._backend.path(key), limit)
            except FileNotFoundError:
                raise FileNotFoundError(place._name(key)) from None
        info = await place._patiently(key, "", lambda: place._backend.head(key))
        if not 0 <= info.size <= limit:
            raise DataError(
                f"{place._name(key)}: has {info.size:,} bytes; at most {limit:,} are read of such an object"
            )
        starts = range(0, info.size, PART)
        parts = await asyncio.gather(*(place._fetch(key, s, min(PART, info.size - s)) for s in starts))
        return b"".join(parts)

    def read_ranges(
        self, path: str, starts: Sequence[int], sizes: Sequence[int], whole: int | None = None
    ) -> list[Buffer]:
        """Read byte ranges of one object. All ranges that a Store reads of an object come from the same version (ETag).

        Parameters
        ----------
        path : str
            The object.
        starts, sizes : Sequence[int]
            First byte and number of bytes of each range.
        whole : int, optional
            Bytes of the whole object, if an index knows them. An object of another size is then an error. A remote object that is
            missing or has another size is first requested again for half of `timeout`, because this may soon pass.

        Returns
        -------
        list[Buffer]
            The ranges, in the given order.
        """
        place, key = self._locate(path)
        if isinstance(place._backend, LocalBackend):
            return place._read_local(place._backend, key, starts, sizes, whole)
        return _wait(place.read_ranges_async(key, starts, sizes, whole))

    async def read_ranges_async(
        self, path: str, starts: Sequence[int], sizes: Sequence[int], whole: int | None = None
    ) -> list[Buffer]:
        """`read_ranges` for an event loop, with as many requests in flight as the limit allows."""
        place, key = self._locate(path)
        if isinstance(place._backend, LocalBackend):
            return await asyncio.to_thread(place._read_local, place._backend, key, starts, sizes, whole)
        if len(starts) == 1:  # the usual case if a dataset has many shards
            return [await place._fetch_large(key, starts[0], sizes[0], whole)]
        requests = join_ranges(starts, sizes, self.gap)
        if len(requests) == 1:
            bodies = [await place._fetch_large(key, requests[0].start, requests[0].size, whole)]
        else:
            bodies = await place._bodies(key, requests, whole)
        out: list[Any] = [b""] * len(starts)
        for request, body in zip(requests, bodies, strict=True):
            view = memoryview(body)
            for i, offset, size in request.parts:
                out[i] = view[offset : offset + size] if size != len(view) else body
        return out

    def read_new(self, path: str, etag: str = "", limit: int = WHOLE) -> tuple[bytes, str] | None:
        """An object's content and version, if it no longer has the version `etag`; else None, for which no content is sent.

        Raises DataError if it has more than `limit` bytes.
        """
        place, key = self._locate(path)
        found = _wait(place._patiently(key, "", lambda: place._backend.fetch_new(key, etag, limit + 1)))
        if found is None:
            return None
        data = bytes(found[0])
        place.traffic.bytes += len(data)
        if len(data) > limit:
            raise DataError(f"{place._name(key)}: at most {limit:,} bytes are read of such an object, but it has more")
        return data, found[1].etag

    def head(self, path: str) -> ObjectInfo:
        """Size and version of an object."""
        place, key = self._locate(path)
        return _wait(place._patiently(key, "", lambda: place._backend.head(key)))

    def expect(self, path: str, etag: str) -> None:
        """Read this object only in the version of the ETag, which an index knows. Empty: any version. Makes no request."""
        if etag:
            place, key = self._locate(path)
            place._etags.setdefault(key, etag)

    async def check_unchanged(self, path: str) -> None:
        """Raises ObjectChanged if the object is not the version that was first read. Some stores do not say with each read."""
        place, key = self._locate(path)
        known = place._etags.get(key, "")
        info = await place._patiently(key, "", lambda: place._backend.head(key))
        if known and info.etag and info.etag != known:
            raise place._changed(key)

    def exists(self, path: str) -> bool:
        """Whether there is an object at this path."""
        try:
            self.head(path)
        except FileNotFoundError:
            return False
        return True

    # Writing

    def write(self, path: str, data: bytes) -> None:
        """Write an object atomically: no reader ever sees a part of it, even after a crash or on a full disk."""
        self._put(path, data)

    def upload(self, path: str, file: str, rate: int = 0) -> None:
        """Copy a local file to an object, atomically, with at most `rate` bytes a second (0: no limit)."""
        self._put(path, Path(file), rate)

    def _put(self, path: str, source: bytes | Path, rate: int = 0) -> None:
        place, key = self._locate(path)
        place._etags.pop(key, None)
        _wait(place._patiently(key, "", lambda: place._backend.put(key, source, rate), writing=True))

    def replace(self, path: str, data: bytes, etag: str) -> None:
        """Write an object atomically, if nobody else has written it meanwhile.

        Parameters
        ----------
        path : str
            The object.
        data : bytes
            Its new content.
        etag : str
            Its version (`head`, `read_new`); "": it must not exist yet.

        Raises
        ------
        ObjectChanged
            If it has another version, or exists already.
        """
        place, key = self._locate(path)
        place._etags.pop(key, None)
        try:
            _wait(place._patiently(key, "", lambda: place._backend.replace(key, data, etag), writing=True))
        except ObjectChanged:
            # an earlier try may have succeeded although its answer was lost
            with contextlib.suppress(FileNotFoundError, DataError):
                if self.read(path, len(data)) == data:
                    return
            raise ObjectChanged(f"{place._name(key)}: somebody else has written it meanwhile") from None

    def delete(self, path: str) -> None:
        """Remove an object. If it does not exist, some stores raise FileNotFoundError and others do not."""
        place, key = self._locate(path)
        place._etags.pop(key, None)
        _wait(place._patiently(key, "", lambda: place._backend.delete(key), writing=True))

    # Requests and retries

    def _read_local(
        self, files: LocalBackend, key: str, starts: Sequence[int], sizes: Sequence[int], whole: int | None
    ) -> list[Buffer]:
        try:
            parts, info = files.ranges(key, starts, sizes, self._etags.get(key, ""))
        except FileNotFoundError:
            raise FileNotFoundError(self._name(key)) from None
        except PermissionError as error:
            raise AccessError(f"{self._name(key)}: {error.strerror}") from None
        except Changed:
            raise self._changed(key) from None
        except OSError as error:  # a failing disk: the error names no file
            raise StoreError(f"{self._name(key)}: could not be read: {error.strerror or error}") from error
        if whole is not None and info.size != whole:
            raise self._other_size(key, info.size, whole)
        self._etags.setdefault(key, info.etag)
        for part, start, size in zip(parts, starts, sizes, strict=True):
            if len(part) != size:
                raise self._too_short(key, start, size, info.size)
        self.traffic.requests += len(parts)
        self.traffic.bytes += sum(sizes)
        return list(parts)

    async def _bodies(self, key: str, requests: Sequence[Joined], whole: int | None) -> list[Buffer]:
        """The body of each request. If there are many small ones, they are fetched in bulk."""
        small = [i for i, r in enumerate(requests) if r.size <= PART]
        bulk = len(small) > 2 and isinstance(self._backend, ObjectBackend)
        alone = [i for i, r in enumerate(requests) if not bulk or r.size > PART]
        if bulk and key not in self._etags:  # bulk reads return no ETag: it must be known before they begin
            alone.append(small.pop(0))
        groups = [small[i : i + _BULK] for i in range(0, len(small), _BULK)] if bulk else []
        first = await asyncio.gather(
            *(self._fetch_large(key, requests[i].start, requests[i].size, whole) for i in alone)
        )
        rest = await asyncio.gather(*(self._fetch_bulk(key, [requests[i] for i in group], whole) for group in groups))
        out: list[Any] = [None] * len(requests)
        for i, body in zip(alone, first, strict=True):
            out[i] = body
        for group, bodies in zip(groups, rest, strict=True):
            for i, body in zip(group, bodies, strict=True):
                out[i] = body
        return out

    async def _fetch_bulk(self, key: str, requests: Sequence[Joined], of: int | None) -> list[Buffer]:
        """All requests but the last in one call without an ETag, then the last one with the ETag as a condition.

        If the last one finds the object unchanged, it was unchanged before too, so the others have the same version.
        """
        assert isinstance(self._backend, ObjectBackend)
        *most, last = requests
        limit = self._limit()
        await limit.acquire(min(len(most), _BULK_FLYING))
        try:
            self.traffic.requests += len(most)
            bodies = await self._backend.fetch_many(key, [r.start for r in most], [r.size for r in most])
            sizes = [memoryview(b).nbytes for b in bodies]
            self.traffic.bytes += sum(sizes)
            whole = sizes == [r.size for r in most]
        except Throttled:
            limit.shrink()
            self.traffic.throttled += 1
            whole = False
        except Exception:  # one of them failed: fetching each by itself retries it and reports which one fails
            whole = False
        finally:
            limit.release(min(len(most), _BULK_FLYING))
        if not whole:
            self.traffic.retries += len(most)
            bodies = await asyncio.gather(*(self._fetch(key, r.start, r.size, of) for r in most))
        return [*bodies, await self._fetch(key, last.start, last.size, of)]

    async def _fetch_large(self, key: str, start: int, size: int, whole: int | None) -> Buffer:
        if size <= 2 * PART:
            return await self._fetch(key, start, size, whole)
        starts = range(start, start + size, PART)
        parts = await asyncio.gather(*(self._fetch(key, s, min(PART, start + size - s), whole) for s in starts))
        return b"".join(parts)

    async def _fetch(self, key: str, start: int, size: int, whole: int | None = None) -> Buffer:
        if size == 0:
            return b""
        tries = 0

        async def once() -> Buffer:
            nonlocal tries
            tries += 1
            etag = self._etags.get(key, "")
            try:
                data, info = await self._backend.fetch(key, start, size, etag)
                self.traffic.bytes += memoryview(data).nbytes
                if etag and info.etag and info.etag != etag:
                    raise Changed
            except Changed:
                if not etag or (await self._backend.head(key)).etag != etag:
                    raise
                raise Transient("the answer came from another version of the object, or from another object") from None
            except (FileNotFoundError, OutOfRange):
                if whole is not None and self._may_come_back(key, tries):
                    raise Transient("the store said that the object, or this range of it, does not exist") from None
                raise
            if whole is not None and 0 <= info.size != whole:
                if self._may_come_back(key, tries):
                    raise Transient(f"the answer came from an object of {info.size} bytes, not {whole}")
                raise self._other_size(key, info.size, whole)
            self._missed.pop(key, None)
            have = memoryview(data).nbytes
            if have != size:
                if info.size < start + size:
                    raise self._too_short(key, start, size, info.size)
                raise Transient(f"{have} bytes came instead of {size}")
            if info.etag:
                self._etags.setdefault(key, info.etag)
            return data

        return await self._patiently(key, f", bytes {start}–{start + size}", once)

    def _may_come_back(self, key: str, tries: int) -> bool:
        """Whether to ask again for an object that an index names, but that the store does not have or has in another size.

        It may be back soon, for example if it is being moved or a proxy answered wrongly. The time counts from the first miss, so
        an object that stays missing soon becomes an error at once.
        """
        since = self._missed.setdefault(key, time.monotonic())
        return tries < self.attempts and time.monotonic() - since < self.timeout / 2

    async def _patiently(self, key: str, span: str, once: Callable[[], Awaitable[T]], writing: bool = False) -> T:
        """Call `once`, and again after transient failures: at most `attempts` tries, with exponential backoff and full jitter."""
        began, failure = time.monotonic(), ""
        limit = self._limit()
        for attempt in range(self.attempts):
            if attempt:
                self.traffic.retries += 1
                await asyncio.sleep(random.uniform(0.02, 0.1 * 2**attempt) if attempt < 7 else 10.0)
            await limit.acquire()
            self.traffic.requests += 1
            try:
                result = await once()
            except Transient as error:
                failure = str(error)
                if isinstance(error, Throttled):
                    self.traffic.throttled += 1
                    limit.shrink()
                continue
            except FileNotFoundError:
                raise FileNotFoundError(self._name(key)) from None
            except PermissionError as error:
                advice = (
                    "Check that this environment has credentials, that they have not expired, and that they allow this"
                )
                if "RequestTimeTooSkewed" in str(error):
                    advice = "Set this machine's clock: signed requests contain its time"
                raise AccessError(
                    f"{self._name(key)}{span}: the store refuses access ({_first_line(str(error))}). {advice}"
                ) from None
            except Refused as error:
                raise StoreError(
                    f"{self._name(key)}{span}: the store refuses the request: {_first_line(str(error))}"
                ) from None
            except Changed:
                raise self._changed(key) from None
            except OutOfRange:
                raise DataError(
                    f"{self._name(key)}{span}: the object ends before these bytes; it was cut off or does not belong to "
                    "this index"
                ) from None
            finally:
                limit.release()
            limit.grow()
            return result
        what = "written" if writing else "read"
        raise StoreError(
            f"{self._name(key)}{span}: could not be {what} in {self.attempts} tries "
            f"over {time.monotonic() - began:.0f} s; the last failure: {_first_line(failure)}{_proxy_hint()}"
        )

    def _limit(self) -> RequestLimit:
        loop = asyncio.get_running_loop()
        found = self._limits.get(loop)
        if found is None:
            found = self._limits[loop] = RequestLimit(self.requests)
        return found

    # Names

    def _locate(self, path: str) -> tuple[Store, str]:
        """The store that a path refers to, and the key within it."""
        if "://" in path:
            check_url(path)
            folder, _, name = path.rpartition("/")
            if folder.startswith("file:") and not self.local:
                raise DataError(f"{redacted(self.url)}: a dataset in a store may not point to the local disk: {path}")
            other = self._elsewhere.get(folder)
            if other is None:
                other = _restore(folder, self.requests, self.attempts, self.timeout, self.gap, by_data=True)
                other.traffic = self.traffic
                self._elsewhere[folder] = other
            return other, name
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise DataError(f"{redacted(self.url)}: the path {path!r} leaves its folder")
        return self, path

    def _name(self, key: str) -> str:
        return f"{redacted(self.url)}/{key}"

    def _too_short(self, key: str, start: int, size: int, have: int) -> DataError:
        return DataError(
            f"{self._name(key)}: has {have} bytes, but bytes {start}–{start + size} were requested; "
            "it was cut off or does not belong to this index"
        )

    def _other_size(self, key: str, have: int, whole: int) -> DataError:
        return DataError(
            f"{self._name(key)}: has {have} bytes, but its index says {whole}; "
            "it was cut off, replaced, or does not belong to this index"
        )

    def _changed(self, key: str) -> ObjectChanged:
        return ObjectChanged(
            f"{self._name(key)}: was replaced while it was being read (its ETag changed). "
            "A dataset must not change during a run: write a new one beside it"
        )

    def times(self, prefix: str = "") -> dict[str, float]:
        """Paths of all objects in a folder, at any depth -> when they were written, in seconds of the store's clock.

        A time is infinite if the store does not say it.
        """
        place, key = self._locate(prefix)
        return _wait(place._patiently(key, "", lambda: place._backend.times(key)))

    # The last method, because it hides the builtin `list` in the rest of the class
    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths of all objects in a folder, at any depth; empty if there is no such folder."""
        place, key = self._locate(prefix)
        return _wait(place._patiently(key, "", lambda: place._backend.keys(key)))


def _restore(url: str, requests: int, attempts: int, timeout: float, gap: int, by_data: bool) -> Store:
    return Store(url, requests=requests, attempts=attempts, timeout=timeout, gap=gap, by_data=by_data)


def _first_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:300] or "no answer"


def _proxy_hint() -> str:
    """A hint for messages, because a dead proxy looks like a dead store; empty if no proxy is set."""
    names = [n for n in ("http_proxy", "https_proxy", "all_proxy") if os.environ.get(n) or os.environ.get(n.upper())]
    return f" (the environment sets {', '.join(names)}: the proxy may be what fails)" if names else ""


# One event loop in a thread serves all blocking calls of a process.

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _forget_loop() -> None:
    global _loop
    _loop = None  # a forked child has the object but not its thread


def _wait(work: Coroutine[Any, Any, T]) -> T:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="tiphys-store", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(work, _loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


os.register_at_fork(after_in_child=_forget_loop)
