"""The DQN replay datasets on Atari (Agarwal et al. 2020, arXiv:1907.04543): files `$store$_observation_ckpt.K.gz`, and
the same for action, reward and terminal.

Each `.gz` holds one `.npy` of a million steps: frames uint8 [84, 84], actions, clipped rewards, or terminal flags. An
episode ends at a terminal flag. The steps after the last terminal flag of a file become an incomplete episode. The
checkpoint number K identifies the agent. Frames stay single, because a window of n steps already holds a stack of n.
The option `stack: 4` stacks them as the agent saw them, [84, 84, 4].
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

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert.converter import Converter, Item, Piece, whole_number
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
_LISTED = 1000  # checkpoints among which missing ones are looked for; the datasets have 50
_RATIO = 1100  # never reached: DEFLATE cannot exceed 1032. The array's header limits the output instead


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
            raise DataError(f"{self.source.url}: has no file named like $store$_observation_ckpt.0.gz")
        return dict(sorted(out.items()))

    def _task_name(self, folder: str) -> str:
        """The game: the last part of the path that is neither a run number nor `replay_logs`."""
        parts = [*self.source.url.split("/"), *folder.split("/")]
        return next((p for p in reversed(parts) if p and not p.isdigit() and p != "replay_logs"), "atari")

    def _run_number(self, folder: str) -> str:
        """The last part of the path that is a number."""
        parts = [p for p in [*self.source.url.split("/"), *folder.split("/")] if p.isdigit()]
        return parts[-1] if parts else "0"

    def pieces(self) -> list[Piece]:
        out: list[Piece] = []
        for (folder, checkpoint), files in self._checkpoints.items():
            paths = [files[k] for k in _KINDS if k in files]
            out.append(Piece(f"{len(out):06d}", {"folder": folder, "checkpoint": checkpoint, "files": paths}))
        return out

    def tasks(self) -> list[TaskSpec]:
        """One task for each game. A checkpoint that cannot be read counts only if the game has no other."""
        shapes: dict[str, tuple[int, ...]] = {}
        actions: dict[str, np.ndarray] = {}  # game -> the largest action of all its checkpoints, in their dtype
        problem = ""
        for (folder, checkpoint), files in self._checkpoints.items():
            task = self._task_name(folder)
            try:
                if task not in shapes:
                    with ExitStack() as stack:
                        shapes[task] = self._image_shape(self._open(files, "observation", checkpoint, stack)[1][1:])
                found = self._read_all(files, "action", checkpoint)[0]
                actions[task] = np.maximum(actions.get(task, found[:0].sum(dtype=found.dtype)), found.max(initial=0))
            except DataError as error:
                problem = problem or str(error)
        if not shapes.keys() & actions.keys():
            raise DataError(problem)
        return [self._spec(t, shapes[t], actions[t]) for t in shapes if t in actions]

    def _spec(self, task: str, shape: tuple[int, ...], action: np.ndarray) -> TaskSpec:
        fields = (
            field_spec("observation.image", np.uint8, shape, modality="image"),
            field_spec("action", action.dtype, (), values=int(action) + 1),
            field_spec("reward", np.float32, ()),
            field_spec("terminated", bool, ()),
        )
        return TaskSpec(task, fields)

    def notes(self) -> list[str]:
        """Checkpoints that are missing between others."""
        out = []
        for folder in dict.fromkeys(f for f, _ in self._checkpoints):
            numbers = [k for f, k in self._checkpoints if f == folder]
            missing = sorted(set(range(min(numbers), min(max(numbers), min(numbers) + _LISTED))) - set(numbers))
            if missing:
                listed = ", ".join(str(k) for k in missing)
                out.append(f"{folder or self.source.url}: there are no files of checkpoints {listed}")
        return out

    def _image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (2, 3):
            raise DataError(f"{self.source.url}: frames have shape {shape}; [H, W] or [H, W, C] is expected")
        stack = whole_number(self.options, "stack") or 1
        if not 1 <= stack <= 32 or (stack > 1 and len(shape) == 3):
            raise DataError(
                f"options: stack {stack} is not possible for frames of shape {shape}; "
                "use 1 to 32, or only 1 if the frames have channels"
            )
        return (*shape[:2], shape[2] if len(shape) == 3 else stack)

    def _open(
        self, files: dict[str, str], kind: str, checkpoint: int, stack: ExitStack
    ) -> tuple[BinaryIO, tuple[int, ...], np.dtype, str]:
        if kind not in files:
            raise DataError(f"{self.source.url}: checkpoint {checkpoint} has no {kind} file")
        where = self.source.where(files[kind])
        stream = stack.enter_context(self.source.open(files[kind]))
        inflated = cast(
            BinaryIO, stack.enter_context(io.BufferedReader(BoundedInflate(stream, where, ratio=_RATIO), 1 << 20))
        )
        dtype, shape, fortran = npy_header(inflated, where)
        if fortran or not shape or dtype.kind not in "biuf":
            raise DataError(
                f"{where}: holds {dtype} of shape {shape}; numbers in C order with one row per step are expected"
            )
        return inflated, shape, dtype, where

    def _read_all(self, files: dict[str, str], kind: str, checkpoint: int) -> tuple[np.ndarray, str]:
        """A small array, read whole (one number per step), and the name of its file for messages."""
        with ExitStack() as stack:
            stream, shape, dtype, where = self._open(files, kind, checkpoint, stack)
            check_shape(shape, dtype.itemsize, where, RECORD_BYTES)
            array = np.empty(math.prod(shape), dtype)
            read_into(stream, bytes_of(array), where)
        if array.size != shape[0]:
            raise DataError(f"{where}: has shape {shape}; one number per step is expected")
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
                raise DataError(
                    f"{where}: holds {dtype} of shape {shape}; a uint8 frame for each of {rows:,} actions is expected"
                )
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
        task, run = self._task_name(folder), self._run_number(folder)
        where = f"{self.source.where(folder)}, checkpoint {checkpoint}, episode {number}"
        stack = whole_number(self.options, "stack") or 1
        if stack > 1:  # as the agent saw them: oldest first, black before the start of the episode
            padded = np.concatenate([np.zeros((stack - 1, *frames.shape[1:]), np.uint8), frames])
            frames = np.stack([padded[i : i + len(frames)] for i in range(stack)], axis=-1)
        fields = {
            "observation.image": frames if frames.ndim == 4 else frames[..., None],
            "action": rows["action"],
            "reward": checked_cast(rows["reward"], np.float32, f"{where}, reward"),
            "terminated": checked_flags(rows["terminal"], f"{where}, terminal"),
        }
        return Episode(
            id=f"{task}/{run}-{checkpoint:03d}/{number:06d}",
            task=task,
            fields=fields,
            steps=len(rows["action"]),
            agent=f"dqn-{run}-checkpoint-{checkpoint}",
        )
