"""From the sample table of a video and the pictures of an episode's rows to the chunks that the index lists."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tiphys.dataio.bounds import expand
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.frame_times import nearest_frames, query_times
from tiphys.dataio.format.mp4 import Gops, Track, gops
from tiphys.dataio.format.packet_table import PacketChunks


class Video:
    """A video file: its track, and which of its pictures belong to episodes already.

    shard  its URL
    where  its name, for messages
    """

    def __init__(self, track: Track, shard: str, where: str) -> None:
        self.track, self.shard, self.where = track, shard, where
        self._taken: list[tuple[int, int, str]] = []  # first and last picture, episode

    @cached_property
    def gops(self) -> Gops:
        return gops(self.track)

    def frames(self, start: float, timestamps: np.ndarray, tolerance: float, where: str) -> np.ndarray:
        """int64 [T]: the picture of each row, as a display position.

        start       second of the video at which the episode begins
        timestamps  float32 [T]: seconds of the episode
        tolerance   seconds

        Raises DataError if the video has too few pictures, none near the time of a row, or rows go back in time.
        """
        where = f"{where}, video {self.where}"
        shown = int(self.track.shown.sum())
        if shown < len(timestamps):
            raise DataError(f"{where}: has {shown:,} pictures, but the episode has {len(timestamps):,} rows")
        seconds, allowed = query_times(start, timestamps, tolerance)
        frames = nearest_frames(self.track, seconds, allowed, where)
        back = np.flatnonzero(np.diff(frames) < 0)
        if len(back):
            row = int(back[0]) + 1
            raise DataError(f"{where}: row {row} is shown before row {row - 1} (timestamp {timestamps[row]})")
        return frames

    def take(self, frames: np.ndarray, episode: str) -> None:
        """Note that an episode has these pictures. Raises DataError if another one has some of them."""
        low, high = int(frames[0]), int(frames[-1])
        for first, last, other in reversed(self._taken):
            if low <= last and first <= high:
                raise DataError(
                    f"{self.where}: its pictures {low}–{high} belong to {episode!r}, but {first}–{last} to {other!r}: "
                    "the ranges of two episodes overlap"
                )
        self._taken.append((low, high, episode))

    def chunks(self, frames: np.ndarray) -> PacketChunks:
        """The chunks that hold these pictures (int64 [T], not descending), one picture a row.

        Raises DataError if samples do not lie in the file in the order in which they are decoded.
        """
        track, groups = self.track, self.gops
        group = np.searchsorted(groups.first, frames, side="right") - 1
        row = np.flatnonzero(np.diff(group, prepend=-1))
        used = group[row]
        begin, end = groups.begin[used], groups.end[used]
        count = end - begin
        sample, chunk = expand(begin, end), np.repeat(np.arange(len(used)), count)
        first = np.cumsum(count) - count  # place of each chunk's first sample
        gap = np.zeros(len(sample), np.int64)
        gap[1:] = track.offsets[sample[1:]] - (track.offsets + track.sizes)[sample[:-1]]
        gap[first] = 0
        if (gap < 0).any() or (gap >= 1 << 31).any() or (track.offsets[begin] != groups.offset[used]).any():
            raise DataError(
                f"{self.where}: its samples do not lie in the order in which they are decoded; `tiphys convert` reads it"
            )
        key = chunk * (len(track) + 1) + track.rank[sample]
        order = np.argsort(key, kind="stable")
        rank = np.empty(len(sample), np.int64)
        rank[order] = np.arange(len(sample)) - first[chunk]
        of_row = np.repeat(np.arange(len(used)), np.diff(np.append(row, len(frames))))
        local = np.searchsorted(key[order], of_row * (len(track) + 1) + frames) - first[of_row]
        lead = local[row]
        plain = lead[of_row] + np.arange(len(frames)) - row[of_row]
        in_order = np.arange(len(sample)) - first[chunk]
        nothing = np.zeros(0, np.int32)
        return PacketChunks(
            shard=self.shard,
            stream=track.stream.entry,
            offset=groups.offset[used],
            size=groups.size[used],
            crc=np.zeros(0, np.uint32),
            row=row.astype(np.int32),
            lead=lead.astype(np.int32),
            samples=count.astype(np.int32),
            sample_size=track.sizes[sample].astype(np.int32),
            gap=gap.astype(np.int32) if gap.any() else nothing,
            rank=nothing if np.array_equal(rank, in_order) else rank.astype(np.int32),
            frame=nothing if np.array_equal(local, plain) else local.astype(np.int32),
        )
