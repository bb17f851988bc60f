"""Random crops, rotations and colours of pictures in training, in whole numbers: the same bytes on any machine, in any batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tiphys.dataio.philox import AUGMENT, uniform32, words

_PLACE = 16  # bits of the fraction of a coordinate
_WEIGHT = 10  # bits of the weight of a pixel; 255 · 2^20 fits int32
_FACTOR = 12  # bits of the fraction of a colour's factor
_LUMA = (19595, 38470, 7471)  # of red, green and blue, in 2^-16 (ITU-R 601-2, as Pillow has it)
_ROUND = 1 << 15
_LEVELS = np.arange(256, dtype=np.int32)
_AT_ONCE = 1 << 15  # values that are moved at once, which fit a core's cache


def draws(seed: int, step: int, row: np.ndarray, slot: np.ndarray, camera: int) -> np.ndarray:
    """float64 [n, 6] in (0, 1): one draw for each window [n] and camera. It depends on these arguments alone."""
    parts = [words(seed, step, row, slot, attempt=2 * camera + i, purpose=AUGMENT) for i in range(2)]
    return np.stack([uniform32(word) for part in parts for word in part], axis=-1)[:, :6]


def augmented(pictures: np.ndarray, how: Mapping[str, float], chance: np.ndarray) -> np.ndarray:
    """The pictures of one window, all changed alike.

    Parameters
    ----------
    pictures : ndarray, uint8 [N, height, width, C]
    how : mapping
        `crop`, the share of each side that is kept, somewhere in the picture, and enlarged again; `rotate`, most degrees to
        either side; `brightness`, `contrast` and `saturation`, the largest change of their factor.
    chance : ndarray, float64 [6]
        From `draws`.

    Returns
    -------
    ndarray, uint8 [N, height, width, C]
        Outside the picture, its edge is repeated.
    """
    places = how.get("crop", 1.0), how.get("rotate", 0.0)
    if places != (1.0, 0.0):
        pictures = moved(pictures, *coefficients(pictures.shape[1], pictures.shape[2], *places, chance[:3]))
    factors = [_fixed(1 + how.get(n, 0.0) * (2 * c - 1)) for n, c in zip(_COLOURS, chance[3:], strict=True)]
    return coloured(pictures, *factors)


_COLOURS = ("brightness", "contrast", "saturation")


def _fixed(factor: float) -> int:
    return round(float(factor) * (1 << _FACTOR))


def coefficients(
    height: int, width: int, crop: float, rotate: float, chance: np.ndarray
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(a, b, c) and (d, e, f) in 2^-16 pixels: pixel (x, y) shows the place a·x + b·y + c, d·x + e·y + f, from centres."""
    angle = np.deg2rad(rotate * (2 * chance[2] - 1))
    cos, sin = crop * np.cos(angle), crop * np.sin(angle)
    free = (1 - crop) * np.array([width, height])
    middle = np.array([width, height]) * crop / 2 + chance[:2] * free  # of what is shown
    x = middle[0] - cos * (width / 2 - 0.5) - sin * (height / 2 - 0.5) - 0.5
    y = middle[1] + sin * (width / 2 - 0.5) - cos * (height / 2 - 0.5) - 0.5
    first, second = ([round(float(v) * (1 << _PLACE)) for v in row] for row in ((cos, sin, x), (-sin, cos, y)))
    return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def moved(pictures: np.ndarray, across: tuple[int, int, int], down: tuple[int, int, int]) -> np.ndarray:
    """Pictures uint8 [N, H, W, C] seen through an affine map, with bilinear weights."""
    count, height, width, channels = pictures.shape
    x, y = np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64)[:, None]
    at_x, at_y = (p * x + q * y + r for p, q, r in (across, down))
    left, top = at_x >> _PLACE, at_y >> _PLACE
    shift, whole = _PLACE - _WEIGHT, 1 << _WEIGHT
    right, low = ((at - (first << _PLACE)) >> shift for at, first in ((at_x, left), (at_y, top)))
    corners = []
    for row, of_row in ((top, whole - low), (top + 1, low)):
        line = np.clip(row, 0, height - 1) * width
        for column, of_column in ((left, whole - right), (left + 1, right)):
            place = (line + np.clip(column, 0, width - 1)).reshape(-1)
            corners.append((place, (of_row * of_column).astype(np.int32).reshape(-1, 1)))
    # The pictures of a window share the map, so a place is a row with its values in all of them.
    values = np.ascontiguousarray(pictures.reshape(count, -1, channels).transpose(1, 0, 2)).reshape(height * width, -1)
    out, some = np.empty_like(values), max(1, _AT_ONCE // values.shape[1])
    for first in range(0, len(values), some):
        span = slice(first, first + some)
        total = np.full(out[span].shape, 1 << (2 * _WEIGHT - 1), np.int32)
        for place, weight in corners:
            shown = values.take(place[span], axis=0, mode="clip")  # this mode is the fastest; all places are inside
            total += np.multiply(shown, weight[span], dtype=np.int32)
        total >>= 2 * _WEIGHT
        out[span] = total
    return np.ascontiguousarray(out.reshape(-1, count, channels).transpose(1, 0, 2)).reshape(pictures.shape)


def coloured(pictures: np.ndarray, brightness: int, contrast: int, saturation: int) -> np.ndarray:
    """Pictures uint8 [N, H, W, C] with these factors in 2^-12, one after another, as Pillow's `ImageEnhance` has them."""
    same = 1 << _FACTOR
    if brightness != same:
        pictures = _mapped(pictures, _blend(np.int32(0), _LEVELS, brightness)[None])
    if contrast != same:
        grey = _grey(pictures)
        pixels = grey[0].size
        mean = (grey.reshape(len(grey), -1).sum(axis=1, dtype=np.int64) * 2 + pixels) // (2 * pixels)
        pictures = _mapped(pictures, _blend(mean.astype(np.int32)[:, None], _LEVELS, contrast))
    if saturation != same and pictures.shape[-1] == 3:
        pictures = np.stack([_blend(_grey(one)[..., None], one, saturation) for one in pictures])
    return pictures


def _mapped(pictures: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Each picture uint8 [N, …] with its values replaced by a table, uint8 [1 or N, 256]."""
    out = np.empty_like(pictures)
    for number, picture in enumerate(pictures):
        table = tables[number % len(tables)].tobytes()
        out[number] = np.frombuffer(picture.tobytes().translate(table), np.uint8).reshape(picture.shape)
    return out


def _grey(pictures: np.ndarray) -> np.ndarray:
    """[…, H, W] of pictures […, H, W, C]: uint8 if they are grey already, else int32."""
    if pictures.shape[-1] != 3:
        return pictures[..., 0]
    total = np.full(pictures.shape[:-1], _ROUND, np.int32)
    for channel, weight in enumerate(_LUMA):
        total += np.multiply(pictures[..., channel], np.int32(weight), dtype=np.int32)
    total >>= 16
    return total


def _blend(base: np.ndarray | np.int32, pictures: np.ndarray, factor: int) -> np.ndarray:
    """base + factor · (picture − base), rounded and clamped."""
    out = np.multiply(pictures, np.int32(factor), dtype=np.int32)
    out = out + (np.multiply(base, np.int32((1 << _FACTOR) - factor), dtype=np.int32) + np.int32(1 << (_FACTOR - 1)))
    out >>= _FACTOR
    return np.clip(out, 0, 255, out=out).astype(np.uint8)
