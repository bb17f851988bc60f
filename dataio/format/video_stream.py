"""What a decoder must know about a video stream, from its sample description in an MP4. No FFmpeg is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.mp4_boxes import boxes, integer, refused

_CODECS = {b"avc1": "h264", b"avc3": "h264", b"hvc1": "hevc", b"hev1": "hevc", b"av01": "av1", b"vp09": "vp9"}
_SAMPLING = ("gray", "yuv420p", "yuv422p", "yuv444p")  # by chroma_format_idc
_UNSPECIFIED = 2  # of primaries, transfer and matrix (ITU-T H.273)
_ENTRY = 78  # bytes of a visual sample description before the boxes inside it


@dataclass(frozen=True)
class Stream:
    """One video stream.

    codec          h264 | hevc | av1 | vp9
    extradata      what the decoder is opened with: the content of `avcC`, `hvcC` or `av1C`; empty for vp9
    width, height  pixels of its pictures
    pix_fmt        FFmpeg's name: gray, yuv420p, yuv422p or yuv444p
    colour         primaries, transfer and matrix (ITU-T H.273; 2: not stated), and range (0: not stated, 1: limited, 2: full),
                   as the MP4 states them; the bytes of the stream may say more
    entry          the sample description, from which all of this follows, without the bit rates (`btrt`) in it: they differ
                   from file to file
    """

    codec: str
    extradata: bytes
    width: int
    height: int
    pix_fmt: str
    colour: tuple[int, int, int, int]
    entry: bytes

    @classmethod
    def from_entry(cls, entry: bytes, where: str) -> Stream:
        """From a sample description: a box of `stsd`, with its header.

        Raises DataError if it is damaged, encrypted, of another codec, or has more than 8 bits per colour.
        """
        data = memoryview(entry)
        found = next(boxes(data, 0, len(data), where), None)
        if found is None or found.end != len(data):
            raise DataError(f"{where}: its sample description is cut off")
        if found.kind == b"encv":
            raise refused(where, "it is encrypted (`encv`)")
        codec = _CODECS.get(found.kind)
        if codec is None:
            raise refused(where, f"its codec is {found.kind!r}; H.264, HEVC, AV1 and VP9 are read")
        width, height = (integer(data, found, at, 2, where) for at in (24, 26))
        parts: dict[bytes, bytes] = {}
        kept = bytes(data[found.begin : found.begin + _ENTRY])
        for box in boxes(data, found.begin + _ENTRY, found.end, where):
            parts.setdefault(box.kind, bytes(data[box.begin : box.end]))
            kept += b"" if box.kind == b"btrt" else bytes(data[box.start : box.end])
        if b"sinf" in parts:
            raise refused(where, "it is encrypted (`sinf`)")
        name, read = _CONFIGURATIONS[codec]
        if name not in parts:
            raise DataError(f"{where}: its sample description {found.kind!r} lacks the box {name!r}")
        try:
            chroma, bits = read(parts[name])
        except (IndexError, ValueError) as error:
            raise DataError(f"{where}: the box {name!r} is damaged ({error})") from None
        if bits != 8:
            raise refused(where, f"it has {bits} bits per colour (depth or HDR); 8 are read")
        if not width or not height:
            raise DataError(f"{where}: its pictures have {width}×{height} pixels")
        return cls(
            codec=codec,
            extradata=b"" if codec == "vp9" else parts[name],
            width=width,
            height=height,
            pix_fmt=_SAMPLING[chroma],
            colour=_colour(parts),
            entry=(8 + len(kept)).to_bytes(4, "big") + found.kind + kept,
        )

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits. Streams with the same digest can share a decoder."""
        key = repr((self.codec, self.extradata, self.width, self.height, self.pix_fmt, self.colour))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _colour(parts: dict[bytes, bytes]) -> tuple[int, int, int, int]:
    """From `colr`, else from `vpcC`."""
    stated = parts.get(b"colr", b"")
    if stated[:4] in (b"nclx", b"nclc") and len(stated) >= 10:
        values = [int.from_bytes(stated[at : at + 2], "big") for at in (4, 6, 8)]
        span = (2 if stated[10] & 0x80 else 1) if stated[:4] == b"nclx" and len(stated) > 10 else 0
        return values[0], values[1], values[2], span
    vp9 = parts.get(b"vpcC", b"")
    if len(vp9) >= 10:
        return vp9[7], vp9[8], vp9[9], 2 if vp9[6] & 1 else 1
    return _UNSPECIFIED, _UNSPECIFIED, _UNSPECIFIED, 0


# -- chroma format (0 … 3) and bits per colour, from the configuration of each codec ------------------------------------


def _avc(data: bytes) -> tuple[int, int]:
    """`avcC`: the first sequence parameter set."""
    if not data[5] & 31:
        raise ValueError("it has no sequence parameter set")
    size = int.from_bytes(data[6:8], "big")
    sps = data[8 : 8 + size]
    if len(sps) != size or size < 4:
        raise ValueError("its sequence parameter set is cut off")
    if sps[1] not in (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244):
        return 1, 8
    bits = _Bits(sps[4:].replace(b"\0\0\3", b"\0\0"))
    bits.golomb()  # its number
    chroma = bits.golomb()
    if chroma > 3:
        raise ValueError(f"chroma format {chroma}")
    if chroma == 3:
        bits.take(1)
    return max(chroma, 1), 8 + max(bits.golomb(), bits.golomb())  # FFmpeg gives grey pictures colour planes


def _hevc(data: bytes) -> tuple[int, int]:
    return data[16] & 3, 8 + max(data[17] & 7, data[18] & 7)


def _av1(data: bytes) -> tuple[int, int]:
    high, twelve, grey, narrow, low = (data[2] >> shift & 1 for shift in (6, 5, 4, 3, 2))
    chroma = 0 if grey else 1 if narrow and low else 2 if narrow else 3
    return chroma, 12 if high and twelve else 10 if high else 8


def _vp9(data: bytes) -> tuple[int, int]:
    chroma = data[6] >> 1 & 7
    if chroma > 3:
        raise ValueError(f"chroma format {chroma}")
    return max(chroma, 1), data[6] >> 4


_CONFIGURATIONS: dict[str, tuple[bytes, Callable[[bytes], tuple[int, int]]]] = {
    "h264": (b"avcC", _avc),
    "hevc": (b"hvcC", _hevc),
    "av1": (b"av1C", _av1),
    "vp9": (b"vpcC", _vp9),
}


class _Bits:
    """Reads the bits of some bytes. Raises ValueError at their end."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data[:64], "big"), 8 * len(data[:64])

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("it is cut off")
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 16:
                raise ValueError("a number in it is too large")
        return (1 << zeros) - 1 + self.take(zeros)
