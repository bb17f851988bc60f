"""`dataset.json`, `index.parquet` and `statistics.parquet`: how they are read, checked, published, and cached on each node."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, limited, table
from tiphys.dataio.format.rows import check_task
from tiphys.dataio.messages import logger
from tiphys.dataio.private import is_private, private_folder
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.stored import task_specs
from tiphys.dataio.stores.schemes import HOST_SCHEMES, check_url
from tiphys.dataio.stores.web import HOSTS, allowed_hosts
from tiphys.paths import expand

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

log = logger(__name__)
DATASET, INDEX, STATISTICS = "dataset.json", "index.parquet", "statistics.parquet"
VERSION = 1
_DECODED = 2  # version of the decoded arrays; part of the key of the cache


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """`dataset.json` with `tasks` as TaskSpecs and `shards` as Shards. Raises DataError if it is not valid."""
    try:
        document = json.loads(raw)
        if document["version"] != VERSION:
            raise DataError(f"{where}: version {document['version']!r}; this Tiphys reads version {VERSION}")
        digest = document["digests"][INDEX]
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise DataError(f"{where}: digests: {INDEX}: {digest!r} is not a SHA-256")
        document["tasks"] = task_specs(document["tasks"], f"{where}: tasks")
        document["shards"] = [
            table.Shard(str(n), int(size), int(crc), *map(str, etag)) for n, size, crc, *etag in document["shards"]
        ]
        for task in document["tasks"]:
            check_task(task)
        for shard in document["shards"]:
            check_shard(shard, where)
        dict(document["statistics"])
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} does not describe a Tiphys dataset: {type(error).__name__} {error}") from None
    return document


def check_shard(shard: table.Shard, where: str) -> None:
    """A shard is named by a path within the dataset's folder or by a URL. Only a local dataset may name local files.

    Whoever wrote the dataset chose the URL, which must not make this machine ask others in its network. So a host must be that of
    the dataset, or one that the user allows.
    """
    check_url(shard.name)
    scheme = urlsplit(shard.name).scheme
    host = urlsplit(shard.name).hostname or ""
    if scheme in HOST_SCHEMES and host not in (urlsplit(where).hostname, *allowed_hosts()):
        raise DataError(
            f"{where}: shard {shard.name!r} lies on another host; if you trust this dataset, allow it: {HOSTS}={host}"
        )
    inside = not scheme and not shard.name.startswith("/") and ".." not in shard.name.split("/")
    elsewhere = scheme and (scheme != "file" or urlsplit(where).scheme in ("", "file"))
    if not (inside or elsewhere) or shard.size < 0:
        raise DataError(
            f"{where}: shard {shard.name!r} of {shard.size} bytes is not valid: it must be a path within the dataset's "
            "folder or a URL (file:// only in a local dataset), with a size of at least 0"
        )


def cache_folder(cache_dir: str = "") -> Path:
    """The folder of the decoded indexes: in `cache_dir`, else in $TIPHYS_CACHE, else in ~/.cache/tiphys."""
    return Path(cache_dir or expand(os.environ.get("TIPHYS_CACHE", "")) or Path.home() / ".cache" / "tiphys") / "index"


def fetch(store: Store, path: str, file: Path, part: int = 64 << 20) -> str:
    """Copy an object to a local file, `part` bytes at a time. Returns its SHA-256.

    Raises DataError if the object is larger than the free space of the file's disk.
    """
    digest = hashlib.sha256()
    size = store.head(path).size
    free = shutil.disk_usage(file.parent).free
    if not 0 <= size <= free:
        raise DataError(f"{store.url}/{path} has {size:,} bytes, but {file.parent} has room for {free:,}")
    with open(file, "wb") as out:
        for start in range(0, size, part):
            (data,) = store.read_ranges(path, [start], [min(part, size - start)])
            digest.update(data)
            out.write(data)
    return digest.hexdigest()


def decoded(store: Store, document: Mapping[str, Any], cache: Path) -> Path:
    """The folder in `cache` with the dataset's decoded index. If it is missing, the index is downloaded and decoded first.

    Raises DataError if the index does not have the digest that `dataset.json` names, is damaged, or points outside its shards,
    or if the cache may hold the files of another user.
    """
    names = [t.name for t in document["tasks"]], [s.name for s in document["shards"]]
    key = hashlib.sha256(json.dumps([_DECODED, document["digests"][INDEX], *names]).encode()).hexdigest()
    folder = private_folder(cache) / key
    if os.path.lexists(folder):
        try:
            _check_decoded(folder)
            return folder
        except DataError as error:
            log.warning("%s: the cached index is made again: %s", store.url, error)
            _discard(folder)
    scratch = Path(tempfile.mkdtemp(prefix=".decoding-", dir=cache))
    try:
        file = scratch / INDEX
        if fetch(store, INDEX, file) != document["digests"][INDEX]:
            raise DataError(
                f"{store.url}/{INDEX} does not have the SHA-256 that {DATASET} names: it is damaged, or a rewrite was "
                "interrupted; run `tiphys verify --repair`"
            )
        loaded = limited.decode(file, scratch, *names, f"{store.url}/{INDEX}")
        arrays.check(loaded, document["tasks"], document["shards"], f"{store.url}/{INDEX}")
        file.unlink()
        arrays.seal(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it exists, another process decoded the same index first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_decoded(folder: Path) -> None:
    """Raises DataError if a decoded index in the cache is not what was once checked and written there."""
    if not is_private(folder):
        raise DataError(f"{folder} is not a folder of this user's own")
    arrays.check_seal(folder)


def _discard(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def dataset_document(index: Path, statistics: Statistics) -> dict[str, Any]:
    """The content of `dataset.json` for an index file."""
    tasks, shards = table.read_tasks_and_shards(index)
    result = statistics.result(t.name for t in tasks)
    return {
        "version": VERSION,
        "tasks": [t.to_dict() for t in tasks],
        "shards": [s.to_list() for s in shards],
        "statistics": {t: {f: s.to_dict() for f, s in fields.items()} for t, fields in result.items()},
        "digests": {INDEX: sha256(index)},
    }


def publish(store: Store, index: Path, statistics: Statistics, **more: Any) -> None:
    """Upload the statistics, then the index, and last `dataset.json`, which makes the folder a dataset.

    `more` are further keys of `dataset.json`. Raises DataError if two episodes have one id; nothing is uploaded then.
    """
    table.check_ids(index, store.url)
    sketches = index.with_name(STATISTICS)
    statistics.write(sketches)
    document = dataset_document(index, statistics) | more
    document["digests"][STATISTICS] = sha256(sketches)
    store.upload(STATISTICS, str(sketches))
    store.upload(INDEX, str(index))
    store.write(DATASET, to_json(document, indent=1, ensure_ascii=False).encode())


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
