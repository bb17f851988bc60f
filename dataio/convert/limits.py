"""Limits on what a source may contain, and readers of small formats (images, npy, JSON, deflate) that respect them.

Sources are untrusted. Every size that a file states is checked before memory is allocated for it. Nothing is unpickled.
Decompression stops at its limit, not after it.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.episode import DataError

EPISODE_BYTES = 4 << 30  # arrays of one episode, decoded
EPISODE_STEPS = 10_000_000
RECORD_BYTES = 1 << 30  # one record or member of a container, as stored
TEXT_BYTES = 16 << 20  # one text
JSON_BYTES = 256 << 20  # one metadata file
FILES = 10_000_000  # of one source
PIXELS = 64 << 20  # of one image
DIMENSIONS = 8
FIELDS = 4096  # of one episode
RATIO = 200  # decompressed ÷ compressed bytes
RATIO_FREE = 64 << 20  # decompressed bytes up to which RATIO is not checked

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_NPY_KINDS = "biufUS"


def check_shape(shape: Sequence[Any], itemsize: int, where: str, limit: int = EPISODE_BYTES) -> tuple[int, ...]:
    """The shape as Python ints. Raises DataError if it is not a shape or its array needs more than `limit` bytes.

    With `itemsize` 0 the array is read in parts, so that its size has no limit.
    """
    if not isinstance(shape, list | tuple):
        raise DataError(f"{where}: {shape!r} is not the shape of an array")
    if len(shape) > DIMENSIONS:
        raise DataError(f"{where}: the array has {len(shape)} dimensions; at most {DIMENSIONS} are read")
    out = []
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0:
            raise DataError(f"{where}: {tuple(shape)!r} is not the shape of an array")
        out.append(int(size))
    if math.prod(out) * itemsize > limit or math.prod(out) >= 1 << 62:
        raise DataError(
            f"{where}: an array of shape {tuple(out)} needs {math.prod(out) * itemsize:,} bytes; at most {limit:,} are read"
        )
    return tuple(out)


def check_size(size: int, limit: int, where: str, what: str = "it") -> int:
    """The size. Raises DataError if it is negative or above the limit."""
    if not 0 <= size <= limit:
        raise DataError(f"{where}: {what} has {size:,} bytes; at most {limit:,} are read")
    return size


def parse_json(data: bytes | str, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from None


def decode_image(data: bytes, where: str, *, tiff: bool = False) -> np.ndarray:
    """A JPEG, PNG or WebP as uint8 [H, W, C] (C = 1, 3 or 4) or, for 16-bit greyscale, uint16 [H, W, 1].

    With `tiff`, also TIFF, of which greyscale may be float32 [H, W, 1]. Colours of 16 bits are refused, because Pillow would drop
    8 of them. The size in the header is checked before any pixel is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=(*_IMAGE_FORMATS, "TIFF") if tiff else _IMAGE_FORMATS)
        width, height = image.size
        if width * height > PIXELS:
            raise DataError(f"{where}: the image has {width} × {height} pixels; at most {PIXELS:,} are read")
        if data[:4] == b"\x89PNG" and data[24:25] == b"\x10" and data[25:26] != b"\0":
            raise DataError(f"{where}: the PNG has colours of 16 bits; save it with 8 bits, or as 16-bit grey")
        if image.mode == "F":
            array = np.asarray(image)
        elif image.mode.startswith("I"):
            array = checked_cast(np.asarray(image), np.uint16, where)
        else:
            if image.mode not in ("L", "RGB", "RGBA"):
                image = image.convert("RGBA" if "A" in image.mode else "L" if image.mode == "1" else "RGB")  # type: ignore[assignment]
            array = np.asarray(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: is not a JPEG, PNG or WebP image ({len(data):,} bytes)") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, zlib.error) as error:
        raise DataError(f"{where}: the image cannot be decoded ({error})") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    return array[..., None] if array.ndim == 2 else array


def read_npy(stream: BinaryIO, size: int, where: str, limit: int = EPISODE_BYTES) -> np.ndarray:
    """The array of a `.npy` of `size` bytes. Header, dtype and length are checked before the array is allocated."""
    dtype, shape, fortran = npy_header(stream, where)
    check_shape(shape, dtype.itemsize, where, limit)
    count = math.prod(shape)
    if stream.tell() + count * dtype.itemsize != size:
        raise DataError(
            f"{where}: {size:,} bytes do not hold {dtype} of shape {shape}; the file is truncated or damaged"
        )
    array = np.empty(count, dtype)
    read_into(stream, bytes_of(array), where)
    return array.reshape(shape, order="F" if fortran else "C")


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, writable in place."""
    return memoryview(cast(Any, array.reshape(-1).view(np.uint8))) if array.size else memoryview(bytearray())


def npy_header(stream: BinaryIO, where: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    """(dtype, shape, whether in Fortran order) of the `.npy` that begins at the stream's position."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise DataError(f"{where}: npy version {version} is not supported")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except DataError:
        raise
    except Exception as error:  # NumPy's header parser lets the errors of ast and dtype through
        raise DataError(f"{where}: is not a .npy file ({type(error).__name__}: {error})") from None
    if dtype.hasobject:
        raise DataError(f"{where}: holds Python objects (a pickle), which are never loaded; save plain arrays")
    if dtype.kind not in _NPY_KINDS or dtype.itemsize == 0:
        raise DataError(f"{where}: dtype {dtype} is not supported; use bool, integers, floats or strings")
    return dtype, check_shape(shape, 0, where), fortran


def read_into(stream: BinaryIO, view: memoryview, where: str) -> None:
    """Fill the view. Raises DataError if the stream ends before."""
    done = 0
    while done < len(view):
        got = stream.readinto(view[done : done + (16 << 20)])  # type: ignore[attr-defined]
        if not got:
            raise DataError(f"{where}: ends after {done:,} of {len(view):,} bytes; it is truncated")
        done += got


def read_exactly(stream: BinaryIO, size: int, where: str) -> bytes:
    """The next `size` bytes. Raises DataError if the stream ends before."""
    data = stream.read(size)
    if len(data) != size:
        raise DataError(f"{where}: ends after {len(data):,} of {size:,} bytes; it is truncated")
    return data


class BoundedInflate(io.RawIOBase):
    """The decompressed bytes of a gzip, zlib or raw deflate stream, read forward.

    Raises DataError if they exceed `limit` bytes or, after RATIO_FREE bytes, `ratio` times the compressed bytes.

    wbits: 31 for gzip, 15 for zlib, −15 for raw deflate
    """

    def __init__(self, stream: BinaryIO, where: str, *, wbits: int = 31, limit: int = 1 << 50, ratio: int = RATIO):
        self._stream, self._where, self._limit, self._ratio = stream, where, limit, ratio
        self._inflate, self._wbits = zlib.decompressobj(wbits), wbits
        self._waiting = b""  # compressed bytes of the next gzip member that are already read
        self._bytes_in = self._bytes_out = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._bytes_out

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not len(view):
            return 0
        while True:
            if self._inflate.eof and not self._next_member():
                return 0
            data = self._inflate.unconsumed_tail or self._waiting
            self._waiting = b""
            if not data:
                data = self._read()
                if not data:
                    raise DataError(
                        f"{self._where}: the compressed stream is truncated after {self._bytes_out:,} decompressed bytes"
                    )
            try:
                out = self._inflate.decompress(data, len(view))
            except zlib.error as error:
                raise DataError(
                    f"{self._where}: the compressed stream is damaged after {self._bytes_out:,} decompressed bytes ({error})"
                ) from None
            if not out:
                continue
            self._bytes_out += len(out)
            if self._bytes_out > self._limit or (
                self._bytes_out > RATIO_FREE and self._bytes_out > self._ratio * self._bytes_in
            ):
                raise DataError(
                    f"{self._where}: {self._bytes_in:,} compressed bytes expand to {self._bytes_out:,} bytes or more; "
                    "refused as a decompression bomb"
                )
            view[: len(out)] = out
            return len(out)

    def _read(self) -> bytes:
        data = self._stream.read(1 << 16)
        self._bytes_in += len(data)
        return data

    def _next_member(self) -> bool:
        """Begin the next gzip member, if there is one. A gzip file may hold several, one after another, and then zeros."""
        if self._wbits != 31:
            return False
        rest = self._inflate.unused_data.lstrip(b"\0")
        while not rest and (more := self._read()):
            rest = more.lstrip(b"\0")
        if not rest:
            return False
        self._waiting, self._inflate = rest, zlib.decompressobj(self._wbits)
        return True


def inflate(data: bytes, where: str, *, wbits: int, limit: int) -> bytes:
    """The decompressed bytes of `data`. Raises DataError if they exceed `limit`."""
    return io.BufferedReader(BoundedInflate(io.BytesIO(data), where, wbits=wbits, limit=limit)).read()
