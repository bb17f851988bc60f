"""Writes a policy to a folder or a bucket so that others can follow: files, manifest, pointer, in this order.

Nothing is overwritten but the pointers, so a reader sees the old policy or the new one, and a crash leaves the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger
from tiphys.dataio.storage import ObjectChanged, Store
from tiphys.pretrain.follow.chain import (
    BEST,
    CONFIG,
    DELTA,
    HEAVIEST_CHAIN,
    LARGEST_MANIFEST,
    LARGEST_POINTER,
    LATEST,
    LONGEST_CHAIN,
    MANIFEST,
    STEPS,
    VERSION,
    WEIGHTS,
    File,
    FollowError,
    Link,
    Manifest,
    Pointer,
    parse_manifest,
    parse_pointer,
)
from tiphys.pretrain.follow.encode import encode
from tiphys.pretrain.follow.weights import Weights, sha256_of


@dataclass(frozen=True)
class How:
    """How a policy is published.

    base   folder with the weights that were published before, if they are still there: a delta can be made
    rate   most bytes a second that are sent; 0: no limit
    grace  seconds for which what nothing points to any more is kept, for those who still read it
    score  mean expert-normalised score, if known
    final  nothing newer will come
    run    identity of the run, which no other run has; empty: the policy is published by hand
    name   of the run, for people
    take_over   publish although the place belongs to another run
    """

    base: Path | None = None
    rate: int = 0
    grace: float = 3600.0
    score: float | None = None
    final: bool = False
    run: str = ""
    name: str = ""
    take_over: bool = False


@dataclass(frozen=True)
class Planned:
    """What is to be written: local files by their paths, the manifest and the pointer, with their bytes."""

    folder: str
    uploads: Mapping[str, Path]
    manifest: bytes
    pointer: Pointer
    chain: tuple[Link, ...]


def publish_to_store(source: Path, names: list[str], to: str, how: How, older: Callable[[Store], list[str]]) -> str:
    """Publish a policy's files to a folder or a bucket. Returns the path of the new step within it.

    older   called if nothing was published there in this form: the files of a policy at the root, which are removed once the
            new one is there; it raises if there is something else

    Raises FollowError if the place belongs to another run, or somebody else publishes there at the same time.
    """
    store = Store(to)
    before, version = _pointer(store, LATEST)
    check_holder(before, to, how)
    left = older(store) if before is None else []
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=source.parent) as scratch:
        planned = plan(source, names, before, _last_manifest(store, before), how, Path(scratch))
        for path, file in planned.uploads.items():
            store.upload(path, str(file), how.rate)
        store.write(f"{planned.folder}/{MANIFEST}", planned.manifest)
        try:
            store.replace(LATEST, planned.pointer.to_bytes(), version)
        except ObjectChanged:
            _remove(store, [f"{planned.folder}/{MANIFEST}", *planned.uploads])
            raise FollowError(
                f"{to}: somebody else published there meanwhile, so this policy was not published; "
                "give each run a place of its own"
            ) from None
    _point_to_best(store, planned.pointer)
    _remove(store, left)
    try:
        collect(store, how.grace)
    except (OSError, DataError) as error:
        logger(__name__).warning("%s: old steps were not removed (%s)", to, error)
    return planned.folder


def check_holder(before: Pointer | None, to: str, how: How) -> None:
    """Raises FollowError if the place belongs to another run. Followers would get weights of two runs in turn."""
    if before is not None and before.run not in ("", how.run) and not how.take_over:
        raise FollowError(
            f"{to}: the run {before.name!r} ({before.run}) publishes there, last its step {before.step}; give this policy a "
            "place of its own, or take this one over: `publish.take_over: true` in the recipe, or `tiphys publish --take-over`"
        )


def mark_final(to: str, run: str = "") -> None:
    """Say at a place that nothing newer will come, if the run, or nobody in particular, publishes there."""
    store = Store(to)
    before, version = _pointer(store, LATEST)
    if before is not None and not before.final and before.run in ("", run):
        store.replace(LATEST, replace(before, final=True).to_bytes(), version)


def plan(
    source: Path,
    names: list[str],
    before: Pointer | None,
    last: tuple[Manifest, Manifest] | None,
    how: How,
    scratch: Path,
    root: str = "",
) -> Planned:
    """Decide what is written, and encode the delta.

    names   files of the policy in `source`
    before  the present pointer
    last    the manifest that it points to, and that of its chain's keyframe
    root    where the policy's files go instead of the new folder; "": a step may do without whole weights
    """
    step = int(json.loads((source / CONFIG).read_text(encoding="utf-8")).get("tiphys", {}).get("step", 0))
    folder = f"{STEPS}/{step:08d}-{secrets.token_hex(4)}"
    new = Weights.load(source, step)
    made = _delta(new, before, how, scratch)
    base, delta = (made[0], _file(f"{folder}/{DELTA}", made[1])) if made else ("", None)
    chain: tuple[Link, ...] = ()
    if delta is not None and before is not None and last is not None:
        chain = _chain(last, before)
    if chain and delta is not None and last is not None and not root:
        heavy = sum(link.size for link in chain[1:]) + delta.size > HEAVIEST_CHAIN * new.bytes
        chain = () if heavy or len(chain) >= LONGEST_CHAIN or not _same_texts(source, last[0]) else chain
    whole = not chain or bool(root)
    known = last[1].files if last is not None and not whole else {}
    files, uploads = {}, dict[str, Path]()
    for name in names:
        if not whole and WEIGHTS.fullmatch(name):
            continue
        file = _file(name if root else f"{folder}/{name}", source / name)
        if name in known and (known[name].sha256, known[name].size) == (file.sha256, file.size):
            file = known[name]
        else:
            uploads[file.path] = source / name
        files[name] = file
    if made:
        uploads[f"{folder}/{DELTA}"] = made[1]
    manifest = Manifest(
        version=VERSION,
        sequence=before.sequence + 1 if before else 1,
        step=step,
        kind="keyframe" if whole else "delta",
        digest=new.digest,
        files=files,
        base=base,
        delta=delta,
        chain=chain,
    )
    data = manifest.to_bytes()
    pointer = Pointer(
        version=VERSION,
        sequence=manifest.sequence,
        step=step,
        manifest=f"{folder}/{MANIFEST}",
        sha256=hashlib.sha256(data).hexdigest(),
        digest=new.digest,
        final=how.final,
        score=how.score,
        run=how.run,
        name=how.name[:200],
    )
    return Planned(folder, uploads, data, pointer, chain)


def _delta(new: Weights, before: Pointer | None, how: How, scratch: Path) -> tuple[str, Path] | None:
    """The digest of the base, and the delta to the new weights. None if what was published before is not at hand."""
    if before is None or how.base is None:
        return None
    try:
        base = Weights.load(how.base)
        if base.digest != before.digest:
            return None
        encode(base, new, scratch / DELTA)
    except DataError:  # of another model
        return None
    return base.digest, scratch / DELTA


def _chain(last: tuple[Manifest, Manifest], before: Pointer) -> tuple[Link, ...]:
    manifest, _ = last
    whole = sum(file.size for file in manifest.weights.values())
    size = manifest.delta.size if manifest.kind == "delta" else whole
    return (*manifest.chain, Link(before.manifest, before.sha256, manifest.digest, size))[-LONGEST_CHAIN:]


def _same_texts(source: Path, last: Manifest) -> bool:
    """Whether the weights lie in the same files as before."""
    name = "model.safetensors.index.json"
    mine = sha256_of(source / name) if (source / name).is_file() else ""
    return mine == (last.files[name].sha256 if name in last.files else "")


def _file(path: str, file: Path) -> File:
    return File(path, file.stat().st_size, sha256_of(file))


def _pointer(store: Store, name: str) -> tuple[Pointer | None, str]:
    """A pointer and its version; None and "" if there is none."""
    try:
        found = store.read_new(name, "", LARGEST_POINTER)
    except FileNotFoundError:
        return None, ""
    assert found is not None
    return parse_pointer(found[0], f"{store.url}/{name}"), found[1]


def _last_manifest(store: Store, before: Pointer | None) -> tuple[Manifest, Manifest] | None:
    """The manifest of a pointer, and that of its chain's keyframe; None if they cannot be read, so a keyframe is needed."""
    if before is None:
        return None
    try:
        last = _manifest(store, before.manifest, before.sha256)
        return last, _manifest(store, last.chain[0].manifest, last.chain[0].sha256) if last.chain else last
    except (FileNotFoundError, DataError):
        return None


def _manifest(store: Store, path: str, sha256: str) -> Manifest:
    return parse_manifest(store.read(path, LARGEST_MANIFEST), f"{store.url}/{path}", sha256)


def _point_to_best(store: Store, new: Pointer) -> None:
    best, version = _pointer(store, BEST)
    if is_better(new, best):
        store.replace(BEST, new.to_bytes(), version)


def is_better(new: Pointer, best: Pointer | None) -> bool:
    """Whether the best pointer is to become the new one. A run is not compared with the one before it at this place."""
    if new.score is None:
        return False
    return best is None or best.score is None or new.score > best.score or best.run != new.run


# -- collection -------------------------------------------------------------------------------------------------------


def collect(store: Store, grace: float) -> list[str]:
    """Remove the steps that no pointer needs and that none has needed for `grace` seconds. Returns their folders.

    The manifest of a step goes first, so that what is left of a step is never taken for whole. Ages are measured by the store's
    own clock, against the pointer that has just been written.
    """
    times = store.times()
    if LATEST not in times:
        return []
    now = times[LATEST]
    folders: dict[str, list[str]] = {}
    for path in times:
        if path.startswith(f"{STEPS}/") and path.count("/") == 2:
            folders.setdefault(path.rsplit("/", 1)[0], []).append(path)
    kept = {folder for folder, paths in folders.items() if max(times[path] for path in paths) >= now - grace}
    pointers = [pointer for name in (LATEST, BEST) if (pointer := _pointer(store, name)[0])]
    whole = sorted((f for f in folders if f"{f}/{MANIFEST}" in times), key=lambda f: times[f"{f}/{MANIFEST}"])
    recent = [f for f in whole if f in kept]
    before = [f for f in whole if f not in kept][-1:]  # it was the newest until the first of the recent ones came
    for manifest in {p.manifest for p in pointers} | {f"{f}/{MANIFEST}" for f in (*before, *recent)}:
        kept |= _needed(store, manifest)
    removed = sorted(set(folders) - kept)
    for folder in removed:
        manifest = f"{folder}/{MANIFEST}"
        _remove(store, sorted(folders[folder], key=lambda path: path != manifest))
    return removed


def _needed(store: Store, manifest: str) -> set[str]:
    """The folders that a step needs: its own, and those of its chain. Only its own if its manifest is damaged."""
    own = manifest.rsplit("/", 1)[0]
    try:
        links: list[Any] = json.loads(store.read(manifest, LARGEST_MANIFEST))["chain"]
        return {own, *(str(link["manifest"]).rsplit("/", 1)[0] for link in links)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {own}


def _remove(store: Store, paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            store.delete(path)
    if store.local:
        for folder in {Path(store.url, path).parent for path in paths if "/" in path}:
            with contextlib.suppress(OSError):
                folder.rmdir()
