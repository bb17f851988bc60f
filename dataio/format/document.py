"""`dataset.json` and what stands beside it: checked when read, written last, its index decoded once on every node."""

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

from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format import arrays, table
from tiphys.dataio.format.rows import check_task
from tiphys.dataio.statistics import Statistics

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

DATASET, INDEX, STATISTICS = "dataset.json", "index.parquet", "statistics.parquet"
VERSION = 1
_DECODED = 1  # changes when the decoded arrays change their form


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """`dataset.json`, with `tasks` as TaskSpecs and `shards` as Shards. Raises DataError where it is not what it should be."""
    try:
        document = json.loads(raw)
        if document["version"] != VERSION:
            raise DataError(f"{where}: version {document['version']!r}; this Tiphys reads version {VERSION}")
        digest = document["digests"][INDEX]
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise DataError(f"{where}: digests: {INDEX}: {digest!r} is no SHA-256")
        document["tasks"] = [TaskSpec(**t) for t in document["tasks"]]
        document["shards"] = [table.Shard(str(n), int(size), int(crc)) for n, size, crc in document["shards"]]
        for task in document["tasks"]:
            check_task(task)
        for shard in document["shards"]:
            _check_shard(shard, where)
        dict(document["statistics"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} is no Tiphys dataset: {type(error).__name__} {error}") from None
    return document


def _check_shard(shard: table.Shard, where: str) -> None:
    """A shard lies in the dataset's folder or has a URL; a dataset of another machine may not name files of this one."""
    scheme = urlsplit(shard.name).scheme
    inside = not scheme and not shard.name.startswith("/") and ".." not in shard.name.split("/")
    elsewhere = scheme and (scheme != "file" or urlsplit(where).scheme in ("", "file"))
    if not (inside or elsewhere) or shard.size < 0:
        raise DataError(
            f"{where}: shard {shard.name!r} of {shard.size} bytes: a path in the folder or a URL is allowed"
        )


def cache_folder(cache_dir: str = "") -> Path:
    """Where decoded indexes are kept: the argument, else $TIPHYS_CACHE, else ~/.cache/tiphys."""
    return Path(cache_dir or os.environ.get("TIPHYS_CACHE", "") or Path.home() / ".cache" / "tiphys") / "index"


def fetch(store: Store, path: str, file: Path, part: int = 64 << 20) -> str:
    """Copy an object to a local file in bounded memory; returns its SHA-256."""
    digest = hashlib.sha256()
    size = store.head(path).size
    with open(file, "wb") as out:
        for start in range(0, size, part):
            (data,) = store.read_ranges(path, [start], [min(part, size - start)])
            digest.update(data)
            out.write(data)
    return digest.hexdigest()


def decoded(store: Store, document: Mapping[str, Any], cache: Path) -> Path:
    """The folder of the dataset's decoded index; made now if this machine does not have it yet.

    Raises DataError where the index is not the one that `dataset.json` names, or points outside its shards.
    """
    names = [t.name for t in document["tasks"]], [s.name for s in document["shards"]]
    key = hashlib.sha256(json.dumps([_DECODED, document["digests"][INDEX], *names]).encode()).hexdigest()
    folder = cache / key
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".decoding-", dir=cache))
    try:
        file = scratch / INDEX
        if fetch(store, INDEX, file) != document["digests"][INDEX]:
            raise DataError(
                f"{store.url}/{INDEX} is not the one that {DATASET} names: it is damaged, or a rewrite was interrupted; "
                "run `tiphys verify --repair`"
            )
        loaded = arrays.decode(file, scratch, *names)
        arrays.check(loaded, document["tasks"], document["shards"], f"{store.url}/{INDEX}")
        file.unlink()
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def describe(index: Path, statistics: Statistics) -> dict[str, Any]:
    """What `dataset.json` says of an index file."""
    tasks, shards = table.describe(index)
    result = statistics.result(t.name for t in tasks)
    return {
        "version": VERSION,
        "tasks": [t.to_dict() for t in tasks],
        "shards": [[s.name, s.size, s.crc] for s in shards],
        "statistics": {t: {f: s.to_dict() for f, s in fields.items()} for t, fields in result.items()},
        "digests": {INDEX: sha256(index)},
    }


def publish(store: Store, index: Path, statistics: Statistics, **more: Any) -> None:
    """Upload statistics, index and, last, `dataset.json`: from then on there is a dataset."""
    sketches = index.with_name(STATISTICS)
    statistics.write(sketches)
    described = describe(index, statistics) | more
    described["digests"][STATISTICS] = sha256(sketches)
    store.upload(STATISTICS, str(sketches))
    store.upload(INDEX, str(index))
    store.write(DATASET, json.dumps(described, indent=1, ensure_ascii=False).encode())


def exists(store: Store, path: str) -> bool:
    try:
        store.head(path)
    except FileNotFoundError:
        return False
    return True


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
