"""A checkpoint's folder on disk: when it is whole, how it becomes whole, and how old ones are removed.

    <run.dir>/checkpoints/step-00001000/
        rank00000.safetensors   the fragments that rank 0 owns
        rank00000.json          their index, with the digest of the file above
        …                       one such pair for each rank
        state.json              everything that is not a tensor
        manifest.json           written last: size and SHA-256 of every file above

Every file is written under a temporary name, synced and renamed. A folder without a manifest is not a checkpoint, whatever
else it contains; when a checkpoint is removed, its manifest goes first. The processes do not communicate: rank 0 waits for the
index files of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import write_json
from tiphys.dataio.errors import Explained
from tiphys.dataio.private import read_regular

VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
_MOST_RANKS = 1 << 20
_MOST_JSON = 1 << 30  # bytes of an index or of state.json
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(Explained, RuntimeError):
    """A checkpoint cannot be written, read or continued. The message names the file and says what to do."""


class WriteError(CheckpointError):
    """A checkpoint could not be written. A later one may succeed."""


class StorageFull(CheckpointError):
    """No checkpoint could be written for longer than the run may go on without one."""


def folder_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint's folder, whose name is like step-00001000")
    return int(match[1])


def rank_files(rank: int) -> tuple[str, str]:
    """Names of the two files of a rank: (tensors, index)."""
    return f"rank{rank:05d}.safetensors", f"rank{rank:05d}.json"


def folders(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything under `<run_dir>/checkpoints` that is named like a checkpoint, oldest first."""
    parent = Path(run_dir) / "checkpoints"
    if not parent.is_dir():
        return []
    matches = [(_STEP.fullmatch(p.name), p) for p in parent.iterdir() if p.is_dir()]
    return sorted((int(m[1]), p) for m, p in matches if m)


def read_json(path: Path) -> Any:
    try:
        found = json.loads(read_regular(path, _MOST_JSON))
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: it is not an object with keys")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def await_indexes(
    folder: Path,
    world: int,
    save: str,
    timeout: float,
    pause: float = 0.02,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Wait until the indexes of all ranks belong to this save, and return them.

    `cancelled` says that a rank could not write its part, and could not even leave a file that says so.

    `save` identifies a save: the same on all its ranks, different in every other save. So files that a crashed save left are
    not used. Raises WriteError if a rank reports a failure, or after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    found: dict[int, dict[str, Any]] = {}
    while len(found) < world:
        for rank in (r for r in range(world) if r not in found):
            path = folder / rank_files(rank)[1]
            if path.exists():
                index = read_json(path)
                if index.get("save") == save:
                    if "error" in index:
                        raise WriteError(f"{folder}: rank {rank} could not write its part: {index['error']}")
                    found[rank] = index
        if len(found) < world:
            if cancelled():
                raise WriteError(f"{folder}: another rank could not write its part; the log of that rank says why")
            if time.monotonic() > deadline:
                missing = [r for r in range(world) if r not in found]
                raise WriteError(
                    f"{folder}: no part from rank {missing[0]} ({len(missing)} of {world} missing) after {timeout:.0f} s; "
                    "run.dir must be on a file system that all hosts share"
                )
            time.sleep(pause)
    return [found[rank] for rank in range(world)]


def commit(
    folder: Path,
    step: int,
    world: int,
    save: str,
    state: Mapping[str, Any],
    timeout: float,
    *,
    permit: Callable[[], None] = lambda: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """On rank 0, after its own part is written: wait for the other ranks, then make the folder a checkpoint.

    permit   called right before the manifest is written; raises if this run may not save any more
    """
    indexes = await_indexes(folder, world, save, timeout, cancelled=cancelled)
    files = {}
    for rank, index in enumerate(indexes):
        tensors, name = rank_files(rank)
        files[tensors], files[name] = index["file"], digest(folder / name)
    write_json(folder / STATE, state)
    files[STATE] = digest(folder / STATE)
    permit()
    write_json(folder / MANIFEST, {"version": VERSION, "step": step, "world": world, "save": save, "files": files})
    _sync_folder(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, whose files all have the size in the manifest; None if the folder has no manifest.

    Raises CheckpointError if a file is missing or has another size, or if the manifest is not valid.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']}; this program reads version {VERSION}")
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        counts = [*sizes.values(), manifest["step"], manifest["world"]]
        if any(type(n) is not int or n < 0 for n in counts) or not 1 <= manifest["world"] <= _MOST_RANKS:
            raise CheckpointError(f"{path}: a size, step or world in it is not possible")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's manifest ({error!r})") from error
    for name, size in sizes.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{path}: lists {name!r}, which is not a file name in its own folder")
        have = file.stat().st_size if "\0" not in name and file.is_file() else None
        if have != size:
            lost = "is missing" if have is None else f"has {have} bytes"
            raise CheckpointError(f"{file}: {lost}, but {MANIFEST} says {size} bytes: this is not a whole checkpoint")
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any], part: int = 0, parts: int = 1) -> None:
    """Compare the digests of every `parts`-th file from number `part` on. Raises CheckpointError if a file differs."""
    for name in sorted(manifest["files"])[part::parts]:
        if digest(folder / name) != manifest["files"][name]:
            raise CheckpointError(
                f"{folder / name}: differs from its digest in {MANIFEST}; resume from another checkpoint"
            )


def whole(
    run_dir: str | Path, damaged: Callable[[CheckpointError], None] = lambda error: None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The whole checkpoints of a run, newest first. Others are skipped; `damaged` is called for those with a manifest."""
    for _, folder in reversed(folders(run_dir)):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            damaged(error)
            continue
        if manifest is not None:
            yield folder, manifest


def remove(folder: Path) -> None:
    """Remove the manifest first, so that a folder that is half removed is not a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    _sync_folder(folder)
    shutil.rmtree(folder)


def prune(run_dir: str | Path, keep: int, protect: frozenset[Path] = frozenset()) -> list[Path]:
    """Remove all whole checkpoints except the newest `keep` and `protect`, and damaged folders older than the newest whole one.

    Returns the removed folders, oldest first.
    """
    kept = [folder for folder, _ in whole(run_dir)]
    if not kept:
        return []
    newest, stay = kept[0], {*kept[: max(keep, 1)], *protect}
    gone = [folder for _, folder in folders(run_dir) if folder < newest and folder not in stay]
    for folder in gone:
        remove(folder)
    return gone


def make_room(run_dir: str | Path, keep: int, protect: frozenset[Path] = frozenset()) -> list[Path]:
    """For a full disk: remove what `prune` removes, and every folder that is no whole checkpoint. Nothing may be being written.

    Returns the removed folders.
    """
    counted = {folder for folder, _ in whole(run_dir)}
    broken = [folder for _, folder in folders(run_dir) if folder not in counted and folder not in protect]
    for folder in broken:
        remove(folder)
    return broken + prune(run_dir, keep, protect)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
