"""Encodings of large fields: how rows become chunks of a few rows each, and how a chunk becomes rows again.

| kind | chunk | lossless |
|---|---|---|
| `raw` | rows of the field's one `.npy` member | yes |
| `png`, `webp` | one picture, with the frames one below the other | yes |
| `jpeg`, `webp-lossy` | the same | no |
| `h264`, `av1` | one MP4 that begins with a key frame | no |
| `text` | strings of the field's one JSON list | yes |

A chunk may come from someone who is not trusted. Its format must be the one that the index names and its size the one that the
field declares; both are checked before anything is decoded.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format import priority
from tiphys.dataio.format.packets import to_array

KINDS = ("raw", "png", "webp", "jpeg", "webp-lossy", "h264", "av1", "text")
EXTENSIONS = {
    "raw": "npy",
    "png": "png",
    "webp": "webp",
    "jpeg": "jpg",
    "webp-lossy": "webp",
    "h264": "mp4",
    "av1": "mp4",
    "text": "json",
}
MAX_PIXELS = 1 << 26  # most pixels of a decoded chunk (64 Mi); a chunk that claims more is refused before it is decoded
_PICTURES = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG", "webp-lossy": "WEBP"}
_VIDEOS = {"h264": "libx264", "av1": "libsvtav1"}
_LONGEST = {"webp": 16383, "webp-lossy": 16383, "jpeg": 65500}  # longest side in pixels that the format can hold


@dataclass(frozen=True)
class Encoding:
    """How the rows of a large field are stored."""

    kind: str  # one of KINDS
    frames: int = 0  # rows of a chunk; 0: the default of the kind
    quality: int = 0  # 1 … 100; 0: the default of the kind

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"encoding {self.kind!r} is none of {', '.join(KINDS)}")
        if not 0 <= self.frames <= 65536 or not 0 <= self.quality <= 100:
            raise DataError(
                f"encoding {self.kind!r}: frames {self.frames} must be in 0 … 65536 and quality {self.quality} in 0 … 100"
            )

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return self.frames or {"h264": 16, "av1": 16, "text": 16}.get(self.kind, 1)


def choose(field: FieldSpec, encodings: Mapping[str, Encoding]) -> Encoding:
    """The encoding of a large field: that of the first pattern in `encodings` that matches its name, else a lossless one.

    Raises DataError if the chosen kind cannot hold the field.
    """
    if field.dtype == "str":
        return Encoding("text")
    for pattern, encoding in encodings.items():
        if not fnmatch.fnmatchcase(field.name, pattern):
            continue
        picture = encoding.kind in _PICTURES or encoding.kind in _VIDEOS
        if encoding.kind == "text" or (picture and (field.dtype != "uint8" or _picture_layout(field.shape) is None)):
            raise DataError(
                f"field {field.name!r} ({field.dtype} {field.shape}) cannot be stored as {encoding.kind}: "
                "pictures and videos hold uint8 of two or three dimensions; use raw"
            )
        return encoding
    layout = _picture_layout(field.shape) if field.modality == "image" and field.dtype == "uint8" else None
    if layout is None or max(field.shape) > _LONGEST["webp"]:
        return Encoding("raw")
    return Encoding("webp" if layout.channels == 3 else "png")


@dataclass(frozen=True)
class _PictureLayout:
    """How one step's array becomes a picture.

    axes      the array's axes of height, width and colour, or of plane, height and width; None: it is one grey plane
    channels  of the picture: 3 or 1
    """

    axes: tuple[int, ...] | None
    channels: int


def _picture_layout(shape: Sequence[int]) -> _PictureLayout | None:
    """Arrays with three channels become colour pictures. Others of two or three dimensions become grey, stacked planes one below
    the other. None for arrays of other dimensions.
    """
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        return _PictureLayout(None, 1)
    if len(shape) != 3:
        return None
    if shape[2] == 3:
        return _PictureLayout((0, 1, 2), 3)
    if shape[0] == 3:
        return _PictureLayout((1, 2, 0), 3)
    return _PictureLayout((2, 0, 1), 1) if shape[2] < shape[0] else _PictureLayout((0, 1, 2), 1)


def _planes(rows: np.ndarray, layout: _PictureLayout) -> np.ndarray:
    """[n, *shape] -> [n, height, width, channels] of a picture."""
    n = len(rows)
    if layout.channels == 3:
        assert layout.axes is not None
        return rows.transpose(0, *(a + 1 for a in layout.axes))
    if layout.axes is not None:
        rows = rows.transpose(0, *(a + 1 for a in layout.axes))
        return rows.reshape(n, -1, rows.shape[3], 1)
    return rows.reshape(n, rows.shape[1], rows.shape[2], 1)


def _unplanes(planes: np.ndarray, layout: _PictureLayout, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `_planes`."""
    n = len(planes)
    if layout.axes is None:
        return planes.reshape(n, *shape)
    ordered = [shape[a] for a in layout.axes]
    back = np.argsort(layout.axes)
    return planes.reshape(n, *ordered).transpose(0, *(int(a) + 1 for a in back))


def encode(rows: np.ndarray, encoding: Encoding) -> list[bytes]:
    """Encode an array [n, *shape] of uint8 (pictures, videos) or of strings (text) as chunks. Not for `raw`."""
    parts = [rows[i : i + encoding.rows] for i in range(0, len(rows), encoding.rows)]
    if encoding.kind == "text":
        return [",".join(json.dumps(str(s), ensure_ascii=False) for s in part).encode() for part in parts]
    layout = _picture_layout(rows.shape[1:])
    assert layout is not None, "choose() refuses such a field"
    if encoding.kind in _VIDEOS:
        return [_encode_video(_planes(part, layout), encoding) for part in parts]
    return [_encode_picture(_planes(part, layout), encoding) for part in parts]


def _encode_picture(planes: np.ndarray, encoding: Encoding) -> bytes:
    from PIL import Image

    n, height, width, channels = planes.shape
    tall = np.ascontiguousarray(planes).reshape(n * height, width, channels)
    longest = _LONGEST.get(encoding.kind, 1 << 30)
    if max(tall.shape[:2]) > longest or n * height * width > MAX_PIXELS:
        raise DataError(f"{n} frames of {height}×{width} are too large for one {encoding.kind} chunk; lower `frames`")
    image = Image.fromarray(tall if channels == 3 else tall[:, :, 0])
    out = io.BytesIO()
    if encoding.kind == "png":
        image.save(out, "PNG", compress_level=6)
    elif encoding.kind == "webp":
        image.save(out, "WEBP", lossless=True, quality=encoding.quality or 20, method=1)
    elif encoding.kind == "jpeg":
        image.save(out, "JPEG", quality=encoding.quality or 90)
    else:
        image.save(out, "WEBP", quality=encoding.quality or 85, method=2)
    return out.getvalue()


def _encode_video(planes: np.ndarray, encoding: Encoding) -> bytes:
    """One MP4 whose first frame is a key frame. `quality` 100 … 1 becomes a constant rate factor of 0 … 51 (AV1: 0 … 63)."""
    import av

    os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder prints its settings for every chunk
    n, height, width, channels = planes.shape
    if n * height * width > MAX_PIXELS:
        raise DataError(f"{n} frames of {height}×{width} are too large for one {encoding.kind} chunk; lower `frames`")
    worst = 51 if encoding.kind == "h264" else 63
    rate = str(round(worst * (100 - (encoding.quality or 60)) / 100))
    # one thread, because the bytes must not depend on the machine
    options = {"crf": rate, "preset": "medium", "threads": "1"}
    if encoding.kind == "av1":
        options = {"crf": rate, "preset": "8", "svtav1-params": "lp=1"}
    else:
        options["bf"] = "0"
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(_VIDEOS[encoding.kind], rate=30, options=options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.gop_size = n
        with priority.kept():
            stream.codec_context.open()
        # 4:2:0 needs even sides: the last row and column are doubled, and the decoder cuts them off again
        padded = np.pad(planes, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for plane in padded:
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(plane if channels == 3 else plane[:, :, 0]),
                format="rgb24" if channels == 3 else "gray",
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def decode(chunk: bytes | memoryview, kind: str, rows: int, shape: Sequence[int]) -> np.ndarray:
    """Decode a chunk of `rows` rows: uint8 [rows, *shape], or strings [rows]. An extent of 0 in `shape` allows any size.

    Raises DataError if the chunk is damaged, or does not have the declared format, size or number of rows.
    """
    try:
        if kind == "text":
            return _decode_text(chunk, rows)
        layout = _picture_layout(shape)
        if layout is None:
            raise DataError(f"a field of shape {tuple(shape)} cannot be stored as {kind}")
        planes = (
            _decode_video(chunk, kind, rows) if kind in _VIDEOS else _decode_picture(chunk, kind, rows, layout, shape)
        )
        if 0 in shape:
            return planes[..., 0] if len(shape) == 2 else planes
        if kind in _VIDEOS:
            height, width = _plane_size(shape, layout)
            if not (height <= planes.shape[1] <= height + 1 and width <= planes.shape[2] <= width + 1):
                raise DataError(f"the video has frames of {planes.shape[1:3]}, not {(height, width)}")
            planes = planes[:, :height, :width, : layout.channels]
        return _unplanes(planes, layout, shape)
    except DataError:
        raise
    except Exception as error:  # codecs raise errors of many classes
        raise DataError(f"the {kind} chunk cannot be decoded: {type(error).__name__}: {error}") from error


def _plane_size(shape: Sequence[int], layout: _PictureLayout) -> tuple[int, int]:
    planes = _planes(np.broadcast_to(np.uint8(0), (1, *shape)), layout)
    return planes.shape[1], planes.shape[2]


def _decode_text(chunk: bytes | memoryview, rows: int) -> np.ndarray:
    texts = json.loads(b"[" + bytes(chunk) + b"]")
    if len(texts) != rows or not all(isinstance(t, str) for t in texts):
        raise DataError(f"the text chunk does not hold {rows} strings")
    return np.array(texts, dtype=np.dtypes.StringDType())


def _decode_picture(
    chunk: bytes | memoryview, kind: str, rows: int, layout: _PictureLayout, shape: Sequence[int]
) -> np.ndarray:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
        image = Image.open(io.BytesIO(chunk), formats=[_PICTURES[kind]])
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"the picture claims {width}×{height} pixels; at most {MAX_PIXELS} are decoded")
    if 0 not in shape:
        expected = _plane_size(shape, layout)
        if (height, width) != (rows * expected[0], expected[1]):
            raise DataError(f"the picture is {height}×{width}, not {rows} × {expected[0]}×{expected[1]}")
    elif height % rows:
        raise DataError(f"a picture of height {height} does not hold {rows} frames")
    if image.mode[0] in "IF":  # Pillow would clip its values to 255
        raise DataError(f"the picture has more than 8 bits per pixel (mode {image.mode}); only 8 are decoded")
    pixels = np.asarray(image.convert("RGB" if layout.channels == 3 else "L"))
    return pixels.reshape(rows, height // rows, width, layout.channels)


def _decode_video(chunk: bytes | memoryview, kind: str, rows: int) -> np.ndarray:
    import av

    frames: list[np.ndarray] = []
    # FFmpeg gets the bytes and no protocols, so that a chunk cannot make it open a file or a URL
    options = {"protocol_whitelist": ""}
    with av.open(io.BytesIO(chunk), "r", format="mp4", options=options) as container:
        stream = container.streams.video[0]
        if stream.codec_context.name not in (kind, f"lib{kind}", "libdav1d"):
            raise DataError(f"the video is {stream.codec_context.name}, not {kind}")
        if rows * stream.width * stream.height > MAX_PIXELS:
            raise DataError(
                f"the video claims {rows} frames of {stream.width}×{stream.height}; at most {MAX_PIXELS} pixels are decoded"
            )
        size = stream.width, stream.height
        # FFmpeg refuses larger frames before it allocates them; it pads the sides to multiples of its blocks
        stream.codec_context.options = {"max_pixels": str((size[0] + 128) * (size[1] + 128))}
        stream.thread_count = 1
        for frame in container.decode(stream):
            if (frame.width, frame.height) != size:
                raise DataError(
                    f"the video has a frame of {frame.width}×{frame.height}, but claims {size[0]}×{size[1]}"
                )
            frames.append(to_array(frame))
            if len(frames) > rows:
                break
    if len(frames) != rows:
        raise DataError(f"the video holds {len(frames)} frames, not {rows}")
    return np.stack(frames)
