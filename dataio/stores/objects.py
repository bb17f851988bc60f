"""The backend of object stores (S3, GCS, Azure, HTTP), by obstore."""

from __future__ import annotations

import asyncio
import configparser
import errno
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import redacted
from tiphys.dataio.stores import threads
from tiphys.dataio.stores.backend import Changed, ObjectInfo, OutOfRange, Refused, Throttled, Transient, pause

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ObjectBackend:
    """S3, GCS, Azure and HTTP, by obstore (Rust's object_store). Its own retries are off, because `Store` must see each 503.

    If the store refuses credentials of AWS as expired or invalid, they are looked up again, because they may have been renewed.
    """

    def __init__(self, url: str, timeout: float):
        import obstore

        self.obstore = obstore
        self._url, self._timeout = url, timeout
        self.store, self._keys = self._open()
        self._renewing = threading.Lock()

    def _open(self) -> tuple[Any, tuple[str, ...]]:
        """obstore's store, and the keys that it was opened with, if any."""
        from obstore.store import HTTPStore, from_url

        url, timeout = self._url, self._timeout
        scheme = urlsplit(url).scheme.lower()
        client: Any = {
            "read_timeout": f"{max(1, round(timeout * 1000))}ms",  # between two reads of a body: detects stalls
            "timeout": f"{max(60, round(timeout * 20))}s",  # of a whole request, including uploads
            "connect_timeout": f"{max(1, round(min(timeout, 10.0) * 1000))}ms",
            "pool_max_idle_per_host": "256",
        }
        retries: Any = {"max_retries": 0}
        if scheme in ("http", "https"):
            client["allow_http"] = scheme == "http"
            return HTTPStore.from_url(url, client_options=client, retry_config=retries), ()
        if scheme in ("s3", "s3a"):
            config: Any
            config, provider = _s3_configuration()
            client["allow_http"] = config.get("endpoint", "").startswith("http://")
            more: Any = {"credential_provider": provider} if provider else {}
            given = provider() if provider else config
            names = ("access_key_id", "secret_access_key", "session_token", "token")
            keys = tuple(str(given[name]) for name in names if given.get(name))
            return from_url(url, config=config, client_options=client, retry_config=retries, **more), keys
        local = "AZURE_STORAGE_USE_EMULATOR" in os.environ or "STORAGE_EMULATOR_HOST" in os.environ
        client["allow_http"] = local
        return from_url(url.replace("gcs://", "gs://", 1), client_options=client, retry_config=retries), ()

    async def _failed(self, error: Exception, key: str, store: Any) -> Exception:
        """The common exception for one of obstore's. If credentials were refused and there are new ones, it is Transient."""
        found = _translated(error, key)
        if isinstance(found, PermissionError) and any(code in str(found) for code in _EXPIRED):
            try:
                renewed = await asyncio.to_thread(self._renew, store)
            except Exception as failure:
                return PermissionError(f"{found}; looking for new credentials failed too: {redacted(str(failure))}")
            if renewed:
                return Transient(str(found))
        return found

    def _renew(self, refused: Any) -> bool:
        """Look up the credentials again. Returns whether they differ from those of the store that was refused."""
        with self._renewing:
            if self.store is refused:
                store, keys = self._open()
                if len(keys) < len(self._keys) or keys == self._keys:  # fewer keys: the file is being written right now
                    return False
                self.store, self._keys = store, keys
            return True

    async def fetch(self, key: str, start: int, size: int, etag: str) -> tuple[Buffer, ObjectInfo]:
        options: Any = {"range": (start, start + size)}
        if etag and not etag.startswith("W/"):  # a weak tag never matches (RFC 9110, 13.1.1); the caller compares it
            options["if_match"] = etag
        store = self.store
        ends = asyncio.get_running_loop().time() + threads.patience(size, self._timeout)
        try:
            return await threads.by(ends, threads.call(self._get, store, key, options, size))
        except Exception as error:
            raise await self._failed(error, key, store) from error

    def _get(self, store: Any, key: str, options: Any, size: int) -> tuple[Buffer, ObjectInfo]:
        result = self.obstore.get(store, key, options=options)
        # The first piece ends with the body or one byte after the requested ones, so an endless answer is not read
        data = next(iter(result.stream(min_chunk_size=size + 1)), b"")
        meta = result.meta
        return data, ObjectInfo(meta["size"], meta["e_tag"] or "")

    async def fetch_many(self, key: str, starts: Sequence[int], sizes: Sequence[int]) -> Sequence[Buffer]:
        """Several ranges, ten in flight, with half the CPU time of as many `fetch`. No ETag is checked; one failure fails all."""
        store = self.store
        ends = asyncio.get_running_loop().time() + threads.patience(sum(sizes), self._timeout)
        try:
            return await threads.by(
                ends, self.obstore.get_ranges_async(store, key, starts=starts, lengths=sizes, coalesce=0)
            )
        except Exception as error:
            raise await self._failed(error, key, store) from error

    async def head(self, key: str) -> ObjectInfo:
        store = self.store
        try:
            meta = await self.obstore.head_async(store, key)
        except Exception as error:
            raise await self._failed(error, key, store) from error
        return ObjectInfo(meta["size"], meta["e_tag"] or "")

    async def fetch_new(self, key: str, etag: str, limit: int) -> tuple[Buffer, ObjectInfo] | None:
        store, options = self.store, {"if_none_match": etag} if etag else {}
        ends = asyncio.get_running_loop().time() + threads.patience(limit, self._timeout)
        try:
            return await threads.by(ends, threads.call(self._get, store, key, options, limit))
        except self.obstore.exceptions.NotModifiedError:
            return None
        except Exception as error:
            raise await self._failed(error, key, store) from error

    async def put(self, key: str, source: bytes | Path, rate: int = 0) -> None:
        store = self.store
        given: Any = _paced(source, rate) if rate and isinstance(source, Path) else source
        try:
            await self.obstore.put_async(store, key, given)
        except Exception as error:
            raise await self._failed(error, key, store) from error

    async def replace(self, key: str, data: bytes, etag: str) -> None:
        store = self.store
        mode: Any = "create"
        try:
            if etag:
                meta = await self.obstore.head_async(store, key)
                if meta["e_tag"] != etag:
                    raise Changed
                # some stores compare the ETag, some the version
                mode = {"e_tag": etag} | ({"version": meta["version"]} if meta.get("version") else {})
            await self.obstore.put_async(store, key, data, mode=mode, use_multipart=False)
        except Changed:
            raise
        except (self.obstore.exceptions.AlreadyExistsError, self.obstore.exceptions.PreconditionError):
            raise Changed from None
        except Exception as error:
            failed = await self._failed(error, key, store)
            if etag and isinstance(failed, FileNotFoundError):
                raise Changed from None
            raise failed from error

    async def times(self, folder: str) -> dict[str, float]:
        found, store = dict[str, float](), self.store
        try:
            async for page in self.obstore.list(store, prefix=folder or None, chunk_size=1000):
                found |= {meta["path"]: meta["last_modified"].timestamp() for meta in page}
        except Exception as error:
            raise await self._failed(error, folder, store) from error
        return found

    async def keys(self, folder: str) -> list[str]:
        found, store = list[str](), self.store
        try:
            async for page in self.obstore.list(store, prefix=folder or None, chunk_size=1000):
                found += [meta["path"] for meta in page]
        except Exception as error:
            raise await self._failed(error, folder, store) from error
        return sorted(found)

    async def delete(self, key: str) -> None:
        store = self.store
        try:
            await self.obstore.delete_async(store, key)
        except Exception as error:
            raise await self._failed(error, key, store) from error


async def _paced(file: Path, rate: int) -> AsyncIterator[bytes]:
    """The parts of a file, at most `rate` bytes a second."""
    began, done = time.monotonic(), 0
    with file.open("rb") as opened:
        while part := await asyncio.to_thread(opened.read, 1 << 20):
            yield part
            done += len(part)
            await asyncio.sleep(pause(done, began, rate))


_STATUS = re.compile(r"status code: (\d{3})")
_MENDING = (304, 408, 409, 425)  # these answers do not fit the request, or come too early: the request is repeated
_METADATA = ("169.254.169.254", "169.254.170.2")  # where machines and containers of AWS ask for credentials
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken")


def _translated(error: Exception, key: str) -> Exception:
    """The common exception (see `backend`) for one of obstore's. Exceptions that the store did not cause stay as they are."""
    from obstore import exceptions as o

    text = redacted(str(error).split("\n\nDebug source", 1)[0])
    found = _STATUS.search(text)
    status = int(found[1]) if found else 0
    if "NoSuchBucket" in text:
        return Refused("there is no such bucket; create it, or check its name")
    if any(place in text for place in _METADATA):
        text = (
            f"no credentials: neither the environment nor ~/.aws has any, and the metadata service gives none ({text})"
        )
        if status in (401, 403, 404):
            return PermissionError(
                "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
    if isinstance(error, (FileNotFoundError, Transient)):
        return FileNotFoundError(key) if isinstance(error, FileNotFoundError) else error
    if isinstance(error, (o.PermissionDeniedError, o.UnauthenticatedError)) or any(code in text for code in _EXPIRED):
        return PermissionError(text)
    if isinstance(error, o.PreconditionError):
        return Changed()
    if status == 416:
        return OutOfRange()
    if status in (429, 503) or "SlowDown" in text or f"(os error {errno.EMFILE})" in text:  # EMFILE: too many sockets
        return Throttled(text)
    if not isinstance(error, o.BaseError):
        return error
    # A 400 without an error code does not come from the store, but from something in between, such as a proxy
    if status in _MENDING or status >= 500 or (status == 400 and ("<Code>" not in text or "RequestTimeout" in text)):
        return Transient(text)
    return Transient(text) if status == 0 and isinstance(error, o.GenericError) else Refused(text)


def _s3_configuration() -> tuple[dict[str, str], Any]:
    """Endpoint, region and keys, found as AWS' own tools find them: in the environment, in the profile's files, or by obstore.

    Returns obstore's configuration, and a provider of credentials or None. A profile without static keys (SSO, assumed roles,
    credential_process) is left to boto3. Raises DataError if that is not installed.
    """
    env = os.environ
    config: dict[str, str] = {}
    profile = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or ""
    settings = _aws_profile(profile or "default")
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or settings.get("endpoint_url")
    if endpoint:
        config["endpoint"] = endpoint.rstrip("/")
    config["region"] = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or settings.get("region") or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in env and not profile:
        return config, None
    if "aws_access_key_id" in settings:
        names = ("access_key_id", "secret_access_key", "session_token")
        return config | {n: settings[f"aws_{n}"] for n in names if f"aws_{n}" in settings}, None
    if not profile:
        return config, None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise DataError(
            f"AWS_PROFILE={profile}: the profile has no static keys, and other credentials need boto3: pip install boto3"
        ) from None
    # boto3 renews credentials that have less than ten minutes left, so obstore must not keep them longer than that
    return config, Boto3CredentialProvider(boto3.Session(profile_name=profile), ttl=timedelta(minutes=10))


def _aws_profile(name: str) -> dict[str, str]:
    """A profile's settings from ~/.aws/config and ~/.aws/credentials, as far as they exist."""
    settings: dict[str, str] = {}
    files = (
        (os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"), name if name == "default" else f"profile {name}"),
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), name),
    )
    for path, section in files:
        parser = configparser.RawConfigParser()
        parser.read(os.path.expanduser(path))
        if parser.has_section(section):
            settings.update(parser[section])
    return settings
