"""What the pictures of a LeRobot dataset are: size, dtype, range and unit, from the pictures themselves and from `info.json`.

Depth videos hold codes of 12 bits; `info.json` says how they become depths (LeRobot, `datasets/depth_utils.py`). They are
stored as uint16 in millimetres, or as float32 in metres if millimetres would merge codes or not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.video import VideoFrames, nearest
from tiphys.dataio.episode import DataError, FieldSpec

_CODES = 1 << 12  # of a depth video
_SHIFT = 3.5  # metres; LeRobot's default


@dataclass(frozen=True)
class Found:
    """What the first picture of a camera shows.

    levels  levels of grey of a video with more than 8 bits per pixel; 0 for all other pictures
    """

    height: int
    width: int
    channels: int
    dtype: str = "uint8"
    levels: int = 0

    @classmethod
    def in_video(cls, video: VideoFrames, channels: int, depth: bool) -> Found:
        if video.levels and (depth or video.pixel_format.startswith("gray")):
            return cls(video.height, video.width, 1, "uint16", video.levels)
        return cls(video.height, video.width, channels)

    @classmethod
    def in_image(cls, image: np.ndarray) -> Found:
        height, width, channels = image.shape
        return cls(height, width, channels, image.dtype.name)


@dataclass(frozen=True)
class Camera:
    """The pictures of one feature, as they are stored.

    field   its field
    grey    its video has one channel
    size    height and width to which pictures are resized; None: they stay as they are
    lookup  the value of each level of grey of a video with more than 8 bits per pixel; None for other pictures
    note    a remark for the user; empty if there is none
    """

    field: FieldSpec
    grey: bool
    size: tuple[int, int] | None
    lookup: np.ndarray | None = None
    note: str = ""


def camera(
    name: str, feature: Mapping[str, Any], found: Found | None, size: tuple[int, int] | None, where: str
) -> Camera:
    """The camera of a feature, from its first picture, or from the metadata if no picture can be read.

    Raises DataError if the metadata give no shape of a picture, or a depth range that makes no sense.
    """
    stated = stated_shape(feature, where)
    seen = found or Found(*stated)
    shape = (*(size or (seen.height, seen.width)), seen.channels)
    depth, info = is_depth(feature), _info(feature)
    low = high = lookup = None
    unit, note, dtype = "", "", seen.dtype
    if seen.levels:
        lookup = np.arange(seen.levels, dtype=np.uint16)
        low, high = (0.0,), (float(seen.levels - 1),)
        if depth and seen.levels == _CODES and _number(info, "depth_min") is not None:
            lookup, unit = depths(info, where)
            low, high, dtype = (float(lookup[0]),), (float(lookup[-1]),), lookup.dtype.name
        elif depth:
            note = f"{name}: info.json does not say which depths its video holds; the codes 0 … {seen.levels - 1} are stored"
    elif depth:
        unit = str(info.get("depth_unit") or "")
        if dtype == "uint8":
            note = f"{name}: is called a depth map, but its pictures have 8 bits; they are stored as ordinary pictures"
    given: dict[str, Any] = {"low": low, "high": high} if low else {}
    field = field_spec(name, dtype, shape, modality="image", unit=unit, **given)
    return Camera(field, seen.channels == 1, size, lookup, note)


def depths(info: Mapping[str, Any], where: str) -> tuple[np.ndarray, str]:
    """The depth of each code of a depth video, ascending, and its unit."""
    low, high = _number(info, "depth_min"), _number(info, "depth_max")
    shift = _number(info, "shift")
    shift = _SHIFT if shift is None else shift
    logarithmic = _value(info, "use_log") in (None, True)
    if low is None or high is None or not 0 <= low < high or (logarithmic and low + shift <= 0):
        raise DataError(
            f"{where}: depth_min {low}, depth_max {high} and shift {shift} do not describe a range of depths in metres"
        )
    if logarithmic:
        metres = np.exp(np.linspace(np.log(low + shift), np.log(high + shift), _CODES)) - shift
    else:
        metres = np.linspace(low, high, _CODES)
    metres = np.clip(metres, low, high)
    if np.diff(metres).min() >= 1e-3 and high <= 65.535:
        return np.rint(metres * 1000).astype(np.uint16), "mm"
    return metres.astype(np.float32), "m"


def is_depth(feature: Mapping[str, Any]) -> bool:
    return bool(_info(feature).get("is_depth_map") or _info(feature).get("video.is_depth_map"))


def resized(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """[H, W, C] in another size: colours are averaged, values of other dtypes are those of the nearest pixel."""
    if size is None or image.shape[:2] == size:
        return image
    if image.dtype != np.uint8:
        return nearest(image, size)
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BOX)).reshape(*size, image.shape[2])


def stated_shape(feature: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """[H, W, C] as the metadata state it, in either order ([H, W, C] or [C, H, W]), or [H, W] for one channel."""
    shape, names = [int(s) for s in feature["shape"]], feature.get("names")
    if len(shape) == 2:
        shape = [*shape, 1]
    if len(shape) != 3:
        raise DataError(f"{where}: an image of shape {shape}; two or three dimensions are needed")
    first = str(names[0]).lower() if isinstance(names, list) and names else ""
    unnamed = not first and shape[0] in (1, 3) and shape[2] not in (1, 3)
    if unnamed or first in ("c", "ch", "rgb", "bgr", "rgba") or first.startswith("channel"):
        shape = [shape[1], shape[2], shape[0]]
    return shape[0], shape[1], shape[2]


def _info(feature: Mapping[str, Any]) -> dict[str, Any]:
    """`info` of a feature, with `video_info`, its older name."""
    parts = (feature.get("video_info"), feature.get("info"))
    return {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}


def _value(info: Mapping[str, Any], name: str) -> Any:
    return info.get(f"video.{name}", info.get(name))


def _number(info: Mapping[str, Any], name: str) -> float | None:
    value = _value(info, name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if known else None
