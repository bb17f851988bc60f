"""The files of published weights that can be followed: pointers, manifests, and the chain from a keyframe to the newest step.

    <to>/steps/00005000-<launch>/   never changed: files of the policy, whole weights (a keyframe) or a delta, manifest.json
    <to>/latest.json                a pointer: which manifest is the newest, and its SHA-256; written last
    <to>/best.json                  the same for the policy with the highest score

On a hub the whole policy lies at the root of the repository, so every step is a keyframe there. The one with the highest score
lies whole in `steps/best-…` too.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.errors import Explained
from tiphys.dataio.stored import stored

VERSION = 1
STEPS, LATEST, BEST, MANIFEST, DELTA = "steps", "latest.json", "best.json", "manifest.json", "weights.delta"
CONFIG, PROCESSOR = "config.json", "processor.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Code is not fetched: Tiphys acts with its own.
TEXTS = (CONFIG, PROCESSOR, "model.safetensors.index.json", "recipe.yaml", "evaluation.json", "README.md")
LARGEST_TEXT = 256 << 20  # bytes; a processor holds the vocabulary of a text tokenizer
LARGEST_POINTER, LARGEST_MANIFEST = 4096, 16 << 20  # bytes
LONGEST_CHAIN = 10  # steps from a keyframe to the next
HEAVIEST_CHAIN = 0.7  # of the bytes of its keyframe
_PATH = re.compile(r"(steps/[\w.-]*\w[\w.-]*/)?[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FollowError(Explained, RuntimeError):
    """Published weights cannot be followed. The message says where, why, and what to do."""


def _check(path: str, digest: str, size: int = 0) -> None:
    if not _PATH.fullmatch(path) or ".." in path.split("/") or not _SHA256.fullmatch(digest) or size < 0:
        raise DataError(f"{path!r} with SHA-256 {digest!r} and {size} bytes is no file of a published policy")


@dataclass(frozen=True)
class File:
    """A file of a policy. `path` is relative to where the policy is published."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        _check(self.path, self.sha256, self.size)


@dataclass(frozen=True)
class Link:
    """An earlier step of a chain.

    manifest  its path
    sha256    of the manifest
    digest    of its weights
    size      bytes of its delta; of a keyframe, bytes of its weights
    """

    manifest: str
    sha256: str
    digest: str
    size: int

    def __post_init__(self) -> None:
        _check(self.manifest, self.sha256, self.size)
        _check(self.manifest, self.digest)


@dataclass(frozen=True)
class Manifest:
    """What a published step consists of.

    sequence  rises by one with each publication, also if training went back to an earlier step
    digest    of the weights (`Weights.digest`)
    files     name -> file of the policy; one that is the same in the keyframe lies there. Only keyframes have weights.
    base      digest of the weights that the delta belongs to; empty: there is no delta
    chain     of a delta: its keyframe, and the steps between, oldest first; of a keyframe: steps whose deltas lead to it
    """

    version: int
    sequence: int
    step: int
    kind: str
    digest: str
    files: Mapping[str, Any]
    base: str = ""
    delta: Any = None
    chain: tuple[Any, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.kind not in ("keyframe", "delta") or (self.kind == "delta" and not self.chain):
            raise DataError(f"kind is {self.kind!r} and the chain has {len(self.chain)} steps")
        if bool(self.base) != (self.delta is not None) or (self.kind == "delta" and not self.base):
            raise DataError("a delta needs a base, and a base a delta")

    @property
    def weights(self) -> dict[str, File]:
        """Name -> file of whole weights."""
        return {name: file for name, file in self.files.items() if WEIGHTS.fullmatch(name)}

    @property
    def texts(self) -> dict[str, File]:
        """Name -> file that is fetched, beside the weights."""
        return {name: self.files[name] for name in TEXTS if name in self.files}

    def to_bytes(self) -> bytes:
        return to_json(asdict(self), indent=1).encode()


@dataclass(frozen=True)
class Pointer:
    """Content of latest.json and best.json.

    final  the run has ended, so nothing newer is to be expected
    score  mean expert-normalised score, if it was evaluated
    run    identity of the run that publishes here; no other one may. Empty: the policy was published by hand
    name   of the run, for people
    """

    version: int
    sequence: int
    step: int
    manifest: str
    sha256: str
    digest: str
    final: bool = False
    score: float | None = None
    run: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        _check(self.manifest, self.sha256)
        _check(self.manifest, self.digest)

    def to_bytes(self) -> bytes:
        return to_json(asdict(self)).encode()


def parse_pointer(data: bytes, where: str) -> Pointer:
    """Raises DataError if it is not valid or was written by a newer Tiphys."""
    return stored(Pointer, _document(data, where), where)


def parse_manifest(data: bytes, where: str, sha256: str) -> Manifest:
    """Raises DataError if it does not have this SHA-256, is not valid, or was written by a newer Tiphys."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{where}: the manifest does not have the SHA-256 that names it; it is damaged or was replaced")
    values = _document(data, where)
    files, chain = values.get("files"), values.get("chain", [])
    if not isinstance(files, dict) or not isinstance(chain, list):
        raise DataError(f"{where}: files is not an object, or chain is not a list")
    delta = values.get("delta")
    return stored(
        Manifest,
        values,
        where,
        files={name: stored(File, file, f"{where}, {name}") for name, file in files.items()},
        chain=tuple(stored(Link, link, f"{where}, step {i} of the chain") for i, link in enumerate(chain)),
        delta=None if delta is None else stored(File, delta, f"{where}, delta"),
    )


def _document(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(values, dict) or "version" not in values:
        raise DataError(f"{where}: is not of a policy that Tiphys published: it has no version")
    if values["version"] != VERSION:
        raise DataError(f"{where}: has version {values['version']!r}, this Tiphys reads {VERSION}; update Tiphys")
    return values


def temporary_folder() -> Path:
    """A new folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="tiphys-policy-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)
