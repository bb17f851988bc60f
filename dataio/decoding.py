"""Bytes of ranges become the arrays of a window, after every checksum was verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format import encodings
from tiphys.dataio.format.places import PACKETS, Chunk, Range
from tiphys.dataio.format.rows import broken_row

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tiphys.dataio.format.video_stream import Stream
    from tiphys.dataio.index import EpisodeIndex


def decode(
    index: EpisodeIndex,
    episode: int,
    start: int,
    rows: int,
    fields: Sequence[str],
    buffers: Sequence[Buffer],
    before: Callable[[Range], None] | None = None,
    strides: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Decode rows of an episode from their bytes: see `EpisodeIndex.decode`."""
    task = index.task.item(episode)
    rows = min(rows, index.rows.item(episode) - start)
    wanted = index.wanted(task, fields)
    out: dict[str, Any] = {}
    if index.rows_offset.item(episode) >= 0:
        packed = _packed_rows(index, episode, start, rows, buffers)
        for name in wanted.small:
            out[name] = packed[name].copy()
        step, returns, valid = (
            packed["_step"].astype(np.int64),
            packed["_return_to_go"].copy(),
            packed["_valid"] != 0,
        )
    else:
        if wanted.small:
            raise DataError(f"episode {index.id(episode)!r} has no steps.npy, therefore no field {wanted.small[0]!r}")
        step, returns, valid = np.arange(start, start + rows), np.zeros(rows, np.float32), np.zeros(rows, bool)
    if wanted.large:
        parts = _parts(index, episode, start, rows, fields, buffers)
        for spec in wanted.large:
            if before is not None and spec.name in parts:
                before(parts[spec.name][0])
            out[spec.name] = _large(
                index, episode, spec, start, rows, parts.get(spec.name), (strides or {}).get(spec.name, 1)
            )
    for spec in wanted.episodic:
        value = index.episode_value(episode, spec)
        if value is not None:
            out[spec.name] = value
    return {"fields": out, "step": step, "returns_to_go": returns, "valid": valid}


def _packed_rows(index: EpisodeIndex, episode: int, start: int, rows: int, buffers: Sequence[Buffer]) -> np.ndarray:
    """The rows of `steps.npy`, as a structured array."""
    dtype = index.layouts[index.task.item(episode)].dtype
    if not buffers:
        raise DataError(f"episode {index.id(episode)!r}: no buffer was given for its rows of steps.npy")
    packed = memoryview(buffers[0]).cast("B")
    broken = broken_row(packed, dtype.itemsize) if len(packed) == rows * dtype.itemsize else 0
    if broken >= 0:
        place = index.ranges(episode, start, rows, ())[0]
        if len(packed) != place.size:
            raise DataError(f"{index.place(episode, place)}: {len(packed)} bytes arrived; read the range again")
        place = place._replace(offset=place.offset + broken * dtype.itemsize, size=dtype.itemsize)
        raise DataError(
            f"{index.place(episode, place)}: the CRC-32C of row {start + broken} does not match; read the range "
            "again, and if the error stays, run `tiphys verify`"
        )
    table = np.frombuffer(packed, dtype)
    if table["_step"][0] != start:
        place = index.ranges(episode, start, rows, ())[0]
        raise DataError(
            f"{index.place(episode, place)}: these bytes hold row {table['_step'][0]}, not row {start}; "
            "run `tiphys verify`"
        )
    return table


def _parts(
    index: EpisodeIndex, episode: int, start: int, rows: int, fields: Sequence[str], buffers: Sequence[Buffer]
) -> dict[str, tuple[Range, memoryview]]:
    """Range and bytes of each large field that has chunks in the window."""
    ranges = index.ranges(episode, start, rows, fields)
    if len(ranges) != len(buffers):
        raise DataError(f"episode {index.id(episode)!r}: {len(buffers)} buffers were given for {len(ranges)} ranges")
    views = [memoryview(b).cast("B") for b in buffers]
    for r, view in zip(ranges, views):
        if len(view) != r.size:
            raise DataError(f"{index.place(episode, r)}: {len(view)} bytes arrived; read the range again")
    return {r.field: (r, v) for r, v in zip(ranges, views)}


def _large(
    index: EpisodeIndex,
    episode: int,
    spec: FieldSpec,
    start: int,
    rows: int,
    part: tuple[Range, memoryview] | None,
    stride: int,
) -> np.ndarray:
    """The rows of a large field. `part`: range and bytes of its chunks; `stride`: as in `EpisodeIndex.decode`, for this field."""
    pieces = []
    chunks = index.chunks(episode, spec, start, rows) if part else []
    for chunk in chunks:
        assert part is not None
        begin = chunk.offset - part[0].offset
        data = part[1][begin : begin + chunk.size]
        place = Range(part[0].shard, chunk.offset, chunk.size, spec.name)
        low, high = max(start, chunk.row), min(start + rows, chunk.row + chunk.rows)
        needed = np.arange(low, high) % stride == 0
        if chunk.kind != PACKETS or needed.any():
            index.check_chunk(episode, place, chunk, data)
        try:
            if chunk.kind == PACKETS:
                pieces.append(_pictures(index, episode, spec, chunk, low, needed, data))
            else:
                pieces.append(_decode_chunk(data, chunk, spec))
        except DataError as error:
            raise DataError(f"{index.place(episode, place)}: {error}") from error
    if spec.per == "episode":
        return pieces[0][0]
    # of packets, only the wanted rows are decoded
    low = 0 if chunks and chunks[0].kind == PACKETS else start - (chunks[0].row if chunks else 0)
    array = np.concatenate(pieces)[low : low + rows] if pieces else _nothing(spec, 0)
    if len(array) < rows:  # the last row holds only an observation, and this field has no value there
        array = np.concatenate([array, _nothing(spec, rows - len(array), array.shape[1:])])
    return array


def _pictures(
    index: EpisodeIndex, episode: int, spec: FieldSpec, chunk: Chunk, low: int, needed: np.ndarray, data: memoryview
) -> np.ndarray:
    """The rows of a chunk from row `low` on; those that are not needed (bool: one for each row) are black."""
    from tiphys.dataio.format import packets

    table = index.packets(spec.name)
    assert table is not None
    number = table.chunk_at(episode, chunk.row)
    samples = table.chunk_samples(episode, number)
    frame = table.part("frame", episode, low, len(needed))
    wanted = int(table.lead[number]) + low - chunk.row + np.arange(len(needed)) if frame is None else frame
    stream = _stream(table.entry(episode))
    if not all(want in (0, have) for want, have in zip(spec.shape[:2], (stream.height, stream.width), strict=True)):
        raise DataError(f"the video has pictures of {stream.height} × {stream.width}, not {spec.shape}")
    payloads = [data[at : at + size] for at, size in zip(samples.begin.tolist(), samples.size.tolist(), strict=True)]
    grey = bool(spec.shape) and spec.shape[-1] == 1
    pictures = packets.decode(stream, payloads, samples.rank, wanted[needed], "", grey)
    if not all(want in (0, have) for want, have in zip(spec.shape, pictures.shape[1:], strict=True)):
        raise DataError(f"the video has pictures of shape {pictures.shape[1:]}, not {spec.shape}")
    if needed.all():
        return pictures
    out = np.zeros((len(needed), *pictures.shape[1:]), pictures.dtype)
    out[needed] = pictures
    return out


def _decode_chunk(data: memoryview, chunk: Chunk, spec: FieldSpec) -> np.ndarray:
    if chunk.kind != "raw":
        return encodings.decode(data, chunk.kind, chunk.rows, spec.shape)
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if spec.dtype == "str" or 0 in spec.shape or chunk.size != chunk.rows * spec.bytes_per_step:
        raise DataError(f"{chunk.size} bytes cannot hold {chunk.rows} rows of {spec.dtype} {spec.shape}")
    return np.frombuffer(data, dtype).reshape(chunk.rows, *spec.shape).copy()


@lru_cache(maxsize=256)
def _stream(entry: bytes) -> Stream:
    from tiphys.dataio.format.video_stream import Stream

    return Stream.from_entry(entry, "the index")


def _nothing(spec: FieldSpec, rows: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Rows without a value: zeros, or empty texts."""
    if spec.dtype == "str":
        return np.full(rows, "", np.dtypes.StringDType())
    return np.zeros((rows, *(spec.shape if shape is None else shape)), spec.dtype)
