"""Small videos for tests, what FFmpeg's demuxer and decoder find in them, and MP4s with changed boxes."""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.format import priority
from tiphys.dataio.format.mp4 import Track, read_track

CODECS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9")
SCALE = 15360  # ticks per second
_CONTAINERS = (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl")


@dataclass(frozen=True)
class Clip:
    """What a video is. `start`: the first time in ticks. `open_gop`: key frames may have leading pictures."""

    codec: str = "libx264"
    frames: int = 20
    gop: int = 5
    b_frames: int = 0
    faststart: bool = False
    start: int = 0
    variable: bool = False
    sound: bool = False
    open_gop: bool = False
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (48, 64)
    movflags: str = ""


def scene(frames: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [frames, H, W, 3]: a moving texture that changes its brightness."""
    base = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8) // 2
    return np.stack([np.roll(base, 3 * i, axis=1) + np.uint8(5 * i % 100) for i in range(frames)])


@lru_cache(maxsize=64)
def make(clip: Clip) -> bytes:
    """The video as MP4, by FFmpeg."""
    import av

    os.environ.setdefault("SVT_LOG", "1")
    b, gop = clip.b_frames, int(clip.open_gop)
    options = {
        "libx264": {"bf": str(b), "threads": "1", "x264-params": f"scenecut=0:open-gop={gop}"},
        "libx265": {
            "x265-params": f"log-level=none:bframes={b}:pools=1:frame-threads=1:scenecut=0:open-gop={gop}:keyint={clip.gop}"
        },
        "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    }[clip.codec]
    flags = "+".join(f for f in ("faststart" if clip.faststart else "", clip.movflags) if f)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # `faststart` opens the file a second time
        with av.open(file.name, "w", format="mp4", options={"movflags": flags} if flags else {}) as container:
            sound: Any = container.add_stream("aac", rate=8000, layout="mono") if clip.sound else None
            stream: Any = container.add_stream(clip.codec, rate=30, options=options)
            stream.height, stream.width = clip.size
            stream.pix_fmt, stream.gop_size = clip.pix_fmt, clip.gop
            stream.time_base = stream.codec_context.time_base = Fraction(1, SCALE)
            with priority.kept():
                stream.codec_context.open()
            time = clip.start
            for i, image in enumerate(scene(clip.frames, clip.size)):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, SCALE)
                time += 512 * (1 + (i * 7 % 3 if clip.variable else 0))
                container.mux(stream.encode(frame))
                if sound is not None and i < 10:
                    wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    wave.sample_rate, wave.pts = 8000, 1024 * i
                    container.mux(sound.encode(wave))
            container.mux(stream.encode())
            if sound is not None:
                container.mux(sound.encode())
        return Path(file.name).read_bytes()


def track(data: bytes, where: str = "x.mp4") -> Track:
    return read_track(lambda offset, size: data[offset : offset + size], len(data), where)


def payloads(data: bytes, found: Track, samples: Any) -> list[bytes]:
    return [data[found.offsets[i] : found.offsets[i] + found.sizes[i]] for i in samples]


def demuxed(data: bytes) -> tuple[list[Any], Any]:
    """FFmpeg's packets of the first video stream, and its decoder's settings."""
    import av

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        context = stream.codec_context
        return packets, (context.extradata or b"", context.pix_fmt, context.width, context.height, stream.time_base)


def decoded(data: bytes, format: str = "rgb24") -> dict[int, np.ndarray]:
    """All pictures by time, decoded by FFmpeg from the first to the last."""
    import av

    with av.open(io.BytesIO(data)) as container:
        return {f.pts: f.to_ndarray(format=format) for f in container.decode(container.streams.video[0])}


def changed(data: bytes, kind: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The MP4 with other content in its first box of a kind (a box with its header, or b"" to remove it).

    Offsets of samples stay valid if `moov` is the last box.
    """
    done = False

    def rewritten(part: bytes) -> bytes:
        nonlocal done
        out, at = b"", 0
        while at < len(part):
            size, name = struct.unpack_from(">I4s", part, at)
            box = part[at : at + size]
            if name == kind and not done:
                done, box = True, change(box)
            elif name in _CONTAINERS:
                inside = rewritten(box[8:])
                box = struct.pack(">I4s", len(inside) + 8, name) + inside
            out, at = out + box, at + size
        return out

    out = rewritten(data)
    assert done, f"no box {kind!r}"
    return out


def with_co64(data: bytes) -> bytes:
    """The MP4 with offsets of 64 bits. Its `moov` must be the last box."""

    def widen(box: bytes) -> bytes:
        offsets = np.frombuffer(box, ">u4", offset=16).astype(">u8").tobytes()
        return struct.pack(">I4s", len(offsets) + 16, b"co64") + box[8:16] + offsets

    return changed(data, b"stco", widen)
