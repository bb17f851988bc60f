"""Reads ranges of the tensors of a checkpoint, and its weights under canonical names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.pretrain.checkpoint_snapshot import Piece, tensor_name
from tiphys.pretrain.distributed import deepspeed_state as state_of

if TYPE_CHECKING:
    from tiphys.pretrain.checkpoint import Checkpoint

AVERAGE = state_of.AVERAGE
_TRAINED = ("master", AVERAGE)


class RangeReader:
    """Reads flat ranges of canonical parameters from the files of all ranks. Opens only the files that it needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, dict[str, list[Piece]]] = {}
        self.rng: list[dict[str, str]] = []
        self.steps: set[float] = set()
        self.bytes = 0  # number of bytes read so far
        self._files: dict[int, Any] = {}
        for rank in range(checkpoint.world):
            file = self.path / files.rank_files(rank)[1]
            index = files.read_json(file)
            try:
                self.rng.append(dict(index["rng"]))
                for entry in index["fragments"]:
                    self._index(rank, entry)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CheckpointError(f"{file}: not the index of a rank: {error!r}") from error

    def _index(self, rank: int, entry: Mapping[str, Any]) -> None:
        name, start, numel, step = str(entry["name"]), entry["start"], entry["numel"], entry["step"]
        self.shapes[name] = tuple(entry["shape"])
        if any(type(n) is not int or not 0 <= n < 1 << 60 for n in (start, numel, *self.shapes[name])):
            raise ValueError(f"a size of {name} is not possible")
        if step is not None:
            step = float(step)
            self.steps.add(step)
        piece = Piece(start, start + numel, rank, step)
        for key in entry["keys"]:
            self.pieces.setdefault(name, {}).setdefault(key, []).append(piece)

    def copy(self, name: str, key: str, shape: tuple[int, ...], start: int, into: torch.Tensor) -> set[float]:
        """Fill the flat tensor `into` with elements from `start` on. Returns the optimizer steps that they are from."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: has no parameter {name!r}")
        if self.shapes[name] != tuple(shape):
            raise CheckpointError(
                f"{self.path}: {name} has shape {self.shapes[name]}, but {tuple(shape)} in this model"
            )
        if key not in self.pieces[name]:
            have = ", ".join(self.pieces[name])
            raise CheckpointError(
                f"{self.path}: {name} was saved as {have}, not as {key}; check model.freeze and train.ema, which must be as they "
                "were"
            )
        stop, found, steps = start + into.numel(), 0, set()
        for piece in self.pieces[name][key]:
            low, high = max(piece.start, start), min(piece.stop, stop)
            if low < high:
                part = self._slice(
                    piece.rank, tensor_name(name, piece.start, key), low - piece.start, high - piece.start
                )
                into[low - start : high - start].copy_(part)
                found += high - low
                self.bytes += part.numel() * part.element_size()
                if piece.step is not None:
                    steps.add(piece.step)
        if found != into.numel():
            raise CheckpointError(
                f"{self.path}: {name}|{key}: only {found} of {into.numel()} elements from {start} on were saved"
            )
        return steps

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A whole parameter, moment or buffer, in its canonical shape."""
        shape = self.shapes[name]
        saved = max(piece.stop for piece in self.pieces[name][key])
        if math.prod(shape) != saved:
            raise CheckpointError(f"{self.path}: {name}|{key} has shape {shape}, but {saved} elements were saved")
        out = torch.empty(int(torch.Size(shape).numel()), dtype=self.dtype(name, key))
        self.copy(name, key, shape, 0, out)
        return out.view(shape)

    def dtype(self, name: str, key: str) -> torch.dtype:
        first = self.pieces[name][key][0]
        return self._slice(first.rank, tensor_name(name, first.start, key), 0, 0).dtype

    def _slice(self, rank: int, key: str, low: int, high: int) -> torch.Tensor:
        file = self.path / files.rank_files(rank)[0]
        try:
            if rank not in self._files:
                self._files[rank] = safe_open(file, "pt").__enter__()
            found = self._files[rank].get_slice(key)[low:high]
        except (SafetensorError, OSError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{file}: {key} cannot be read: {error}") from error
        if found.dim() != 1 or len(found) != high - low:
            raise CheckpointError(f"{file}: {key} has not the elements {low} to {high} that its index names")
        return found

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(*error)
        self._files.clear()


class SavedWeights(Mapping[str, torch.Tensor]):
    """Canonical name -> whole tensor: masters, frozen parameters and buffers. Each is read when it is asked for.

    Parameters
    ----------
    checkpoint : Checkpoint
    reader : RangeReader
        Of this checkpoint.
    dtype : torch.dtype, optional
        Masters and averages are cast to it.
    weights : "auto", "ema" or "raw"
        The averages of the masters (`train.ema`) or the masters; auto: the averages if there are any.

    Attributes
    ----------
    averaged : bool
        Whether these are the averages.

    Raises
    ------
    CheckpointError
        If a parameter was saved without its weights, or averages are wanted and there are none.
    """

    def __init__(
        self, checkpoint: Checkpoint, reader: RangeReader, dtype: torch.dtype | None = None, weights: str = "raw"
    ) -> None:
        self._reader, self._dtype = reader, dtype
        self._keys: dict[str, str] = {}
        self.averaged = weights != "raw" and any(AVERAGE in keys for keys in reader.pieces.values())
        if weights == "ema" and not self.averaged:
            raise CheckpointError(
                f"{checkpoint.path}: it has no averages of the weights; set `train.ema.decay` before a run begins, or "
                "`publish.weights: raw`"
            )
        order = (*((AVERAGE,) if self.averaged else ()), "master", "frozen", "buffer")
        for name, keys in reader.pieces.items():
            key = next((k for k in order if k in keys), "")
            if not key:
                raise CheckpointError(f"{checkpoint.path}: {name} was saved without its weights")
            self._keys[name] = key

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._reader.whole(name, self._keys[name])
        return tensor.to(self._dtype) if self._dtype is not None and self._keys[name] in _TRAINED else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def describe(self, name: str) -> torch.Tensor:
        """A tensor without data of the same shape and type."""
        key = self._keys[name]
        dtype = self._dtype if self._dtype is not None and key in _TRAINED else self._reader.dtype(name, key)
        return torch.empty(self._reader.shapes[name], dtype=dtype, device="meta")
