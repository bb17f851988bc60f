"""The rows of `index.parquet` made again from the shards alone: from what the samples' members contain."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format import encodings, limited, tar
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.format.rows import RowLayout, broken_row
from tiphys.dataio.format.table import Chunks, Record
from tiphys.dataio.inplace.kept import KeptVideo

_JSON = 256 << 20  # most bytes of the .json member of a sample


def records(file: Path, shard: str, layouts: Mapping[str, RowLayout]) -> Iterator[Record | DataError]:
    """For each sample of a shard that ShardWriter wrote: its record, or a DataError that says what is wrong with it.

    A fault of the tar itself comes last.
    """
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for sample in limited.samples(file):
                try:
                    yield _record(sample, memoryview(data), shard, layouts)
                except DataError as error:
                    yield DataError(f"sample {sample.key!r} at byte {sample.begin}: {error}")
        except DataError as error:
            yield error


def _record(sample: tar.Sample, data: memoryview, shard: str, layouts: Mapping[str, RowLayout]) -> Record:
    for extension in ("json", "steps.npy"):
        if extension not in sample.members:
            raise DataError(f"it has no .{extension} member, so ShardWriter did not write it")
    own = parse_sample_json(member_bytes(data, sample.members["json"]))
    layout = layouts.get(own["task"])
    if layout is None:
        raise DataError(f"task {own['task']!r} is not in dataset.json")
    rows, offset = _rows(sample.members["steps.npy"], data, layout)
    texts, values = {}, {}
    for field in layout.episodic:
        value = own["fields"].get(field.name)
        if value is not None and field.dtype == "str":
            texts[field.name] = str(value)
        elif value is not None:
            values[field.name] = np.asarray(value, np.dtype(field.dtype).newbyteorder("<")).tobytes()
    names, videos = rows.dtype.names or (), own["videos"]
    reward = float(np.sum(rows["reward"][: own["steps"]], dtype=np.float64)) if "reward" in names else 0.0
    return Record(
        id=own["id"],
        task=layout.task.name,
        steps=own["steps"],
        rows=len(rows),
        total_return=reward,
        shard=shard,
        sample=sample.begin,
        sample_bytes=sample.end - sample.begin,
        offset=offset,
        success=own["success"],
        agent=own["agent"],
        json=sample.members["json"].offset,
        json_bytes=sample.members["json"].size,
        short=tuple(own["short"]),
        texts=texts,
        values=values,
        chunks={
            f.name: _chunks(sample, data, f, own["encodings"].get(f.name)) for f in layout.large if f.name not in videos
        },
        packets={name: _packets(sample, data, name, frames) for name, frames in videos.items()},
    )


def _packets(sample: tar.Sample, data: memoryview, name: str, frames: Any) -> PacketChunks:
    """The places of the samples of a kept video, from its member and the pictures that the sample's `.json` names."""
    member = sample.members.get(f"{name.lower()}.mp4")
    if member is None or not isinstance(frames, list) or not all(isinstance(f, int) for f in frames):
        raise DataError(f"its member {name.lower()}.mp4 is missing, or the .json does not name the picture of each row")
    found = KeptVideo(member_bytes(data, member), np.array(frames, np.int64)).chunks()
    return found._replace(offset=found.offset + member.offset)


def member_bytes(data: memoryview, member: tar.Member) -> bytes:
    return bytes(data[member.offset : member.offset + member.size])


def parse_sample_json(raw: bytes) -> dict[str, Any]:
    """The content of the `.json` member of a sample that ShardWriter wrote. Raises DataError if it is damaged."""
    if len(raw) > _JSON:
        raise DataError(f"its .json member has {len(raw):,} bytes; at most {_JSON:,} are read")
    try:
        own = json.loads(raw)
        if not (isinstance(own["id"], str) and isinstance(own["task"], str) and isinstance(own["steps"], int)):
            raise TypeError("id, task or steps has a wrong type")
        for key, kind in (("fields", dict), ("short", list), ("encodings", dict), ("agent", str), ("info", dict)):
            if not isinstance(own[key], kind):
                raise TypeError(f"{key} is not a {kind.__name__}")
        if not isinstance(own.setdefault("videos", {}), dict):
            raise TypeError("videos is not a dict")
        if own["success"] not in (None, True, False):
            raise TypeError("success must be true, false or null")
        return own
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"its .json member is damaged: {type(error).__name__} {error}") from None


def _rows(member: tar.Member, data: memoryview, layout: RowLayout) -> tuple[np.ndarray, int]:
    """The verified rows of a `steps.npy` member, and the byte of the shard at which they begin."""
    offset, expected = rows_offset(member, data, layout), layout.dtype
    content = data[offset : member.offset + member.size]
    broken = broken_row(content, expected.itemsize)
    if broken >= 0:
        raise DataError(f"steps.npy: the CRC-32C of row {broken} does not match")
    return np.frombuffer(content, expected), offset


def rows_offset(member: tar.Member, data: memoryview, layout: RowLayout) -> int:
    """The byte of the shard at which row 0 of a `steps.npy` member begins.

    Raises DataError if the member does not have the task's dtype, or its size does not fit its rows.
    """
    dtype, shape, header = tar.npy_header(bytes(data[member.offset : member.offset + min(member.size, tar.MAX_HEADER)]))
    expected = layout.dtype
    if dtype != expected or len(shape) != 1 or shape[0] < 1 or header + shape[0] * expected.itemsize != member.size:
        raise DataError(f"steps.npy does not hold rows of task {layout.task.name!r} as dataset.json declares them")
    return member.offset + header


def _chunks(sample: tar.Sample, data: memoryview, field: FieldSpec, stored: Any) -> Chunks:
    """The places of the chunks of a large field, from its members and the encoding that the sample's `.json` names."""
    try:
        kind, rows = str(stored[0]), int(stored[1])
        encoding = Encoding(kind, rows)
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"field {field.name!r}: the sample's .json names no valid encoding of it ({error})") from None
    extension, name = encodings.EXTENSIONS[kind], field.name.lower()
    if kind in ("raw", "text"):
        member = sample.members.get(f"{name}.{extension}")
        if member is None:
            raise DataError(f"its member {name}.{extension} is missing")
        split = _raw_chunks if kind == "raw" else _text_chunks
        places = split(member, data, field, encoding)
    else:
        prefix, suffix = f"{name}.", f".{extension}"
        found = [
            m for e, m in sample.members.items() if e.startswith(prefix) and e[len(prefix) : -len(suffix)].isdigit()
        ]
        places = [(m.offset, m.size) for m in sorted(found, key=lambda m: m.offset)]
    crc = [crc32c(data[at : at + size]) for at, size in places]
    return Chunks(kind, rows, [at for at, _ in places], [size for _, size in places], crc)


def _raw_chunks(member: tar.Member, data: memoryview, field: FieldSpec, encoding: Encoding) -> list[tuple[int, int]]:
    _, _, header = tar.npy_header(bytes(data[member.offset : member.offset + min(member.size, tar.MAX_HEADER)]))
    one, end = field.bytes_per_step * encoding.rows, member.offset + member.size
    return [(at, min(one, end - at)) for at in range(member.offset + header, end, one)]


def _text_chunks(member: tar.Member, data: memoryview, field: FieldSpec, encoding: Encoding) -> list[tuple[int, int]]:
    raw = member_bytes(data, member)
    try:
        parts: Sequence[bytes] = encodings.encode(np.array(json.loads(raw), np.dtypes.StringDType()), encoding)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"field {field.name!r}: its list of texts is damaged: {error}") from None
    if b"[" + b",".join(parts) + b"]" != raw:
        raise DataError(f"field {field.name!r}: its list of texts was not written by ShardWriter")
    places, at = [], member.offset + 1
    for part in parts:
        places.append((at, len(part)))
        at += len(part) + 1
    return places
