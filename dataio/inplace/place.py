"""Where the index of a raw LeRobot folder is, if a recipe or a command names the folder itself.

`NAME.tiphys` beside a local folder if that can be written, else a folder in the cache, under a digest of the URL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.episode import DataError
from tiphys.paths import absolute, expand, local

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

DATASET = "dataset.json"  # the file that makes a folder a dataset of Tiphys
INFO = "meta/info.json"  # the file that makes a folder a LeRobot dataset
SUFFIX = ".tiphys"


def is_lerobot(store: Store) -> bool:
    """Whether a folder is a LeRobot dataset."""
    return store.exists(INFO)


def location(url: str, cache_dir: str = "") -> str:
    """The folder of the index of a raw LeRobot folder, whether there is one or not.

    cache_dir   as in `EpisodeIndex.open`
    """
    source = absolute(url)
    if source.startswith("file://"):
        folder = Path(expand(url)).resolve()
        beside = folder.with_name(folder.name + SUFFIX)
        if beside.is_dir() or os.access(folder.parent, os.W_OK):
            return str(beside)
    cache = cache_dir or expand(os.environ.get("TIPHYS_CACHE", "")) or str(Path.home() / ".cache" / "tiphys")
    return str(Path(cache) / "lerobot" / hashlib.sha256(source.encode()).hexdigest()[:32])


def check_source(document: Mapping[str, Any], url: str) -> None:
    """Raises DataError if a dataset is the index of a local LeRobot folder that is no longer where it was.

    document   its `dataset.json`
    url        the dataset
    """
    source = document.get("source")
    where = str(source.get("url", "")) if isinstance(source, dict) else ""
    if where.startswith("file://") and not (Path(local(where)) / INFO).is_file():
        raise DataError(
            f"{url}: is the index of a LeRobot dataset that is no longer at {where}. If that was moved, remove this index, and "
            "index the dataset where it is now: `tiphys index NEW-FOLDER`"
        )


def resolve(url: str, cache_dir: str = "") -> str:
    """The folder of the dataset that a URL names: the index of a raw LeRobot folder, else the URL itself.

    Raises FileNotFoundError, which says what to do, if it is a raw LeRobot folder without an index.
    """
    from tiphys.dataio.storage import Store

    store = Store(url)
    if store.exists(DATASET) or not is_lerobot(store):
        return url
    place = location(url, cache_dir)
    if Store(place).exists(DATASET):
        return place
    raise FileNotFoundError(
        f"{url}: is a LeRobot dataset without an index of Tiphys; `tiphys index {url}` makes one at {location(url)}, and copies "
        "no video. `tiphys train` does that by itself"
    )
