"""What the videos of a dataset are and what reading a window of them costs, for `inspect` and `check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.format.packet_table import PacketTable
from tiphys.dataio.format.video_stream import Stream
from tiphys.dataio.messages import counted

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

WINDOWS = (1, 8, 32)  # rows of a window for which `inspect` states costs
SHORT = 16  # pictures of a group that `convert` is advised to make
MOST_DECODED = 20.0  # pictures decoded for a wanted one, above which `check` warns
_SAMPLE = 512  # windows whose mean cost stands for all


def videos(index: EpisodeIndex, windows: Sequence[int] = WINDOWS) -> dict[str, dict[str, Any]]:
    """Field -> what its videos are, as JSON values.

    `codecs`, `sizes`: those that occur; `files`, `bytes`: of video; `groups`: pictures of a group -> number of groups;
    `reordered`: share of the episodes in which some pictures are decoded in another order than they are shown (B-frames);
    `checked`: whether the index has checksums; `decoded`, `fetched`: rows of a window -> pictures that are decoded and bytes that
    are read for each wanted picture, on average.
    """
    return {field: _video(index, table, windows) for field in index.packet_fields if (table := index.packets(field))}


def _video(index: EpisodeIndex, table: PacketTable, windows: Sequence[int]) -> dict[str, Any]:
    entries = [
        table.entry(int(e)) for e in np.unique(np.asarray(table.stream), return_index=True)[1] if table.has(int(e))
    ]
    streams = [Stream.from_entry(entry, index.url) for entry in entries]
    lengths, counts = np.unique(table.samples, return_counts=True)
    files = np.unique(table.shard[table.shard >= 0])
    costs = {str(rows): cost(index, table, rows) for rows in windows}
    has = np.flatnonzero(table.stream >= 0)
    reordered = np.diff(table.rank_first)[has] > 0
    return {
        "codecs": sorted({s.codec for s in streams}),
        "sizes": sorted({f"{s.height}×{s.width}" for s in streams}),
        "files": len(files),
        "bytes": sum(index.shards[n].size for n in files.tolist()),
        "groups": {str(n): int(c) for n, c in zip(lengths, counts, strict=True)},
        "reordered": float(reordered.mean()) if len(has) else 0.0,
        "checked": bool(len(table.crc)),
        "decoded": {rows: decoded for rows, (decoded, _) in costs.items()},
        "fetched": {rows: fetched for rows, (_, fetched) in costs.items()},
    }


def cost(index: EpisodeIndex, table: PacketTable, rows: int) -> tuple[float, float]:
    """Pictures that are decoded and bytes that are read for each wanted picture, over windows of at most `rows` rows.

    The windows are evenly spread over all steps. The cache, which saves reading bytes again, is not considered.
    """
    has = np.flatnonzero(table.stream >= 0)
    if not len(has):
        return 0.0, 0.0
    ends = np.cumsum(np.asarray(index.rows, np.int64)[has])
    at = np.unique(np.linspace(0, ends[-1] - 1, min(_SAMPLE, int(ends[-1]))).astype(np.int64))
    place = np.searchsorted(ends, at, side="right")
    decoded = fetched = wanted = 0
    for episode, row in zip(has[place].tolist(), (at - np.append(0, ends)[place]).tolist(), strict=True):
        last = min(row + rows, int(index.rows[episode])) - 1
        low, high = table.chunk_of([episode, episode], [row, last]).tolist()
        fetched += int(table.offset[high] + table.size[high] - table.offset[low])
        decoded += int(table.samples[low:high].sum()) + _needed(table, episode, high, last)
        wanted += last + 1 - row
    return decoded / wanted, fetched / wanted


def _needed(table: PacketTable, episode: int, chunk: int, row: int) -> int:
    """Samples of a chunk that are decoded until the picture of a row is there."""
    frame = table.part("frame", episode, row, 1)
    shown = int(table.lead[chunk]) + row - int(table.row[chunk]) if frame is None else int(frame[0])
    before = int(table.samples[int(table.first[episode]) : chunk].sum())
    rank = table.part("rank", episode, before, int(table.samples[chunk]))
    return shown + 1 if rank is None else int(np.flatnonzero(rank <= shown)[-1]) + 1


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """What `videos` returned, as lines of text."""
    out = []
    for field, one in found.items():
        lengths = sorted(map(int, one["groups"]))
        span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} … {lengths[-1]}"
        codecs, sizes = ", ".join(one["codecs"]), ", ".join(one["sizes"])
        text = f"video {field}: {codecs} {sizes}, {counted(one['files'], 'file')}, groups of {span} pictures"
        text += f", B-frames in {one['reordered']:.0%} of the episodes" if one["reordered"] else ", no B-frames"
        text += "" if one["checked"] else ", video bytes unverified"
        costs = (
            f"{counted(int(rows), 'row')}: {one['decoded'][rows]:.1f} decoded and {one['fetched'][rows] / 1024:,.1f} KiB read"
            for rows in one["decoded"]
        )
        out += [text, "  for each wanted picture, in windows of " + "; of ".join(costs)]
    return out


def warnings(index: EpisodeIndex, fields: Sequence[str], rows: int) -> list[str]:
    """Lines about fields of which far more pictures are decoded than wanted, in windows of `rows` rows."""
    out = []
    for field in fields:
        table = index.packets(field)
        if table is not None and (decoded := cost(index, table, rows)[0]) > MOST_DECODED:
            pictures = int(np.asarray(index.rows, np.int64)[table.stream >= 0].sum())
            now, then = short_groups(table, pictures)
            out.append(
                f"{index.url}: {decoded:.0f} pictures of {field!r} are decoded for each wanted one, because its groups of "
                f"pictures are long; `tiphys convert` with {{encoding: h264, frames: {SHORT}}} decodes and stores its "
                f"{pictures:,} pictures anew, once, with some loss: about {then / 2**20:,.1f} MiB instead of "
                f"{now / 2**20:,.1f} MiB"
            )
    return out


def short_groups(table: PacketTable, pictures: int) -> tuple[float, float]:
    """Bytes of so many pictures as they are, and about those that they take in groups of `SHORT` at the same quality.

    The first sample of a group is a whole picture, and the others store changes; both stay as large as they are now.
    """
    first = np.zeros(len(table.sample_size), bool)
    first[np.cumsum(table.samples, dtype=np.int64) - table.samples] = True
    sizes = np.asarray(table.sample_size, np.float64)
    whole, change = sizes[first].mean(), sizes[~first].mean() if not first.all() else 0.0
    return pictures * float(sizes.mean()), pictures * float(whole + (SHORT - 1) * change) / SHORT
