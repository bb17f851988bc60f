"""Codecs of images and of small grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.batch import DISCRETE, IMAGE
from tiphys.pretrain.tokens.codec import NAN, Codec, NoEncoding, counted_integers
from tiphys.pretrain.tokens.images import PATCH, centre_crop, from_patches, intervals, patch_grid, resized, to_patches
from tiphys.pretrain.tokens.vocabulary import EmbedderSpec


@dataclass(frozen=True)
class Patches(Codec):
    """An image as 16×16 patches in raster order, after a centre crop and a resize.

    The field's range, black to white, becomes [-1, 1]. Values beyond it are clamped.
    """

    kind: ClassVar[str] = "patches"
    modality: ClassVar[int] = IMAGE
    crop: int = 0
    resize: int = 0
    channels_first: bool = False
    white: float = 255.0  # the value of a full channel
    black: float = 0.0  # the value of an empty channel

    @property
    def varies(self) -> bool:
        """The pictures differ in size from episode to episode (a side of `shape` is 0)."""
        return 0 in self.shape

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of the picture that is cut into patches."""
        shape = self.shape if len(self.shape) == 3 else (*self.shape, 1)
        height, width, channels = (*shape[1:], shape[0]) if self.channels_first else shape
        if self.crop:
            height, width = min(height, self.crop), min(width, self.crop)
        return (self.resize or height), (self.resize or width), channels

    @property
    def tokens(self) -> int:
        rows, columns = patch_grid(*self.size[:2])
        return rows * columns

    def pixels(self, x: np.ndarray) -> np.ndarray:
        """[N, *shape] -> [N, height, width, channels], the pictures as the patches show them.

        uint8 whose range is 0 … 255 stays as it is. All other pictures become uint16, with black 0 and white 65535.
        """
        x = np.asarray(x)
        if x.dtype.kind == "f" and np.isnan(x).any():
            raise NoEncoding(int(np.isnan(x.reshape(len(x), -1)).any(axis=1).argmax()), NAN)
        if x.ndim == 3:
            x = x[..., None]
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        if x.dtype != np.uint8 or (self.black, self.white) != (0.0, 255.0):
            share = (x.astype(np.float64) - self.black) / (self.white - self.black)
            x = np.rint(np.clip(share, 0, 1) * 65535).astype(np.uint16)
        return resized(centre_crop(x, self.crop), self.resize)

    def encode(self, x: np.ndarray) -> np.ndarray:
        return to_patches(self.pixels(x))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [N, patches, 16, 16, C] -> uint8 [N, height, width, C]. Crop and resize are not undone."""
        return from_patches(tokens, *self.size[:2])

    def to_dict(self) -> dict[str, Any]:
        """A black of 0 is left out, as in policies of earlier versions."""
        return {k: v for k, v in super().to_dict().items() if k != "black" or v}

    @cached_property
    def spans(self) -> np.ndarray:
        return intervals(*self.size[:2])

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("patch", (PATCH, PATCH, self.size[2]))


@dataclass(frozen=True)
class Grid(Codec):
    """A small grid of discrete values as one token, [N, 1, h, w, c]; values are counted from the lowest one."""

    kind: ClassVar[str] = "grid"
    modality: ClassVar[int] = DISCRETE
    values: tuple[int, ...] = (0,)
    low: tuple[int, ...] = (0,)
    dtype: str = "uint8"

    @property
    def tokens(self) -> int:
        return 1

    @property
    def cells(self) -> tuple[int, int, int]:
        height, width, channels = self.shape if len(self.shape) == 3 else (*self.shape, 1)
        return height, width, channels

    def encode(self, x: np.ndarray) -> np.ndarray:
        cells = counted_integers(x, self.low, self.values).reshape(len(x), 1, *self.cells)
        return cells.astype(np.uint8 if max(self.values) <= 256 else np.int32)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        flat = np.asarray(tokens, np.int64).reshape(len(tokens), -1) + np.asarray(self.low, np.int64)
        return flat.reshape(len(tokens), *self.shape).astype(self.dtype)

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("grid", self.cells, max(self.values))


@dataclass(frozen=True)
class Tiles(Grid):
    """A small grid cut into equal tiles, one token each in raster order, [N, tiles, h, w, c]: its rows, or its cells.

    So attention can find the part of the grid that holds what a text names. `tile`: height and width of a tile, which divide
    those of the grid.
    """

    kind: ClassVar[str] = "tiles"
    tile: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.tile if len(self.tile) == 2 and min(self.tile) > 0 else (0, 0)
        if not all(sides) or self.cells[0] % sides[0] or self.cells[1] % sides[1]:
            raise DataError(f"codec 'tiles': tiles of {self.tile} do not cover a grid of {self.cells[:2]}")

    @property
    def _counts(self) -> tuple[int, int]:
        """Tiles below each other, and side by side."""
        return self.cells[0] // self.tile[0], self.cells[1] // self.tile[1]

    @property
    def tokens(self) -> int:
        return math.prod(self._counts)

    @cached_property
    def places(self) -> np.ndarray:
        """int32 [tiles, 2]: row and column of each tile."""
        return np.stack(np.divmod(np.arange(self.tokens), self._counts[1]), axis=1).astype(np.int32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        (rows, columns), (height, width), channels = self._counts, self.tile, self.cells[2]
        cells = super().encode(x).reshape(-1, rows, height, columns, width, channels)
        return cells.swapaxes(2, 3).reshape(-1, rows * columns, height, width, channels)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        (rows, columns), (height, width), channels = self._counts, self.tile, self.cells[2]
        cells = np.asarray(tokens).reshape(-1, rows, columns, height, width, channels).swapaxes(2, 3)
        return super().decode(cells.reshape(len(cells), -1))

    def embedder_spec(self) -> EmbedderSpec:
        return EmbedderSpec("tile", (*self.tile, self.cells[2]), max(self.values))
