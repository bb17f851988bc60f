"""`Weights`: the tensors of a policy as bytes, in a canonical order, with a digest. They come from safetensors files only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
# Number of bytes of an element, by the name that torch gives its type
WIDTHS = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float64", "int64"), 8),
}


class Raw(NamedTuple):
    """A tensor: type, shape, and its bytes (uint8 [n]) in row-major order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return WIDTHS[self.dtype]

    @property
    def floating(self) -> bool:
        return "float" in self.dtype

    def elements(self) -> np.ndarray:
        """The elements' bits as unsigned integers [n]."""
        return self.data.view(f"<u{self.width}")


@dataclass(frozen=True)
class Weights:
    """All weights and buffers of a policy at a training step.

    Attributes
    ----------
    tensors : mapping of str to Raw
        By the names of ``DecisionModel.state_dict()``, sorted. Of tied weights only one is there.
    step : int
        Training steps that were done.
    """

    tensors: Mapping[str, Raw]
    step: int = 0

    @classmethod
    def load(cls, folder: str | Path, step: int = 0) -> Weights:
        """The weights of a policy's folder. The files are mapped into memory, not read."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, Raw] = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        found[name] = raw(opened.get_tensor(name))
            except SafetensorError as error:
                raise DataError(f"{file}: the weights are damaged ({error}); publish or fetch them again") from None
        if not found:
            raise DataError(f"{folder}: there are no weights; a policy has model.safetensors")
        return cls(dict(sorted(found.items())), step)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over name, type, shape and SHA-256 of the bytes of each tensor."""
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda tensor: hashlib.sha256(tensor.data).hexdigest(), self.tensors.values())
            lines = [
                json.dumps([name, tensor.dtype, list(tensor.shape), digest]) + "\n"
                for (name, tensor), digest in zip(self.tensors.items(), sums, strict=True)
            ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(len(tensor.data) for tensor in self.tensors.values())

    def as_torch(self) -> dict[str, torch.Tensor]:
        """The tensors. They share the memory of these weights, and must not be changed."""
        return {name: as_torch(tensor) for name, tensor in self.tensors.items()}

    def prepare(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """New tensors of the types and on the devices of a model, for `swap`. This is the slow part: call it in another thread.

        Raises DataError if names or shapes are not those of the model.
        """
        mine, given = dict(model.state_dict(keep_vars=True)), self.as_torch()
        tied = getattr(model, "_tied_weights_keys", None) or {}
        same = {name: tied[name] for name in tied if name not in given and tied[name] in given}
        wrong = sorted(set(mine) - set(given) - set(same)) + sorted(set(given) - set(mine))
        wrong += [n for n in given if n in mine and mine[n].shape != given[n].shape]
        if wrong:
            raise DataError(
                f"the new weights do not fit this model: {', '.join(wrong[:5])} missing, unknown or of another shape; "
                "load the policy anew"
            )
        ready = {name: given[name].to(mine[name].device, mine[name].dtype, copy=True) for name in mine if name in given}
        return ready | {name: ready[other] for name, other in same.items()}

    def save(self, folder: str | Path, groups: Mapping[str, Sequence[str]] | None = None) -> None:
        """Write them as safetensors files, which must be new: model.safetensors, or files with these tensors."""
        from safetensors.torch import save_file

        tensors = self.as_torch()
        for name, members in (groups or {"model.safetensors": list(tensors)}).items():
            save_file({key: tensors[key] for key in members}, Path(folder) / name, metadata={"format": "pt"})


def swap(model: torch.nn.Module, ready: Mapping[str, torch.Tensor]) -> None:
    """Make a model act with weights from `Weights.prepare`. Only pointers change. Call it between two forward passes."""
    mine = dict(model.state_dict(keep_vars=True))
    for name, tensor in ready.items():
        mine[name].data = tensor


def weight_files(folder: str | Path) -> list[Path]:
    """The files with weights of a policy's folder."""
    return sorted(file for file in Path(folder).glob("model*.safetensors"))


def groups_of(folder: str | Path) -> dict[str, list[str]] | None:
    """File -> the tensors in it, if the weights lie in several files."""
    index = Path(folder) / INDEX
    if not index.is_file():
        return None
    groups: dict[str, list[str]] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        groups.setdefault(str(file), []).append(str(name))
    return groups


def raw(tensor: torch.Tensor) -> Raw:
    """A tensor's type, shape and bytes. A contiguous one on the CPU is not copied."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in WIDTHS:
        raise DataError(f"weights of type {name} cannot be published; use bf16 or fp32")
    return Raw(name, tuple(tensor.shape), flat.view(torch.uint8).numpy())


def as_torch(tensor: Raw) -> torch.Tensor:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a mapped file cannot be written to, and nobody does
        flat = torch.from_numpy(tensor.data)
    return flat.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(weights: Weights) -> Iterator[tuple[str, Any]]:
    """Name -> [type, shape] of each tensor, as JSON has it."""
    for name, tensor in weights.tensors.items():
        yield name, [tensor.dtype, list(tensor.shape)]
