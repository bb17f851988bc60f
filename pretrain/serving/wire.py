"""Frames of WebSocket clients <-> values: MessagePack with arrays as maps, as openpi and vla-eval write them. No pickle.

A frame comes from whoever reached the port, so everything in it is bounded: depth, number of keys and elements, kinds of arrays,
and the size of an array, which must be exactly that of its bytes.

| form | is |
|---|---|
| `{"__ndarray__": true, "data", "dtype", "shape"}` | an array |
| `{"__npgeneric__": true, "data", "dtype"}` | a scalar of NumPy |
| `{"__image__": true, "format", "data", "shape"}` | a picture as PNG, JPEG or raw bytes |

openpi's keys of these maps are bytes, those of vla-eval are texts. Both are read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.episode import DataError

MOST_BYTES = 32 << 20  # of a frame
_DEPTH = 8
_ELEMENTS = 1 << 16  # of all lists and maps of a frame together
KEYS = 256  # of a map
_LIST = 4096
_KEY = 256  # characters of a key
_TEXT = 1 << 16  # characters of a text
_DTYPE = re.compile(r"[<>|=]?(?:(?:b1|[iu][1248]|f[248])|[US][1-9]\d{0,5})")
_MARKS = ("__ndarray__", "__npgeneric__", "__image__")


class Frame(DataError):
    """A frame that cannot be read. The message says where and why."""


def decode(frame: bytes, *, keys: int = KEYS) -> dict[str, Any]:
    """The map that a frame holds.

    Parameters
    ----------
    frame : bytes
        A binary frame.
    keys : int
        Most keys of a map.

    Returns
    -------
    dict
        Texts, numbers, booleans, None, lists, maps with texts as keys, and arrays of booleans, numbers or texts. Bytes become
        texts. Arrays share the frame's memory and cannot be written.

    Raises
    ------
    Frame
        If the frame is no MessagePack, no map, or holds anything else or too much.
    """
    left = _ELEMENTS

    def count(found: Any) -> Any:
        nonlocal left
        left -= len(found)
        if left < 0:
            raise Frame(f"the frame has more than {_ELEMENTS:,} elements; send numbers as arrays")
        return found

    try:
        found = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=False,  # openpi's keys are bytes
            object_hook=count,
            list_hook=count,
            max_array_len=_LIST,
            max_map_len=keys,
            max_str_len=_TEXT,
            max_bin_len=MOST_BYTES,
            max_ext_len=0,
        )
    except Frame:
        raise
    except Exception as error:  # msgpack raises errors of many classes
        said = " ".join(str(error).split())[:200]
        raise Frame(
            f"the frame is not the MessagePack of a map within limits ({type(error).__name__}: {said}); send a binary frame "
            "as openpi's client does"
        ) from None
    if not isinstance(found, dict):
        raise Frame(f"the frame holds {_kind(found)}, not a map of names to values")
    value = _opened(found, "", 0)
    if not isinstance(value, dict):
        raise Frame("the frame holds one array, not a map of names to values")
    return value


def encode(value: Mapping[str, Any], *, keys: type = bytes) -> bytes:
    """A frame for a client.

    Parameters
    ----------
    value : mapping
        Texts, numbers, booleans, None, lists, maps and NumPy arrays or scalars.
    keys : type
        ``bytes`` writes the keys of arrays as openpi does, ``str`` as vla-eval does.
    """
    name = (lambda text: text.encode()) if keys is bytes else str

    def packed(one: Any) -> Any:
        if isinstance(one, np.ndarray):
            array = {"__ndarray__": True, "data": one.tobytes(), "dtype": one.dtype.str, "shape": one.shape}
            return {name(key): part for key, part in array.items()}
        if isinstance(one, np.generic):
            if keys is str:
                return one.item()
            return {name("__npgeneric__"): True, name("data"): one.item(), name("dtype"): one.dtype.str}
        raise TypeError(f"a {type(one).__name__} cannot be sent")

    return bytes(msgpack.packb(value, default=packed))


def _opened(value: Any, where: str, depth: int) -> Any:
    """A value without the maps that stand for arrays, and with texts as keys."""
    if depth > _DEPTH:
        raise Frame(f"{where[:_KEY]}: the frame is nested more than {_DEPTH} deep")
    if isinstance(value, dict):
        named = {_key(key, where): part for key, part in value.items()}
        if len(named) != len(value):
            raise Frame(f"{where or 'the frame'}: a key is there twice, as a text and as bytes")
        if mark := next((mark for mark in _MARKS if mark in named), ""):
            return {"__ndarray__": _array, "__npgeneric__": _scalar, "__image__": _picture}[mark](named, where)
        return {key: _opened(part, f"{where}.{key}" if where else key, depth + 1) for key, part in named.items()}
    if isinstance(value, list):
        return [_opened(part, where, depth + 1) for part in value]
    if isinstance(value, bytes):
        return _text(value, where)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise Frame(f"{where}: it is {_kind(value)}; send texts, numbers, arrays, lists and maps")


def _key(key: Any, where: str) -> str:
    if isinstance(key, bytes):
        key = _text(key, where)
    if not isinstance(key, str):
        raise Frame(f"{where or 'the frame'}: a key is {_kind(key)}, not a text")
    if len(key) > _KEY:
        raise Frame(f"{where or 'the frame'}: a key has {len(key)} characters; at most {_KEY}")
    return key


def _text(value: bytes, where: str) -> str:
    if len(value) > _TEXT:
        raise Frame(f"{where}: {len(value):,} bytes are too many for a text; send numbers as an array")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Frame(f"{where}: these bytes are not a text in UTF-8; send numbers as an array") from None


def _dtype(parts: Mapping[str, Any], where: str) -> np.dtype:
    written = parts.get("dtype")
    if isinstance(written, bytes):
        written = written[:32].decode("ascii", "replace")
    if not isinstance(written, str) or not _DTYPE.fullmatch(written):
        raise Frame(f"{where}: dtype {str(written)[:40]!r} is not taken; send booleans, integers, floats or texts")
    return np.dtype(written)


def _shape(parts: Mapping[str, Any], where: str) -> tuple[int, ...]:
    shape = parts.get("shape")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise Frame(f"{where}: its shape {str(shape)[:80]} is not a list of at most 8 sizes")
    return tuple(shape)


def _array(parts: Mapping[str, Any], where: str) -> np.ndarray:
    dtype, shape, data = _dtype(parts, where), _shape(parts, where), parts.get("data")
    if not isinstance(data, bytes):
        raise Frame(f"{where}: the data of an array must be bytes, not {_kind(data)}")
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise Frame(f"{where}: an array {list(shape)} of {dtype} has {needed:,} bytes, but {len(data):,} were sent")
    array = np.frombuffer(data, dtype).reshape(shape) if data else np.zeros(shape, dtype)
    if (
        dtype.kind == "U"
        and int(np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder)).max(initial=0)) > 0x10FFFF
    ):
        raise Frame(f"{where}: the array holds no valid text")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _scalar(parts: Mapping[str, Any], where: str) -> Any:
    dtype, data = _dtype(parts, where), parts.get("data")
    if dtype.kind in "US":
        if not isinstance(data, (str, bytes)):
            raise Frame(f"{where}: a text was announced, but {_kind(data)} was sent")
        return _text(data, where) if isinstance(data, bytes) else data
    if not isinstance(data, (bool, int, float)):
        raise Frame(f"{where}: a number was announced, but {_kind(data)} was sent")
    try:
        return checked_cast(np.array(data), dtype, where, "send it as a plain number")[()]
    except DataError as error:
        raise Frame(str(error)) from None


def _picture(parts: Mapping[str, Any], where: str) -> np.ndarray:
    form, data = parts.get("format"), parts.get("data")
    if form == "raw":
        return _array(parts, where)
    shape = _shape(parts, where)
    if form not in ("png", "jpeg") or not isinstance(data, bytes):
        raise Frame(f"{where}: a picture must be png, jpeg or raw, not {str(form)[:40]!r}")
    if len(shape) != 3 or math.prod(shape) > MOST_BYTES:
        raise Frame(f"{where}: a picture of shape {list(shape)} is not taken; send [height, width, colours]")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[form.upper()]) as opened:
            if (opened.height, opened.width) != shape[:2]:
                raise Frame(
                    f"{where}: the picture has {opened.height} × {opened.width} pixels, not {shape[0]} × {shape[1]}"
                )
            found = np.array(opened)
    except Frame:
        raise
    except Exception as error:  # Pillow raises errors of many classes
        raise Frame(f"{where}: its {form} cannot be read ({type(error).__name__})") from None
    found = found[..., None] if found.ndim == 2 else found
    if found.shape != shape or found.dtype != np.uint8:
        raise Frame(f"{where}: the picture holds {found.dtype} {list(found.shape)}, not uint8 {list(shape)}")
    return found


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "a map", list: "a list", bytes: "bytes", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
