"""Images <-> 16×16 patches in raster order, and the bins of a patch's place (Reed et al. 2022, sec. 2.1 and app. C.3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiphys.dataio.philox import PLACE, uniform32, words

PATCH = 16
PLACES = 128  # bins of a patch's row and of its column
_SCALE = np.float32(4.0)  # √PATCH


def centre_crop(images: np.ndarray, size: int) -> np.ndarray:
    """The middle `size` × `size` of [N, H, W, C]. A shorter side stays as it is. 0: no crop."""
    if not size:
        return images
    height, width = images.shape[1:3]
    top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
    return images[:, top : top + size, left : left + size]


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 or uint16 [N, H, W, C] -> [N, size, size, C] by a triangle filter, which is wider if the image shrinks.

    0: no change. The wider filter prevents aliasing. The weights are whole numbers, so that the products of floats are exact: an
    image gives the same bytes whatever images are resized with it.
    """
    count, height, width, channels = images.shape
    dtype = images.dtype
    exact: Any = np.float32 if dtype == np.uint8 else np.float64
    if not size or (height, width) == (size, size):
        return images
    if height != size:
        columns = images.reshape(count, height, width * channels).astype(exact)
        images = _rounded(_triangle(height, size).astype(exact) @ columns, dtype).reshape(count, size, width, channels)
    if width != size:
        lines = np.moveaxis(images, 2, 3).astype(exact, order="C").reshape(-1, width)
        across = _rounded(lines @ _triangle(width, size).T.astype(exact), dtype).reshape(count, size, channels, size)
        images = np.ascontiguousarray(np.moveaxis(across, 3, 2))
    return images


_WEIGHT = 1 << 12  # sum of the weights of one target pixel; times 255 it is below 2^24, so float32 is exact


def _rounded(weighted: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Weighted sums -> integers of the dtype; overwrites its argument. Dividing by a power of two is exact."""
    weighted += _WEIGHT // 2
    weighted *= 1 / _WEIGHT
    return weighted.astype(dtype)


def _triangle(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: whole numbers; each row sums to _WEIGHT. A triangle of half-width max(1, source/target)."""
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale
    share = np.maximum(0.0, 1.0 - np.abs(np.arange(source)[None] + 0.5 - centre[:, None]) / max(1.0, scale))
    upto = np.cumsum(share / share.sum(1, keepdims=True), axis=1)
    upto[:, -1] = 1.0
    return np.diff(np.rint(upto * _WEIGHT), axis=1, prepend=0).astype(np.float32)


def patch_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches that cover an image."""
    return -(-height // PATCH), -(-width // PATCH)


def to_patches(images: np.ndarray) -> np.ndarray:
    """uint8 or uint16 [N, H, W, C] -> float32 [N, patches, 16, 16, C]: raster order, pixels in [-1, 1] divided by √16.

    Black is 0 and white the largest value of the dtype. If a side is not a multiple of 16, its last row or column is repeated.
    """
    count, height, width, channels = images.shape
    rows, columns = patch_grid(height, width)
    more = (rows * PATCH - height, columns * PATCH - width)
    if any(more):
        images = np.pad(images, ((0, 0), (0, more[0]), (0, more[1]), (0, 0)), mode="edge")
    patches = images.reshape(count, rows, PATCH, columns, PATCH, channels).swapaxes(2, 3)
    values = patches.reshape(count, rows * columns, PATCH, PATCH, channels).astype(np.float32)
    if images.dtype == np.uint16:
        values /= np.float32(257)  # 65535 / 255, so that both dtypes give the same numbers for the same picture
    values *= np.float32(2 / 255)
    values -= 1
    values /= _SCALE
    return values


def from_patches(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse of `to_patches`: float32 [N, patches, 16, 16, C] -> uint8 [N, height, width, C]."""
    count, _, _, _, channels = values.shape
    rows, columns = patch_grid(height, width)
    pixels = np.clip(np.rint((values * _SCALE + 1) * np.float32(255 / 2)), 0, 255).astype(np.uint8)
    images = pixels.reshape(count, rows, columns, PATCH, PATCH, channels).swapaxes(2, 3)
    return images.reshape(count, rows * PATCH, columns * PATCH, channels)[:, :height, :width]


def intervals(height: int, width: int) -> np.ndarray:
    """int32 [patches, 4]: first and last bin of each patch's rows, first and last bin of its columns. There are PLACES bins."""
    rows, columns = patch_grid(height, width)

    def bounds(parts: int) -> np.ndarray:
        edges = np.arange(parts + 1) * PLACES // parts
        return np.stack([edges[:-1], np.maximum(edges[:-1], edges[1:] - 1)], axis=1)

    by_row, by_column = bounds(rows), bounds(columns)
    raster = np.concatenate([np.repeat(by_row, columns, axis=0), np.tile(by_column, (rows, 1))], axis=1)
    return raster.astype(np.int32)


def places(
    spans: np.ndarray, seed: int, step: int, row: np.ndarray, position: np.ndarray, training: bool
) -> np.ndarray:
    """int32 [n, 2], the row and column bin of each patch: a random bin of its interval in training, the middle one otherwise.

    spans is [n, 4], as `intervals` gives it. The random bins depend on (seed, step, row, position in the row) alone, not on
    which process makes the row.
    """
    first, last = spans[:, 0::2], spans[:, 1::2]
    if not training:
        return ((first + last) // 2).astype(np.int32)
    a, b, _, _ = words(seed, step, row, slot=position, purpose=PLACE)
    chance = np.stack([uniform32(a), uniform32(b)], axis=1)
    return (first + chance * (last - first + 1)).astype(np.int32)
