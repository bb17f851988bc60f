"""The folder of a policy that is named by a path, a bucket or a hub. What is elsewhere is fetched into a temporary folder."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

from tiphys.dataio.episode import DataError
from tiphys.dataio.errors import Explained
from tiphys.dataio.storage import ObjectChanged, Store
from tiphys.pretrain.sources import code_files

CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Code is not fetched: Tiphys acts with its own.
TEXTS = (CONFIG, "processor.json", "model.safetensors.index.json", "recipe.yaml", "evaluation.json", "README.md")
LARGEST_TEXT = 256 << 20  # bytes; a processor holds the vocabulary of a text tokenizer
_PART = 64 << 20  # bytes that are read at once


class FetchError(Explained, RuntimeError):
    """A policy could not be fetched. The message says from where, why, and what to do."""


def local_policy(name: str | Path) -> Path:
    """The local folder of a policy.

    Parameters
    ----------
    name : str or Path
        Folder of a run or of a policy, ``hf://owner/name``, or the URL of a policy in a store, such as ``s3://bucket/path``.

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
        return _from_hub(text)
    if "://" in text and not text.startswith("file://"):
        return _from_store(text)
    folder = Path(text.removeprefix("file://"))
    for place in (folder / "policy", folder):
        if (place / CONFIG).is_file():
            return place
    raise FileNotFoundError(f"{name}: neither the folder of a run with a policy nor a policy; it has no {CONFIG}")


def whole_policy(name: str | Path) -> Path:
    """Like `local_policy`, but what was fetched also has the source code that makes it act elsewhere: that of this Tiphys."""
    folder = local_policy(name)
    if "://" not in str(name):
        return folder
    whole = _temporary()
    shutil.copytree(folder, whole, dirs_exist_ok=True)  # a hub's client keeps links to its cache
    for file, source in code_files().items():
        (whole / file).write_text(source, encoding="utf-8")
    return whole


def _from_store(url: str) -> Path:
    store = Store(url)
    there = store.list()
    if CONFIG not in there:
        raise FileNotFoundError(f"{url}: there is no policy; it has no {CONFIG}")
    before = store.head(CONFIG)
    folder = _temporary()
    for name in there:
        if name in TEXTS or WEIGHTS.fullmatch(name):
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


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="tiphys-policy-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _from_hub(url: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(url.removeprefix("hf://").strip("/"), allow_patterns=[*TEXTS, "model*.safetensors"])
    except Exception as error:
        raise FetchError(hub_message(url, error)) from None
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"{url}: there is no policy; it has no {CONFIG}")
    return Path(folder)


_HINTS = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "this key has no permission there",
    404: "check the name, and log in with `hf auth login` if it is private",
    429: "the hub gets too many requests; try again later",
}


def hub_message(url: str, error: Exception) -> str:
    """What an error of a hub's client says, in one line without secrets, and what to do."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and os.environ.get("HF_HUB_OFFLINE") in ("1", "true")
    ):
        return f"{url}: HF_HUB_OFFLINE is set, so the hub cannot be used; unset it"
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    kind = type(error).__name__
    said = " ".join(str(error).split())[:300] or kind
    if not status:
        place = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return without_secrets(
            f"{url}: the hub {place} cannot be reached ({kind}: {said}); check the network, then try again"
        )
    hint = _HINTS.get(status, "the hub has a fault; try again later" if status >= 500 else "")
    return without_secrets(f"{url}: {said}" + (f"; {hint}" if hint else ""))


def without_secrets(text: str) -> str:
    """The text, with everything that looks like a hub's key replaced by ***."""
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"hf_\w{8,}", "***", text)
