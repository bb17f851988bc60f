"""What a caption is about, as a command names it: a picture, an episode, or values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.convert.limits import decode_image
from tiphys.dataio.episode import DataError
from tiphys.dataio.private import read_regular
from tiphys.paths import expand
from tiphys.pretrain.acting.ask import goal, last_step
from tiphys.pretrain.tokens.picture_codecs import Patches
from tiphys.pretrain.tokens.timestep import TimestepLayout

_PICTURES = (".jpeg", ".jpg", ".png", ".webp")
_BYTES = 64 << 20  # most bytes of a picture's file


def about(given: str, layout: TimestepLayout) -> Mapping[str, Any]:
    """An observation as fields.

    Parameters
    ----------
    given : str
        The file of a picture, ``DATASET:EPISODE`` (its last observation is meant), or JSON as an environment gives it.
    layout : TimestepLayout
        The layout of the task whose texts are said.

    Raises
    ------
    DataError
        If it is not valid, or the picture is not one that the policy sees.
    OSError
        If there is no such file or dataset.
    """
    if given.lstrip()[:1] in ("{", "["):
        return goal(given, layout.task)
    if Path(given).suffix.lower() not in _PICTURES:
        last = last_step(given, layout.task)
        return {e.field: last[e.field] for e in layout.elements if e.field in last}
    images = {e.field: e.codec for e in layout.elements if isinstance(e.codec, Patches)}
    if len(images) != 1:
        raise DataError(
            f"{given}: task {layout.task!r} has {len(images)} pictures, so a file is no observation of it; name an "
            "episode, as DATASET:EPISODE"
        )
    ((field, codec),) = images.items()
    return {field: _fitting(decode_image(read_regular(expand(given), _BYTES), given), codec, given)}


def _fitting(picture: np.ndarray, codec: Patches, file: str) -> np.ndarray:
    """A picture with the channels that a policy sees. Raises DataError if its size is another one."""
    shape = (*codec.shape[1:], codec.shape[0]) if codec.channels_first else codec.shape
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    if picture.dtype != np.uint8 or channels not in (1, 3) or (picture.shape[2] > 1) != (channels > 1):
        raise DataError(
            f"{file}: a picture with {picture.shape[2]} channels of {picture.dtype}, but the policy sees {channels} channels; "
            "convert it"
        )
    if not all(want in (0, have) for want, have in zip((height, width), picture.shape)):
        raise DataError(
            f"{file}: the picture has {picture.shape[1]} × {picture.shape[0]} pixels, but the policy sees {width} × {height}; "
            "resize it"
        )
    picture = picture[..., :channels]  # without transparency
    found = np.moveaxis(picture, -1, 0) if codec.channels_first else picture
    return np.ascontiguousarray(found if len(codec.shape) == 3 else found[..., 0])
