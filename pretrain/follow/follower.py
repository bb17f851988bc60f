"""`Follower`: fetches published weights, and those that are published later, verified. It runs no code of what it follows."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger
from tiphys.paths import expand
from tiphys.pretrain.follow.chain import (
    BEST,
    CONFIG,
    LARGEST_MANIFEST,
    LARGEST_TEXT,
    LATEST,
    PROCESSOR,
    File,
    FollowError,
    Manifest,
    Pointer,
    parse_manifest,
    parse_pointer,
    temporary_folder,
)
from tiphys.pretrain.follow.encode import apply
from tiphys.pretrain.follow.places import place_of
from tiphys.pretrain.follow.weights import Weights, groups_of, swap, weight_files

__all__ = ["FollowError", "Follower", "Weights", "jittered", "swap"]
_TRIES = 3  # if files vanish because something newer was published meanwhile


class Follower:
    """Weights that follow what is published at a place, usually by a run that still trains.

    Parameters
    ----------
    url : str
        Folder, ``s3://bucket/path`` or ``hf://owner/name``.
    threads : int
        Threads that apply deltas; 0: one for each core.
    best : bool
        Follow the policy with the highest score instead of the newest one. `final` tells nothing then.

    Attributes
    ----------
    step, sequence, digest : int, int, str
        Of the weights that `fetch` or `poll` gave last; −1, −1 and "" before.
    final : bool
        Whether the publisher has said that nothing newer will come.

    Raises
    ------
    FileNotFoundError
        By the methods, if nothing is published there in the form that can be followed.
    FollowError
        If a step cannot be verified, even from its keyframe; or if another model was published, which has to be loaded anew.
    DataError, StoreError, FetchError
        If a document is damaged, or the place refuses or cannot be reached. After any error the weights that were given stay
        valid, and the next `poll` tries again.

    Examples
    --------
    >>> with Follower("s3://bucket/policy") as follower:
    ...     policy = Policy.load(follower.fetch())
    ...     new = follower.poll()
    ...     if new is not None:
    ...         swap(policy.model, new.prepare(policy.model))
    """

    def __init__(self, url: str, *, threads: int = 0, best: bool = False) -> None:
        self.url, self._threads = expand(str(url)), threads
        self._place, self._name = place_of(self.url, best=best), BEST if best else LATEST
        self._version, self._pointer = "", ""
        self._weights: Weights | None = None
        self._about: dict[str, Any] = {}
        self._folder: Path | None = None
        self.step, self.sequence, self.digest, self.final = -1, -1, "", False

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder that `fetch` made."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def fetch(self) -> Path:
        """The policy that `poll` gave last, or first the newest, as a folder for `Policy.load`: temporary, and without code.

        The next `fetch` replaces the folder.
        """
        if self._weights is None:
            self.poll()
        assert self._weights is not None
        folder, manifest = self._new_folder("policy"), self._manifest
        for name, file in manifest.texts.items():
            self._place.download(self._small(file), folder / name)
        whole = self._keyframe_files(manifest)
        got = [f for f in weight_files(self._work() / "keyframe") if f.name in whole]
        if manifest.kind == "keyframe" and got and len(got) == len(whole):
            for path in got:
                path.rename(folder / path.name)
        else:
            self._weights.save(folder, groups_of(folder))
        shutil.rmtree(self._work() / "keyframe", ignore_errors=True)
        self._weights = Weights.load(folder, self.step)  # mapped files need no memory of their own
        return folder

    def poll(self) -> Weights | None:
        """Newer weights, decoded and verified; None if there are none. Blocks while it reads."""
        for attempt in range(_TRIES):
            try:
                found = self._place.pointer(self._version)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self.url}: nothing that can be followed is published there; it has no {self._name}. A run with this "
                    "`publish.to` publishes there after `publish.every` steps for the first time"
                ) from None
            if found is None:
                return None
            data, version = found
            pointer = parse_pointer(data, f"{self.url}/{self._name}")
            if pointer.sha256 == self._pointer:
                self._version, self.final = version, pointer.final
                return None
            try:
                manifest = self._read_manifest(pointer.manifest, pointer.sha256)
                self._check_model(manifest)
                weights = self._weights_of(manifest)
            except (FileNotFoundError, DataError, FollowError):
                newer = self._place.pointer(version)
                if newer is None or attempt + 1 == _TRIES:
                    raise
                continue  # what was just read has been collected
            self._take(pointer, version, manifest, weights)
            return weights
        raise AssertionError

    def _take(self, pointer: Pointer, version: str, manifest: Manifest, weights: Weights) -> None:
        self._version, self._pointer, self._manifest, self._weights = version, pointer.sha256, manifest, weights
        self.step, self.sequence, self.digest = manifest.step, manifest.sequence, manifest.digest
        self.final = pointer.final

    # Weights

    def _weights_of(self, manifest: Manifest) -> Weights:
        """From the present weights by deltas, or else from the keyframe. Verified."""
        if self._weights is not None:
            if self._weights.digest == manifest.digest:
                return replace(self._weights, step=manifest.step)
            try:
                steps = self._steps_from(self._weights.digest, manifest)
                if steps:
                    return self._applied(self._weights, steps)
            except (FileNotFoundError, DataError) as error:
                logger(__name__).warning("%s; the keyframe is taken instead", error)
        start, *rest = [manifest] if manifest.kind == "keyframe" else [*self._chain(manifest), manifest]
        try:
            return self._applied(self._keyframe(start), rest)
        except DataError as error:
            raise FollowError(
                f"{self.url}: step {manifest.step} cannot be verified: {error}; publish it again"
            ) from None

    def _steps_from(self, digest: str, manifest: Manifest) -> list[Manifest]:
        """The steps whose deltas lead from the present weights to those of a manifest; empty if the keyframe is less to read."""
        steps: list[Manifest] = []
        for one in [manifest, *reversed(self._chain(manifest))]:
            if one.delta is None:
                return []
            steps.insert(0, one)
            if one.base == digest:
                whole = sum(file.size for file in self._keyframe_files(manifest).values())
                return steps if sum(step.delta.size for step in steps) <= whole or not whole else []
        return []

    def _chain(self, manifest: Manifest) -> list[Manifest]:
        return [self._read_manifest(link.manifest, link.sha256) for link in manifest.chain]

    def _keyframe_files(self, manifest: Manifest) -> dict[str, File]:
        if manifest.kind == "keyframe":
            return manifest.weights
        first = manifest.chain[0]
        return self._read_manifest(first.manifest, first.sha256).weights

    def _keyframe(self, manifest: Manifest) -> Weights:
        if not manifest.weights:
            raise DataError(f"{self.url}: the keyframe of step {manifest.step} has no weights")
        folder = self._new_folder("keyframe")
        for name, file in manifest.weights.items():
            self._place.download(file, folder / name)
        return self._verified(Weights.load(folder, manifest.step), manifest)

    def _applied(self, weights: Weights, steps: list[Manifest]) -> Weights:
        for manifest in steps:
            file = self._work() / "delta"
            self._place.download(manifest.delta, file)
            weights = self._verified(apply(weights, file, manifest.step, self._threads), manifest)
        return weights

    def _verified(self, weights: Weights, manifest: Manifest) -> Weights:
        if weights.digest != manifest.digest:
            raise DataError(f"{self.url}: the weights of step {manifest.step} do not have the digest of their manifest")
        return weights

    # Documents

    def _read_manifest(self, path: str, sha256: str) -> Manifest:
        return parse_manifest(self._place.read(path, LARGEST_MANIFEST), f"{self.url}/{path}", sha256)

    def _check_model(self, manifest: Manifest) -> None:
        """Raises FollowError if it is another model than before: weights alone would not make it act."""
        missing = [name for name in (CONFIG, PROCESSOR) if name not in manifest.files]
        if missing:
            raise FollowError(f"{self.url}: step {manifest.step} has no {missing[0]}; publish it again")
        config, processor = (manifest.files[name] for name in (CONFIG, PROCESSOR))
        if self._about.get(CONFIG) == config.sha256 and self._about.get(PROCESSOR) == processor.sha256:
            return
        file = self._work() / CONFIG
        self._place.download(self._small(config), file)
        try:
            values = json.loads(file.read_bytes())
            values.pop("tiphys", None)  # step and recipe
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{self.url}/{config.path}: is not valid JSON: {error}") from None
        about = {"model": values, PROCESSOR: processor.sha256}
        if self._about and any(self._about[key] != value for key, value in about.items()):
            raise FollowError(
                f"{self.url}: step {manifest.step} is of another model or other data than step {self.step}; load it anew"
            )
        self._about = about | {CONFIG: config.sha256}

    def _small(self, file: File) -> File:
        if file.size > LARGEST_TEXT:
            raise DataError(
                f"{self.url}/{file.path}: {file.size} bytes are too many for this file of a policy; at most {LARGEST_TEXT}"
            )
        return file

    def _work(self) -> Path:
        if self._folder is None:
            self._folder = temporary_folder()
        return self._folder

    def _new_folder(self, name: str) -> Path:
        folder = self._work() / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def jittered(seconds: float) -> float:
    """About so many seconds: followers that started together do not ask together."""
    return seconds * random.uniform(0.8, 1.2)
