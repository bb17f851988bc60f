"""The DQN replay datasets on Atari (Agarwal et al. 2020, arXiv:1907.04543): `$store$_observation_ckpt.K.gz` and its
siblings.

Each `.gz` holds one `.npy` of a million steps: frames uint8 [84, 84], actions, rewards (clipped), terminal flags. An
episode ends at a terminal; what follows the last one of a file is an episode that the file cuts. The checkpoint's
number K is the agent. Frames stay single (a window of n steps holds a stack of n); the option `stack: 4` repeats them
as the agent saw them, [84, 84, 4].
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import BinaryIO, cast

import numpy as np

from tiphys.dataio.convert.converter import Converter, Item, Piece
from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.limits import (
    EPISODE_BYTES,
    RECORD_BYTES,
    BoundedInflate,
    bytes_of,
    check_shape,
    npy_header,
    read_into,
)
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec

_NAME = re.compile(r"(?:\$store\$_)?(observation|action|reward|terminal)_ckpt\.(\d+)\.gz")
_KINDS = ("observation", "action", "reward", "terminal")
_RATIO = 1100  # DEFLATE cannot exceed 1032; how much comes out is bounded by the array's header instead


class DqnReplay(Converter):
    name = "dqn-replay"
    options_known = frozenset({"stack"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        return 1.0 if any(_NAME.fullmatch(p.rpartition("/")[2]) for p in source.files) else 0.0

    @cached_property
    def _checkpoints(self) -> dict[tuple[str, int], dict[str, str]]:
        """(folder, checkpoint) -> kind -> file."""
        out: dict[tuple[str, int], dict[str, str]] = {}
        for path in self.source.files:
            folder, _, name = path.rpartition("/")
            if match := _NAME.fullmatch(name):
                out.setdefault((folder, int(match.group(2))), {})[match.group(1)] = path
        if not out:
            raise DataError(f"{self.source.url}: no file like $store$_observation_ckpt.0.gz")
        return dict(sorted(out.items()))

    def _task(self, folder: str) -> str:
        """The game: the last part of the path that is neither a run's number nor `replay_logs`."""
        parts = [*self.source.url.split("/"), *folder.split("/")]
        return next((p for p in reversed(parts) if p and not p.isdigit() and p != "replay_logs"), "atari")

    def _run(self, folder: str) -> str:
        parts = [p for p in [*self.source.url.split("/"), *folder.split("/")] if p.isdigit()]
        return parts[-1] if parts else "0"

    def pieces(self) -> list[Piece]:
        out: list[Piece] = []
        for (folder, checkpoint), files in self._checkpoints.items():
            paths = [files[k] for k in _KINDS if k in files]
            out.append(Piece(f"{len(out):06d}", {"folder": folder, "checkpoint": checkpoint, "files": paths}))
        return out

    def tasks(self) -> list[TaskSpec]:
        out: dict[str, TaskSpec] = {}
        for (folder, checkpoint), files in self._checkpoints.items():
            task = self._task(folder)
            if task not in out:
                with ExitStack() as stack:
                    shape = self._image_shape(self._open(files, "observation", checkpoint, stack)[1][1:])
                    actions, _ = self._read_all(files, "action", checkpoint)
                fields = (
                    field_spec("observation.image", np.uint8, shape, modality="image"),
                    field_spec("action", actions.dtype, (), values=int(actions.max(initial=0)) + 1),
                    field_spec("reward", np.float32, ()),
                    field_spec("terminated", bool, ()),
                )
                out[task] = TaskSpec(task, fields)
        return list(out.values())

    def _image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (2, 3):
            raise DataError(f"{self.source.url}: frames of shape {shape}")
        stack = int(self.options.get("stack") or 1)
        if not 1 <= stack <= 32 or (stack > 1 and len(shape) == 3):
            raise DataError(f"options: stack {stack} of frames of shape {shape}")
        return (*shape[:2], shape[2] if len(shape) == 3 else stack)

    def _open(
        self, files: dict[str, str], kind: str, checkpoint: int, stack: ExitStack
    ) -> tuple[BinaryIO, tuple[int, ...], np.dtype, str]:
        if kind not in files:
            raise DataError(f"{self.source.url}: checkpoint {checkpoint} has no {kind} file")
        where = self.source.where(files[kind])
        stream = stack.enter_context(self.source.open(files[kind]))
        plain = cast(
            BinaryIO, stack.enter_context(io.BufferedReader(BoundedInflate(stream, where, ratio=_RATIO), 1 << 20))
        )
        dtype, shape, fortran = npy_header(plain, where)
        if fortran or not shape or dtype.kind not in "biuf":
            raise DataError(f"{where}: an array of {dtype} and shape {shape}; one row a step was expected")
        return plain, shape, dtype, where

    def _read_all(self, files: dict[str, str], kind: str, checkpoint: int) -> tuple[np.ndarray, str]:
        """A small array whole: one number a step."""
        with ExitStack() as stack:
            stream, shape, dtype, where = self._open(files, kind, checkpoint, stack)
            check_shape(shape, dtype.itemsize, where, RECORD_BYTES)
            array = np.empty(math.prod(shape), dtype)
            read_into(stream, bytes_of(array), where)
        if array.size != shape[0]:
            raise DataError(f"{where}: shape {shape}, one number a step was expected")
        return array.astype(dtype.newbyteorder("=")), where

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        folder, checkpoint = piece.data["folder"], piece.data["checkpoint"]
        files = self._checkpoints[(folder, checkpoint)]
        columns = {k: self._read_all(files, k, checkpoint)[0] for k in ("action", "reward", "terminal")}
        rows = len(columns["action"])
        if len({len(c) for c in columns.values()}) != 1:
            raise DataError(f"{self.source.url}: the files of checkpoint {checkpoint} have different numbers of steps")
        ends = np.unique(np.append(np.flatnonzero(columns["terminal"]) + 1, rows)) if rows else np.zeros(0, int)
        with ExitStack() as stack:
            stream, shape, dtype, where = self._open(files, "observation", checkpoint, stack)
            if shape[0] != rows or dtype != np.uint8:
                raise DataError(f"{where}: {dtype} of shape {shape} for {rows:,} actions")
            begin = 0
            for number, end in enumerate(ends.tolist()):
                check_shape((end - begin, *shape[1:]), 1, f"{where}, rows {begin}–{end}", EPISODE_BYTES)
                frames = np.empty((end - begin, *shape[1:]), np.uint8)
                read_into(stream, bytes_of(frames), f"{where}, rows {begin}–{end}")
                if number >= start:
                    yield self._episode(
                        folder, checkpoint, number, frames, {k: c[begin:end] for k, c in columns.items()}
                    )
                begin = end

    def _episode(
        self, folder: str, checkpoint: int, number: int, frames: np.ndarray, rows: dict[str, np.ndarray]
    ) -> Episode:
        task, run = self._task(folder), self._run(folder)
        stack = int(self.options.get("stack") or 1)
        if stack > 1:  # as the agent saw them: the oldest first, black before the episode's beginning
            padded = np.concatenate([np.zeros((stack - 1, *frames.shape[1:]), np.uint8), frames])
            frames = np.stack([padded[i : i + len(frames)] for i in range(stack)], axis=-1)
        fields = {
            "observation.image": frames if frames.ndim == 4 else frames[..., None],
            "action": rows["action"],
            "reward": rows["reward"].astype(np.float32),
            "terminated": rows["terminal"].astype(bool),
        }
        return Episode(
            id=f"{task}/{run}-{checkpoint:03d}/{number:06d}",
            task=task,
            fields=fields,
            steps=len(rows["action"]),
            agent=f"dqn-{run}-checkpoint-{checkpoint}",
        )
