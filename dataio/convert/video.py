"""Frames of a video file at given times, by PyAV. Frames are decoded forward; a seek is used only if it is cheaper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from tiphys.dataio.convert.limits import EPISODE_BYTES, PIXELS, check_shape
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.frame_times import nearest as nearest_picture
from tiphys.dataio.format.packets import to_array

_DEEP = re.compile(r"(?:gray|yuv4\d\dp)(?:9|1[0246])[lb]e")  # formats whose first plane holds uint16
_SEEK_SECONDS = (
    10.0  # seconds; for a larger distance, seeking to a key frame is cheaper than decoding all frames between
)


class VideoFrames:
    """A video that is read forward. Context manager. Use it in a reader process, because FFmpeg may crash on bad files.

    grey    frames have one channel instead of three
    size    height and width of the returned frames; None: as in the video
    lookup  for videos with more than 8 bits per pixel: the value of each level of grey, of any dtype

    Raises DataError if the file is not a readable video. Levels of grey are never merged: reading a grey video of more
    than 8 bits without `lookup` raises it too.
    """

    def __init__(
        self,
        stream: BinaryIO,
        where: str,
        *,
        grey: bool = False,
        size: tuple[int, int] | None = None,
        lookup: np.ndarray | None = None,
    ):
        import av

        self._size, self._lookup = size, lookup
        self._av, self._where, self._format = av, where, "gray" if grey else "rgb24"
        stream.seek(0)
        container_format = _container_format(stream.read(12), where)
        stream.seek(0)
        try:
            # FFmpeg gets an open stream and no protocols, so that it cannot open any other file or URL.
            self._container: Any = av.open(stream, format=container_format, options={"protocol_whitelist": ""})
        except (av.FFmpegError, ValueError, OSError) as error:
            raise DataError(f"{where}: not a readable video ({error})") from None
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{where}: has no video stream")
        self._stream: Any = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise DataError(f"{where}: the video has a codec that this FFmpeg cannot decode")
        self._stream.thread_type = "AUTO"
        self._tick = Fraction(self._stream.time_base or 1)
        self._decoder: Iterator[tuple[int, Any]] = self._decode()
        self._around: list[tuple[int, Any]] = []  # the last one or two decoded frames
        self._position = -1.0  # time of the last decoded frame, in seconds
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > PIXELS:
            raise DataError(f"{where}: frames of {width} × {height} pixels; the limit is {PIXELS:,} pixels")
        self.height, self.width = int(height), int(width)

    def __enter__(self) -> VideoFrames:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.close()

    @property
    def rate(self) -> float:
        """Frames per second, on average; 0 if unknown."""
        return float(self._stream.average_rate or 0)

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name, such as yuv420p or gray12le; empty if unknown."""
        return str(self._stream.codec_context.pix_fmt or "")

    @property
    def levels(self) -> int:
        """Levels of brightness, if a pixel has more than 8 bits; else 0."""
        layout = self._stream.codec_context.format
        return _levels(layout) if layout is not None else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """All remaining frames, uint8 [H, W, C]."""
        for _, frame in self._decoder:
            yield self._array(frame)

    def at(self, times: Sequence[float], tolerance: float) -> np.ndarray:
        """The frame nearest to each time (seconds of the video, ascending), [len(times), H, W, C].

        uint8, or the dtype of `lookup`.
        Raises DataError if no frame is within `tolerance` of a time: a video that does not fit its rows is never shifted.
        """
        if not len(times):
            raise DataError(f"{self._where}: the episode has no rows")
        self._seek_near(float(times[0]) - tolerance)
        out: np.ndarray | None = None
        for row, time in enumerate(times):
            frame = self._nearest(float(time), tolerance, row)
            if out is None:
                shape = check_shape((len(times), *frame.shape), frame.itemsize, self._where, EPISODE_BYTES)
                out = np.empty(shape, frame.dtype)
            if frame.shape != out.shape[1:]:
                raise DataError(
                    f"{self._where}: frames of different sizes, {out.shape[1:]} and {frame.shape} at {time:.3f} s"
                )
            out[row] = frame
        assert out is not None
        return out

    def _seek_near(self, time: float) -> None:
        """Seek if `time` is before the frames that are kept, or far ahead of them."""
        kept = self._seconds(self._around[0][0]) if self._around else self._position
        if time < kept or time > max(self._position, 0.0) + _SEEK_SECONDS:
            try:
                offset = int(max(0.0, time) / self._stream.time_base)
                self._container.seek(offset, stream=self._stream, backward=True)
            except (self._av.FFmpegError, OverflowError) as error:
                raise DataError(f"{self._where}: cannot seek to {time:.3f} s ({error})") from None
            self._decoder, self._around, self._position = self._decode(), [], -1.0

    def _nearest(self, time: float, tolerance: float, row: int) -> np.ndarray:
        """The frame nearest to `time`. Earlier frames are skipped; those around it are kept, as the next row may need them."""
        while not self._around or self._seconds(self._around[-1][0]) <= time:
            following = next(self._decoder, None)
            if following is None:
                break
            self._around = [*self._around[-1:], following]
        shown = np.array([ticks for ticks, _ in self._around], np.int64)
        (found,) = nearest_picture(shown, self._tick, np.array([time]), tolerance, self._where, row).tolist()
        return self._array(self._around[found][1])

    def _seconds(self, ticks: int) -> float:
        return float(ticks * self._tick)

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """(ticks at which it is shown, frame), in order of presentation."""
        try:
            for frame in self._container.decode(self._stream):
                if frame.width * frame.height > PIXELS:
                    raise DataError(
                        f"{self._where}: a frame of {frame.width} × {frame.height} pixels; the limit is {PIXELS:,}"
                    )
                ticks = frame.pts
                if ticks is None:
                    ticks = round((self._position + 1 / (self.rate or 30.0)) / self._tick)
                self._position = self._seconds(ticks)
                yield ticks, frame
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise DataError(
                f"{self._where}: cannot be decoded after {max(self._position, 0):.3f} s ({error})"
            ) from None

    def _array(self, frame: Any) -> np.ndarray:
        """[H, W, C]: uint8, or the dtype of `lookup`."""
        levels = _levels(frame.format)
        if self._lookup is None and levels and frame.format.name.startswith("gray"):
            raise DataError(f"{self._where}: its frames have {levels:,} levels of grey, but 256 are expected")
        if self._lookup is not None:
            if len(self._lookup) != levels:
                raise DataError(
                    f"{self._where}: its frames are {frame.format.name}, but {len(self._lookup):,} levels of grey are expected"
                )
            plane = np.frombuffer(frame.planes[0], ">u2" if frame.format.is_big_endian else "<u2")
            grey = plane.reshape(-1, frame.planes[0].line_size // 2)[: frame.height, : frame.width]
            return self._lookup[np.minimum(nearest(grey, self._size), levels - 1)][..., None]
        if self._size is not None:
            frame = self._resized(frame, self._size)
        return to_array(frame, self._format == "gray", self._where)

    def _resized(self, frame: Any, size: tuple[int, int]) -> Any:
        try:
            return frame.reformat(width=size[1], height=size[0], format=self._format, interpolation="AREA")
        except (self._av.FFmpegError, ValueError) as error:
            raise DataError(f"{self._where}: a picture cannot be resized to {size[0]} × {size[1]} ({error})") from None


def _levels(layout: Any) -> int:
    """Levels of brightness of a pixel format, if its first plane holds them as uint16; else 0."""
    return 1 << layout.components[0].bits if _DEEP.fullmatch(layout.name) else 0


def nearest(array: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """[H, W, …] resized by taking the nearest pixel, so that no value appears that is not in the picture. None: no change."""
    if size is None:
        return array
    rows, columns = ((np.arange(n) * 2 + 1) * have // (2 * n) for n, have in zip(size, array.shape[:2], strict=True))
    return array[rows][:, columns]


def frame_size(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """The value of the option `resize: [height, width]`; None if it is not set."""
    size = options.get("resize")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(s, int) and 0 < s <= 8192 for s in size):
        raise DataError(f"options: resize {size!r} must be [height, width], each from 1 to 8192")
    return size[0], size[1]


def _container_format(header: bytes, where: str) -> str:
    """FFmpeg's name of the container format, from its first bytes. FFmpeg itself would also accept playlists and scripts."""
    if header[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mp4"
    if header[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if header[:4] == b"RIFF" and header[8:12] == b"AVI ":
        return "avi"
    raise DataError(f"{where}: not an MP4, Matroska, WebM or AVI video")
