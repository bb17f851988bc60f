"""An episode as the members of one WebDataset sample."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError, Episode, FieldSpec
from tiphys.dataio.format import encodings as codecs
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.format.packet_table import PacketChunks
from tiphys.dataio.format.rows import RowLayout, column, pack_rows, plain
from tiphys.dataio.inplace.kept import KeptVideo

BLOCK = 512  # bytes of a block of a tar
MAX_SAMPLE = 4 << 30  # bytes of one episode
MAX_TEXT = 1 << 24  # bytes of a text with one value for the whole episode


class Sample:
    """The members of one episode's WebDataset sample, and what the index needs to know about them.

    rows     the episode's rows, as in `steps.npy`
    members  extension -> content; they are written sorted by extension
    texts    text field with one value for the episode -> its text
    values   other field with one value for the episode -> its bytes, little endian
    chunks   large field -> (kind, rows of a chunk, [(member, offset in the member, size, CRC-32C)])
    packets  large field whose video samples lie elsewhere, or in a member of its own -> their places (in the member)
    videos   large field with such a member -> the picture of each row
    short    observed fields with fewer rows than the episode
    bytes    size in the tar, with headers and padding

    Raises DataError if the episode does not fit the task.
    """

    def __init__(
        self,
        layout: RowLayout,
        episode: Episode,
        chosen: Mapping[str, Encoding],
        packets: Mapping[str, PacketChunks] | None = None,
    ) -> None:
        if not 0 < len(episode.id.encode()) <= 512 or episode.steps < 0:
            raise DataError(f"episode {episode.id[:60]!r}: its id must have 1 to 512 bytes, and steps must be ≥ 0")
        unknown = episode.fields.keys() - layout.names
        if unknown:
            raise DataError(f"episode {episode.id!r}: task {episode.task!r} has no field {', '.join(sorted(unknown))}")
        kept = {name: value for name, value in episode.fields.items() if isinstance(value, KeptVideo)}
        episode = (
            replace(episode, fields={n: v for n, v in episode.fields.items() if n not in kept}) if kept else episode
        )
        self.episode = episode
        self.rows = pack_rows(layout, episode)
        self.members: dict[str, bytes] = {"steps.npy": npy(self.rows)}
        self.texts: dict[str, str] = {}
        self.values: dict[str, bytes] = {}
        self.chunks: dict[str, tuple[str, int, list[tuple[str, int, int, int]]]] = {}
        count = len(self.rows)
        self.packets = dict(packets or {})
        self.videos = {name: np.asarray(video.frames).tolist() for name, video in kept.items()}
        for name, video in kept.items():
            self.packets[name] = video.chunks()
            self.members[f"{name}.mp4"] = video.data
        for field in layout.large:
            if field.name not in self.packets:
                self._add_large(field, chosen[field.name], count)
        for field in layout.episodic:
            self._add_episodic(field)
        inside = [f.name for f in layout.observed if f.name not in self.packets]
        self.short = [name for name in inside if len(episode.fields[name]) < count]
        self.members["json"] = self._json(chosen)
        self.bytes = sum(BLOCK + -(-len(m) // BLOCK) * BLOCK for m in self.members.values())
        if self.bytes > MAX_SAMPLE:
            raise DataError(f"episode {episode.id!r} needs {self.bytes} bytes, but at most {MAX_SAMPLE} are allowed")

    def _add_large(self, field: FieldSpec, encoding: Encoding, count: int) -> None:
        if field.per == "episode":
            value = np.asarray(self.episode.fields[field.name])[None]
            stepwise = Episode(self.episode.id, self.episode.task, {field.name: value}, 0)
            array = column(_stepwise(field), stepwise, 1)
        else:
            array = column(field, self.episode, count)
        extension = codecs.EXTENSIONS[encoding.kind]
        entries: list[tuple[str, int, int, int]] = []
        if encoding.kind == "raw":
            member = f"{field.name}.{extension}"
            self.members[member] = data = npy(array)
            one = field.bytes_per_step * encoding.rows
            begin = len(data) - array.nbytes
            for at in range(begin, len(data), max(one, 1)):
                part = data[at : at + one]
                entries.append((member, at, len(part), crc32c(part)))
        elif encoding.kind == "text":
            # the chunks, joined by commas, are one JSON list, so that other readers of the tar get the strings
            member = f"{field.name}.{extension}"
            parts = codecs.encode(array, encoding)
            at = 1
            for part in parts:
                entries.append((member, at, len(part), crc32c(part)))
                at += len(part) + 1
            self.members[member] = b"[" + b",".join(parts) + b"]"
        else:
            parts = codecs.encode(array, encoding)
            width = max(4, len(str(max(len(parts) - 1, 0))))
            for i, part in enumerate(parts):
                member = f"{field.name}.{i:0{width}d}.{extension}"
                self.members[member] = part
                entries.append((member, 0, len(part), crc32c(part)))
        self.chunks[field.name] = (encoding.kind, encoding.rows, entries)

    def _add_episodic(self, field: FieldSpec) -> None:
        value = self.episode.fields.get(field.name)
        where = f"episode {self.episode.id!r}, field {field.name!r}"
        if field.dtype == "str":
            if value is None:
                return
            if not isinstance(value, str) or len(value.encode()) > MAX_TEXT:
                raise DataError(f"{where}: it must be a str of at most {MAX_TEXT} bytes")
            self.texts[field.name] = value
            return
        stepwise = Episode(
            self.episode.id, self.episode.task, {} if value is None else {field.name: np.asarray(value)[None]}, 0
        )
        self.values[field.name] = column(_stepwise(field), stepwise, 1).tobytes()

    def _json(self, chosen: Mapping[str, Encoding]) -> bytes:
        e = self.episode
        fields: dict[str, Any] = dict(self.texts)
        for name in self.values:
            fields[name] = np.asarray(e.fields[name]).tolist()
        content = {
            "id": e.id,
            "task": e.task,
            "steps": int(e.steps),
            "success": None if e.success is None else bool(e.success),
            "agent": e.agent,
            "fields": fields,
            "short": self.short,
            "encodings": {name: [chosen[name].kind, chosen[name].rows] for name in sorted(self.chunks)},
            "info": dict(e.info),
        }
        if self.videos:
            content["videos"] = self.videos
        try:
            return to_json(content, exact=True, ensure_ascii=False, default=plain).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"episode {e.id!r}: info holds a value that JSON cannot hold: {error}") from None


def _stepwise(field: FieldSpec) -> FieldSpec:
    """The spec of a field with one value for the whole episode, as a field by step, so that `column` can check one row of it."""
    return FieldSpec(field.name, "info", field.modality, field.dtype, field.shape, field.low, field.high, field.values)


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy` bytes, in version 1.0 if the header is short enough."""
    array = np.ascontiguousarray(array)
    return _header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=4096)
def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        np.lib.format.write_array_header_1_0(out, header)
    except ValueError:  # too many columns
        np.lib.format.write_array_header_2_0(out, header)
    return out.getvalue()
