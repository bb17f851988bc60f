"""Pictures from the compressed samples of a video stream, as they lie in an MP4. FFmpeg gets these bytes and nothing else.

Decoders are kept, because opening one takes longer than decoding a few pictures. A decoder that has failed, or that has read
other parameter sets than those of its stream, is not used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from av import VideoFrame
    from typing_extensions import Buffer

    from tiphys.dataio.format.video_stream import Stream

MAX_PIXELS = 1 << 26  # of one picture
_KEPT = 8  # open decoders of a process
_DECODERS = {"h264": "h264", "hevc": "hevc", "av1": "libdav1d", "vp9": "vp9"}
_PARAMETER_SETS = {"h264": (0x1F, 0, {7, 8, 13, 15}), "hevc": (0x3F, 1, {32, 33, 34})}  # mask, shift, NAL unit types
# without these, FFmpeg paints over damage instead of reporting it
_ERRORS = "explode+crccheck+bitstream+buffer"

_decoders: OrderedDict[str, Any] = OrderedDict()  # stream digest -> open decoder, the one that was used last at the end


def decode(
    stream: Stream,
    payloads: Sequence[Buffer],
    pts: np.ndarray,
    wanted: np.ndarray,
    where: str = "",
    grey: bool = False,
) -> np.ndarray:
    """The wanted pictures of a group of pictures.

    Parameters
    ----------
    stream : Stream
        The stream to which the samples belong.
    payloads : Sequence[Buffer]
        The bytes of consecutive samples in decode order, the first of which is a sync sample. Those after the last one that is
        needed are not decoded.
    pts : int64 [n]
        For each sample, an integer that grows in display order, such as its time or its display position. All are different.
    wanted : int64 [k]
        Some of `pts`, in any order.
    where : str
        For messages.
    grey : bool
        Whether pictures have one channel instead of three.

    Returns
    -------
    uint8 [k, height, width, 3], or [k, height, width, 1] if `grey`.

    Raises
    ------
    DataError
        If a sample is damaged, a picture is missing, or one has another size or pixel format than the stream states.
    """
    if stream.width * stream.height > MAX_PIXELS:
        raise DataError(
            f"{where}: its pictures have {stream.width}×{stream.height} pixels; at most {MAX_PIXELS:,} are decoded"
        )
    out = np.empty((len(wanted), stream.height, stream.width, 1 if grey else 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, time in enumerate(np.asarray(wanted).tolist()):
        places.setdefault(time, []).append(place)
    for time, picture in pictures(stream, payloads, pts, places.keys(), where):
        out[places[time]] = to_array(picture, grey, where)
    return out


def pictures(
    stream: Stream, payloads: Sequence[Buffer], pts: np.ndarray, wanted: Any, where: str = ""
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted pictures as FFmpeg's frames, each once, in the order in which they are decoded. See `decode`."""
    import av

    left, times = set(wanted), np.asarray(pts).tolist()
    if not left:
        return
    last = max((i for i, time in enumerate(times) if time in left), default=-1)
    unknown = left.difference(times)
    if unknown or last >= len(payloads):
        raise DataError(f"{where}: {len(payloads)} samples with the times {times[:8]} … do not hold {sorted(left)[:8]}")
    # pictures that are decoded after the first one but shown before it need samples that are not here
    floor = min(times[0], min(left))
    decoder = _take(stream, where)
    usable = False
    try:
        for i in (*range(last + 1), None):
            if i is not None and times[i] < floor:
                continue
            for frame in _decoded(decoder, None if i is None else payloads[i], None if i is None else times[i]):
                if frame.pts in left:
                    left.remove(frame.pts)
                    _check(frame, stream, where)
                    yield frame.pts, frame
            if not left:
                break
        if left:
            raise DataError(
                f"{where}: the decoder gave no picture for {len(left)} of {last + 1} samples, first {min(left)}"
            )
        usable = not changes_parameters(stream, payloads[: last + 1])
    except DataError:
        raise
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise DataError(f"{where}: the {stream.codec} samples cannot be decoded ({error})") from None
    finally:
        if usable:
            _keep(stream, decoder)


def to_array(frame: VideoFrame, grey: bool = False, where: str = "") -> np.ndarray:
    """uint8 [height, width, 3 or 1]: a picture in the colours that all of Tiphys uses, whichever way it was decoded.

    Raises DataError if FFmpeg cannot convert it, for example because its colour space is a reserved number.
    """
    from av import FFmpegError
    from av.video.reformatter import Interpolation, VideoReformatter

    global _reformatter
    if _reformatter is None:
        _reformatter = VideoReformatter()
    name = "gray" if grey else "rgb24"
    try:
        made = _reformatter.reformat(frame, format=name, interpolation=Interpolation.BILINEAR, threads=1)
    except (FFmpegError, ValueError) as error:
        raise DataError(f"{where}: the colours of a picture cannot be converted to {name} ({error})") from None
    array = made.to_ndarray()
    return array[..., None] if grey else array


_reformatter: Any = None


def close() -> None:
    """Free the decoders that are kept."""
    _decoders.clear()


def _decoded(decoder: Any, payload: Buffer | None, time: int | None) -> list[Any]:
    import av

    if payload is None:
        return list(decoder.decode(None))
    packet = av.Packet(bytes(payload))
    packet.pts = packet.dts = time
    return list(decoder.decode(packet))


def _take(stream: Stream, where: str) -> Any:
    """An open decoder that has no pictures. Nobody else uses it until it is kept again."""
    kept = _decoders.pop(stream.digest, None)
    return kept if kept is not None else _opened(stream, where)


def _keep(stream: Stream, decoder: Any) -> None:
    decoder.flush_buffers()
    _decoders[stream.digest] = decoder
    while len(_decoders) > _KEPT:
        _decoders.popitem(last=False)


def _opened(stream: Stream, where: str) -> Any:
    import av

    try:
        decoder: Any = av.CodecContext.create(_DECODERS[stream.codec], "r")
        if stream.extradata:
            decoder.extradata = stream.extradata
        # FFmpeg refuses larger pictures before it allocates them; it pads the sides to multiples of its blocks
        decoder.options = {"err_detect": _ERRORS, "max_pixels": str((stream.width + 128) * (stream.height + 128))}
        if stream.codec == "h264":  # a stream that does not state its reorder depth must lose no picture
            decoder.options = {**decoder.options, "strict": "strict"}
        decoder.thread_count = 1
        primaries, transfer, matrix, span = stream.colour
        decoder.color_primaries, decoder.color_trc, decoder.colorspace, decoder.color_range = (
            primaries,
            transfer,
            matrix,
            span,
        )
        decoder.open()
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: no {stream.codec} decoder can be opened for it ({error})") from None
    return decoder


def _check(frame: Any, stream: Stream, where: str) -> None:
    if (frame.width, frame.height) != (stream.width, stream.height):
        raise DataError(
            f"{where}: a picture has {frame.width}×{frame.height} pixels, but the video states {stream.width}×{stream.height}; "
            "videos whose size changes are not read in place"
        )
    formats = {stream.pix_fmt, stream.pix_fmt.replace("yuv", "yuvj")} | (
        {"gbrp"} if stream.pix_fmt == "yuv444p" else set()
    )
    if frame.format.name not in formats:
        raise DataError(
            f"{where}: a picture has the pixel format {frame.format.name}, but the video states {stream.pix_fmt}"
        )
    if frame.is_corrupt:
        raise DataError(f"{where}: the picture at {frame.pts} is damaged")


def begins_anew(stream: Stream, sample: Buffer) -> bool:
    """Whether a sync sample may follow samples of another video: decoding it, and all after it, uses none before it.

    True for IDR pictures of H.264 and HEVC, and for sync samples of AV1 and VP9. Other pictures of H.264 and HEVC at which
    decoding can start keep what was decoded before them.
    """
    if stream.codec not in _PARAMETER_SETS:
        return True
    kinds = {"h264": {5}, "hevc": {16, 17, 18, 19, 20}}[stream.codec]
    slices = {"h264": range(1, 6), "hevc": range(32)}[stream.codec]
    first = next((kind for kind, _ in _units(stream, sample) if kind in slices), -1)
    return first in kinds


def changes_parameters(stream: Stream, payloads: Sequence[Buffer]) -> bool:
    """Whether samples bring parameter sets that the extradata lack: a decoder would use them for later samples too."""
    if stream.codec not in _PARAMETER_SETS:
        return False
    kinds = _PARAMETER_SETS[stream.codec][2]
    return any(
        kind in kinds and bytes(unit) not in stream.extradata
        for data in payloads
        for kind, unit in _units(stream, data)
    )


def _units(stream: Stream, payload: Buffer) -> Iterator[tuple[int, memoryview]]:
    """Type and bytes of each NAL unit of an H.264 or HEVC sample."""
    mask, shift, _ = _PARAMETER_SETS[stream.codec]
    length = 1 + (stream.extradata[4 if stream.codec == "h264" else 21] & 3)
    data = memoryview(payload).cast("B")
    at = 0
    while at + length < len(data):
        size = int.from_bytes(data[at : at + length], "big")
        at += length
        yield data[at] >> shift & mask, data[at : at + size]
        at += max(size, 1)
