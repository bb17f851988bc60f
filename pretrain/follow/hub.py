"""Publishes a policy to a repository of a hub, in one commit: the whole policy at the root, which `from_pretrained` loads,
and beside it a delta, its manifest and the pointer. The policy with the highest score lies whole in a folder of its own.
Followers read from one commit, so nothing they read can change.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.errors import Explained
from tiphys.dataio.messages import logger
from tiphys.pretrain.follow.chain import (
    BEST,
    LARGEST_MANIFEST,
    LARGEST_POINTER,
    LATEST,
    MANIFEST,
    STEPS,
    File,
    FollowError,
    Pointer,
    parse_manifest,
    parse_pointer,
)
from tiphys.pretrain.follow.places import HubPlace
from tiphys.pretrain.follow.writer import How, Planned, check_holder, is_better, plan
from tiphys.pretrain.hub_errors import hub_message

SQUASHED = 50  # commits after which the history is squashed
_OURS = re.compile(r"Policy at step \d+|initial commit|Super-squash.*")


class PublishError(Explained, RuntimeError):
    """A policy could not be published. The message says where, why, and what to do; it contains no secret."""


def publish_to_hub(source: Path, names: list[str], repository: str, private: bool, how: How) -> str:
    """Publish a policy's files in one commit. Returns `hf://owner/name@commit`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise DataError(f"hf://{repository} is not a repository; write hf://owner/name")
    if os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") != "https://huggingface.co":
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # only huggingface.co has Xet storage
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET or os.environ.get("HF_HUB_DISABLE_XET", "") in (
        "1",
        "true",
    )
    api = HfApi()
    try:
        head = _repository(api, repository, private)
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=source.parent) as scratch:
            return _commit(api, source, names, repository, head, how, Path(scratch))
    except (PublishError, FollowError, DataError):
        raise
    except Exception as error:  # of the hub's client, of its HTTP library, or of the network
        # not chained, because the original error holds a request whose headers contain the key
        raise PublishError(hub_message(f"hf://{repository}", error)) from None


def _repository(api: Any, name: str, private: bool) -> str:
    """The repository's newest commit. It is created if it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.model_info(name).sha)
    if private and not info.private:
        raise PublishError(f"hf://{name} is already public: publish with --public, or under another name")
    return str(info.sha)


def _commit(api: Any, source: Path, names: list[str], name: str, head: str, how: How, scratch: Path) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    place = HubPlace(f"hf://{name}")
    try:
        found = place.pointer("")
    except FileNotFoundError:
        found = None
    before, last = None, None
    if found is not None:
        before, head = parse_pointer(found[0], f"hf://{name}/{LATEST}"), found[1]
        check_holder(before, f"hf://{name}", how)
        manifest = parse_manifest(
            place.read(before.manifest, LARGEST_MANIFEST), f"hf://{name}/{before.manifest}", before.sha256
        )
        last = manifest, manifest
    planned = plan(source, names, before, last, how, scratch, root="/")
    uploads, contents = dict(planned.uploads), {f"{planned.folder}/{MANIFEST}": planned.manifest}
    contents[LATEST] = planned.pointer.to_bytes()
    best = None if found is None else _best_pointer(place)
    if is_better(planned.pointer, best):
        best, about, copies = _as_best(planned)
        uploads |= {file.path: source / name for name, file in copies.items()}
        contents |= {best.manifest: about, BEST: best.to_bytes()}
    kept = {_folder(path) for path in [*(link.manifest for link in planned.chain), *([best.manifest] if best else [])]}
    files = set(api.list_repo_files(name, revision=head))
    operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in uploads.items()]
    operations += [CommitOperationAdd(path, data) for path, data in contents.items()]
    operations += [CommitOperationDelete(path) for path in sorted(_old(files, {*names, LATEST, BEST}, kept))]
    done = api.create_commit(
        name, operations, commit_message=f"Policy at step {planned.pointer.step}", parent_commit=head
    )
    if planned.pointer.sequence % SQUASHED == 0:
        _squash(api, name)
    return f"hf://{name}@{done.oid}"


def _best_pointer(place: HubPlace) -> Pointer | None:
    try:
        return parse_pointer(place.read(BEST, LARGEST_POINTER), f"{place.url}/{BEST}")
    except FileNotFoundError:
        return None


def _as_best(planned: Planned) -> tuple[Pointer, bytes, dict[str, File]]:
    """Pointer and manifest of the same policy in a folder of its own, and its files: the root will hold later ones."""
    folder = f"{STEPS}/best-{planned.folder.rsplit('/', 1)[1]}"
    manifest = parse_manifest(planned.manifest, planned.folder, planned.pointer.sha256)
    files = {name: replace(file, path=f"{folder}/{name}") for name, file in manifest.files.items()}
    data = replace(manifest, kind="keyframe", files=files, base="", delta=None, chain=()).to_bytes()
    return (
        replace(planned.pointer, manifest=f"{folder}/{MANIFEST}", sha256=hashlib.sha256(data).hexdigest()),
        data,
        files,
    )


def _folder(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _old(files: set[str], new: set[str], kept: set[str]) -> set[str]:
    """What is left at the root by an earlier version, and the steps that are not kept."""
    root = {f for f in files if "/" not in f and f.endswith((".py", ".json", ".safetensors"))}
    return root - new | {f for f in files if f.startswith(f"{STEPS}/") and _folder(f) not in kept}


def _squash(api: Any, name: str) -> None:
    """Remove old versions of the weights from the history, unless people have committed there too."""
    try:
        if all(_OURS.fullmatch(commit.title) for commit in api.list_repo_commits(name)):
            api.super_squash_history(name)
    except Exception as error:  # the policy is published already
        logger(__name__).warning("the history was not squashed: %s", hub_message(f"hf://{name}", error))
