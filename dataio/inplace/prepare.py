"""`prepare` makes the index of a raw LeRobot folder, once on each machine, before a run begins."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.atomic import write_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.document import DATASET
from tiphys.dataio.inplace.build import IndexOptions, index_lerobot
from tiphys.dataio.inplace.place import INFO, check_source, is_lerobot, location
from tiphys.dataio.messages import counted, logger
from tiphys.dataio.storage import Store

log = logger(__name__)
_STATE = "source.json"  # beside the index: what its source was like


def prepare(url: str, cache_dir: str = "", progress: Callable[[int, int], None] | None = None) -> str:
    """The folder of the dataset that a URL names: itself, or the index of a raw LeRobot folder, which is made if there is none.

    Of several processes on a machine, one makes the index and the others wait for it.

    Raises
    ------
    DataError
        If the source has changed since its index was made, or cannot be indexed.
    """
    if not is_raw(url):
        return url
    folder = Path(location(url, cache_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = source_state(url)
        if (folder / DATASET).is_file():
            check_source(json.loads((folder / DATASET).read_bytes()), str(folder))
            _check_state(url, folder, state)
            return str(folder)
        log.info("%s: its index is made at %s", url, folder)
        index_lerobot(url, str(folder), IndexOptions(), progress)
        write_json(folder / _STATE, state)
    return str(folder)


def is_raw(url: str) -> bool:
    """Whether a URL names a LeRobot folder, and no dataset of Tiphys."""
    store = Store(url)
    return not store.exists(DATASET) and is_lerobot(store)


def is_waiting(url: str, cache_dir: str = "") -> bool:
    """Whether a URL names a raw LeRobot folder that has no index yet."""
    return is_raw(url) and not (Path(location(url, cache_dir)) / DATASET).is_file()


def source_state(url: str) -> dict[str, Any]:
    """What changes if the files of a local folder do, or the metadata of one in a store. A hub's commit never changes."""
    if url.startswith("hf://"):
        return {}
    source = Source(url)
    digest = hashlib.sha256(source.read(INFO))
    for path in source.files:
        known = source.is_local or path.startswith("meta/")
        digest.update(f"{path} {source.version(path) if known else ''}\n".encode())
    return {"files": digest.hexdigest()}


def _check_state(url: str, folder: Path, state: dict[str, Any]) -> None:
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # `tiphys index` was given this folder
        known = json.loads((folder / _STATE).read_bytes())
    if known and known != state:
        raise DataError(f"{url} has changed since its index was made: remove the folder {folder}, and it is made again")


def cost_line(url: str) -> str:
    """What indexing a raw LeRobot folder will cost, by its metadata, and the command that does it."""
    info = json.loads(Store(url).read(INFO))
    features = [f for f in info.get("features", {}).values() if isinstance(f, dict)]
    cameras = sum(f.get("dtype") == "video" for f in features)
    episodes, frames = int(info.get("total_episodes") or 0), int(info.get("total_frames") or 0)
    row = sum(_bytes(f) for f in features)
    return (
        f"{url}: is a LeRobot dataset without an index. Training makes one on each node before it starts, at {location(url)}: it "
        f"copies the rows of {counted(episodes, 'episode')}, about {max(1, row * frames / 2**20):,.0f} MiB, reads the tables of "
        f"the videos of {counted(cameras, 'camera')}, and copies no video. To do it now: tiphys index {url}"
    )


def _bytes(feature: dict[str, Any]) -> int:
    try:
        return int(np.dtype(str(feature.get("dtype"))).itemsize * math.prod(feature.get("shape") or ()))
    except TypeError:  # a video or a text
        return 0


__all__ = ["cost_line", "is_raw", "is_waiting", "prepare", "source_state"]
