"""The weights of a model as tensors by name, read when they are asked for. Only safetensors: other formats can run code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tiphys.dataio.episode import DataError


class Weights(Protocol):
    """Tensors by their names in the whole model, read when they are asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        ...

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The rows [first, first + count) of a tensor; None: all from `first` on."""
        ...


class PolicyWeights:
    """The weights in a policy's folder: safetensors, in one file or several."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder):
            try:
                opened = safe_open(file, "pt")
            except SafetensorError as error:
                raise DataError(f"{file}: not a valid safetensors file ({error}); copy the policy again") from None
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        if not self.shapes[name]:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[first : None if count is None else first + count]


def weight_files(folder: Path) -> list[Path]:
    """The files with a policy's weights. Raises DataError if there are none."""
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        raise DataError(f"{folder}: there are no weights; model.init reads model.safetensors only, never pickles")
    return found
