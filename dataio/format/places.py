"""Where rows of fields lie in a shard: byte ranges, and chunks that can only be read as a whole."""

from __future__ import annotations

from typing import NamedTuple

from tiphys.dataio.episode import FieldSpec

STEPS = "steps.npy"
PACKETS = "packets"  # kind of chunks that `packets.FIELD` lists


class Range(NamedTuple):
    """Bytes [offset, offset + size) of a shard. They hold rows of `field`; `steps.npy` stands for all small fields."""

    shard: int  # number in `EpisodeIndex.shards`
    offset: int
    size: int
    field: str


class WantedFields(NamedTuple):
    """Fields grouped by where they are stored."""

    small: list[str]  # as columns of steps.npy
    large: list[FieldSpec]  # as members of their own
    episodic: list[FieldSpec]  # in the index


class Chunk(NamedTuple):
    """A few rows of a large field that are stored together. They can only be read as a whole."""

    kind: str  # one of encodings.KINDS, or PACKETS
    offset: int  # of its first byte in the shard
    size: int  # bytes
    crc: int  # CRC-32C of its bytes; −1: unknown
    row: int  # first row
    rows: int
