"""The folder of a policy that is named by a path, a bucket or a hub. What is elsewhere is fetched into a temporary folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import ObjectChanged, Store
from tiphys.pretrain.follow.chain import CONFIG, LARGEST_TEXT, LATEST, TEXTS, WEIGHTS, temporary_folder
from tiphys.pretrain.follow.follower import Follower
from tiphys.pretrain.hub_errors import FetchError, hub_message
from tiphys.pretrain.sources import code_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # of models of other libraries
_PART = 64 << 20  # bytes that are read at once


def local_policy(name: str | Path, revision: str = "") -> Path:
    """The local folder of a policy.

    Parameters
    ----------
    name : str or Path
        Folder of a run or of a policy, ``hf://owner/name``, or the URL of a policy in a store, such as ``s3://bucket/path``.
    revision : str
        Commit, tag or branch of a hub's repository; empty: its newest commit. `hub_commit` tells which commit that was.

    Returns
    -------
    Path
        The folder. If the policy was fetched, it is removed when this process ends.

    Raises
    ------
    FileNotFoundError
        If there is no policy.
    DataError
        If a file of the policy is larger than a policy's.
    FetchError, StoreError
        If a hub or a store refuses or cannot be reached.
    """
    text = str(name)
    if text.startswith("hf://"):
        return _from_hub(text, revision)
    if "://" in text and not text.startswith("file://"):
        return _from_store(text)
    folder = Path(text.removeprefix("file://"))
    for place in (folder / "policy", folder):
        if (place / LATEST).is_file():
            return Follower(str(place)).fetch()
        if (place / CONFIG).is_file():
            return place
    if (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{name}: this run has no policy yet. It gets one after its last step; with `publish.to` and `publish.every` it also "
            "publishes while it trains"
        )
    raise FileNotFoundError(
        f"{name}: neither the folder of a run with a policy nor a policy; it has no {CONFIG} and no {LATEST}"
    )


def hub_commit(folder: Path) -> str:
    """The commit of a folder that `local_policy` has fetched from a hub; empty: it is none."""
    return folder.name if folder.parent.name == "snapshots" else ""


def whole_policy(name: str | Path) -> Path:
    """Like `local_policy`, but what was fetched also has the source code that makes it act elsewhere: that of this Tiphys."""
    folder = local_policy(name)
    if (folder / "policy.py").is_file():
        return folder
    whole = temporary_folder()
    shutil.copytree(folder, whole, dirs_exist_ok=True)  # a hub's client keeps links to its cache
    for file, source in code_files().items():
        (whole / file).write_text(source, encoding="utf-8")
    return whole


def _from_store(url: str) -> Path:
    store = Store(url)
    if store.exists(LATEST):
        return Follower(url).fetch()
    there = store.list()
    if CONFIG not in there:
        raise FileNotFoundError(f"{url}: there is no policy; it has no {CONFIG}")
    before = store.head(CONFIG)
    folder = temporary_folder()
    for name in there:
        if name in (*TEXTS, *TOKENIZERS) or WEIGHTS.fullmatch(name):
            _fetch(store, name, folder / name)
    if Store(url).head(CONFIG) != before:
        raise ObjectChanged(f"{url}: another policy was published there while this one was fetched; try again")
    return folder


def _fetch(store: Store, name: str, file: Path) -> None:
    size = store.head(name).size
    if name in TEXTS and size > LARGEST_TEXT:
        raise DataError(
            f"{store.url}/{name}: {size} bytes are too many for this file of a policy; at most {LARGEST_TEXT}"
        )
    free = shutil.disk_usage(file.parent).free
    if size > free:
        raise DataError(f"{store.url}/{name}: has {size} bytes, but only {free} are free in {file.parent}; set TMPDIR")
    with file.open("wb") as out:
        for start in range(0, size, _PART):
            (part,) = store.read_ranges(name, [start], [min(_PART, size - start)], whole=size)
            out.write(part)


def _from_hub(url: str, revision: str = "") -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            url.removeprefix("hf://").strip("/"),
            revision=revision or None,
            allow_patterns=[*TEXTS, *TOKENIZERS, "model*.safetensors"],
        )
    except Exception as error:
        raise FetchError(hub_message(url, error)) from None
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"{url}: there is no policy; it has no {CONFIG}")
    return Path(folder)
