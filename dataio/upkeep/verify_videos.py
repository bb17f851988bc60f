"""`verify` of videos that Tiphys did not write: size and version of the files, checksums if the index has them, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format.table import Shard

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.format.places import Chunk
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.storage import Store

Add = Callable[[str, str, str, str], None]  # kind, where, message, episode: `Report.add`
_AT_ONCE = 8 << 20  # bytes of chunks that are read at once


def is_elsewhere(index: EpisodeIndex, episode: int, field: str) -> bool:
    """Whether a field of an episode lies in another file than the episode's rows."""
    table = index.packets(field)
    return table is not None and table.has(episode) and int(table.shard[episode]) >= 0


def users(index: EpisodeIndex) -> dict[int, list[tuple[int, FieldSpec]]]:
    """Shard with videos of others -> the episodes and fields whose packets it holds."""
    out: dict[int, list[tuple[int, FieldSpec]]] = {}
    for number, layout in enumerate(index.layouts):
        for spec in layout.large:
            table = index.packets(spec.name)
            if table is not None:
                for episode in np.flatnonzero(
                    (np.asarray(index.task) == number) & (np.asarray(table.shard) >= 0)
                ).tolist():
                    out.setdefault(int(table.shard[episode]), []).append((episode, spec))
    return out


def verify_video(
    store: Store, index: EpisodeIndex, shard: Shard, held: Sequence[tuple[int, FieldSpec]], add: Add
) -> dict[int, str]:
    """Compare a file with what the index knows of it. Returns episode -> what is wrong with it."""
    everyone = [episode for episode, _ in held]
    try:
        about = store.head(shard.name)
    except FileNotFoundError:
        add("missing", shard.name, "the video does not exist", "")
        return dict.fromkeys(everyone, "its video is missing")
    if about.size != shard.size:
        kind = "truncated" if about.size < shard.size else "disagreement"
        add(kind, shard.name, f"the video has {about.size} bytes, but {shard.size} when it was indexed", "")
        return dict.fromkeys(everyone, "its video has another size")
    if shard.etag and about.etag and about.etag != shard.etag:
        add("disagreement", shard.name, "the video was replaced after it was indexed; index the source again", "")
        return dict.fromkeys(everyone, "its video was replaced")
    reasons: dict[int, str] = {}
    for episode, spec in held:
        for chunk, data in _checked_chunks(store, index, shard, episode, spec):
            if crc32c(data) != chunk.crc:
                end = chunk.offset + chunk.size - 1
                reasons[episode] = f"{spec.name}, bytes {chunk.offset}–{end}: the chunk's CRC-32C does not match"
                add("checksum", shard.name, reasons[episode], index.id(episode))
                break
    return reasons


def _checked_chunks(
    store: Store, index: EpisodeIndex, shard: Shard, episode: int, spec: FieldSpec
) -> Iterator[tuple[Chunk, Buffer]]:
    """The chunks of a field that have a CRC, with their bytes."""
    chunks = [c for c in index.chunks(episode, spec, 0, int(index.rows[episode])) if c.crc >= 0]
    while chunks:
        count = 1 + int(np.searchsorted(np.cumsum([c.size for c in chunks[1:]]), _AT_ONCE))
        some, chunks = chunks[:count], chunks[count:]
        parts = store.read_ranges(shard.name, [c.offset for c in some], [c.size for c in some])
        yield from zip(some, parts, strict=True)


def decode_all(index: EpisodeIndex, episode: int) -> str:
    """What is wrong with the first picture, video or text of an episode that cannot be decoded; empty if all can."""
    rows = int(index.rows[episode])
    for spec in index.layouts[index.task[episode]].large:
        try:
            index.decode(episode, 0, rows, [spec.name], index.read(index.ranges(episode, 0, rows, [spec.name])))
        except (DataError, FileNotFoundError) as error:
            return str(error)
    return ""
