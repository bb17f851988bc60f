"""A part of a video as an MP4 of its own, made of the same samples: nothing is decoded and no byte of a sample changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.mp4 import Track, read_track
from tiphys.dataio.format.mp4_writer import header
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.inplace.chunks import Video

MAX_BYTES = 1 << 31  # of one episode's video


@dataclass(frozen=True, eq=False)
class KeptVideo:
    """The video of one episode and camera, in place of an array of pictures.

    data    an MP4
    frames  int64 [T]: the picture of each row, as a position in the order in which the MP4's pictures are shown; pictures
            that its edit list hides have positions too
    """

    data: bytes
    frames: np.ndarray

    @cached_property
    def track(self) -> Track:
        return read_track(lambda offset, size: self.data[offset : offset + size], len(self.data), "the kept video")

    def chunks(self) -> PacketChunks:
        """The groups of pictures, with offsets in the MP4 and CRCs. Raises DataError if the MP4 or the frames are damaged."""
        frames, track = np.asarray(self.frames, np.int64), self.track
        if not len(frames) or frames.min() < 0 or frames.max() >= len(track) or (np.diff(frames) < 0).any():
            raise DataError(f"the kept video has {len(track)} pictures, which do not fit its {len(frames)} rows")
        if not track.shown[track.order[frames]].all():
            raise DataError("a row has a picture that the kept video hides")
        found = Video(track, "", "the kept video").chunks(frames)
        view = memoryview(self.data)
        places = zip(found.offset.tolist(), found.size.tolist(), strict=True)
        return found._replace(crc=np.array([crc32c(view[at : at + size]) for at, size in places], np.uint32))


def keep(video: Video, frames: np.ndarray, read: Callable[[int, int], bytes]) -> KeptVideo:
    """Copy the samples that some pictures need.

    Parameters
    ----------
    video : Video
        Where the pictures are.
    frames : int64 [T]
        Their display positions, not descending.
    read : Callable[[int, int], bytes]
        Gives `size` bytes from an offset of the video's file.

    Raises
    ------
    DataError
        If the samples take more than 2 GiB.
    """
    track, groups = video.track, video.gops
    low, high = int(frames[0]), int(frames[-1])
    begin = int(groups.begin[np.searchsorted(groups.first, low, side="right") - 1])
    samples = np.arange(begin, int(track.order[low : high + 1].max()) + 1)
    offsets, sizes, rank = track.offsets[samples], track.sizes[samples], track.rank[samples]
    first, last = int(offsets.min()), int((offsets + sizes).max())
    if last - first > MAX_BYTES:
        raise DataError(f"{video.where}: an episode takes {last - first:,} bytes of it; at most {MAX_BYTES:,} are kept")
    data = memoryview(read(first, last - first))
    if len(data) != last - first:
        raise DataError(f"{video.where}: {len(data):,} bytes arrived instead of bytes {first}–{last - 1}")
    shown = (rank >= low) & (rank <= high)
    times = track.pts[track.order]
    gaps = np.diff(times)
    tick = int(gaps[high]) if high < len(gaps) else int(np.median(gaps)) if len(gaps) else 1
    parts = (sizes, track.dts[samples], track.pts[samples], track.sync[samples], shown)
    begins = (offsets - first).tolist()
    payloads = [data[at : at + size] for at, size in zip(begins, sizes.tolist(), strict=True)]
    made = b"".join([header(track.stream, track.timescale, *parts, tick=tick), *payloads])
    return KeptVideo(made, np.searchsorted(np.sort(rank), frames))
