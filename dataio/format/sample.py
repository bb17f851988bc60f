"""An episode as the members of one WebDataset sample."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.episode import DataError, Episode, FieldSpec
from tiphys.dataio.format import encodings as codecs
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.format.rows import Layout, column, pack_rows, plain

BLOCK = 512  # of a tar
MAX_SAMPLE = 4 << 30  # bytes of one episode
MAX_TEXT = 1 << 24  # bytes of a text that is one for the whole episode


class Sample:
    """An episode as the members of one WebDataset sample, in the order in which TarWriter writes them."""

    def __init__(self, layout: Layout, episode: Episode, chosen: Mapping[str, Encoding]) -> None:
        if not 0 < len(episode.id.encode()) <= 512 or episode.steps < 0:
            raise DataError(f"episode {episode.id[:60]!r}: an id of 1 to 512 bytes and steps ≥ 0 are needed")
        unknown = episode.fields.keys() - layout.names
        if unknown:
            raise DataError(f"episode {episode.id!r}: task {episode.task!r} has no field {', '.join(sorted(unknown))}")
        self.episode = episode
        self.rows = pack_rows(layout, episode)
        self.members: dict[str, bytes] = {"steps.npy": npy(self.rows)}
        self.texts: dict[str, str] = {}
        self.values: dict[str, bytes] = {}
        # field -> (kind, rows of a chunk, [(member, offset in the member, size, CRC)])
        self.chunks: dict[str, tuple[str, int, list[tuple[str, int, int, int]]]] = {}
        count = len(self.rows)
        for field in layout.large:
            self._add_large(field, chosen[field.name], count)
        for field in layout.episodic:
            self._add_episodic(field)
        self.short = [f.name for f in layout.observed if len(episode.fields[f.name]) < count]
        self.members["json"] = self._json(chosen)
        # header and padding of each member
        self.bytes = sum(BLOCK + -(-len(m) // BLOCK) * BLOCK for m in self.members.values())
        if self.bytes > MAX_SAMPLE:
            raise DataError(f"episode {episode.id!r} takes {self.bytes} bytes; at most {MAX_SAMPLE} are written")

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
            # one JSON list whose items are the chunks, so that readers of the tar get the strings
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
                raise DataError(f"{where}: a text of at most {MAX_TEXT} bytes is needed")
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
        described = {
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
        try:
            return json.dumps(described, ensure_ascii=False, default=plain).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"episode {e.id!r}: info holds what JSON cannot: {error}") from None


def _stepwise(field: FieldSpec) -> FieldSpec:
    """A field of the whole episode as one of its first row."""
    return FieldSpec(field.name, "info", field.modality, field.dtype, field.shape, field.low, field.high, field.values)


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy` bytes, version 1.0 where its header fits."""
    array = np.ascontiguousarray(array)
    return _header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=4096)
def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        np.lib.format.write_array_header_1_0(out, described)
    except ValueError:  # too many columns
        np.lib.format.write_array_header_2_0(out, described)
    return out.getvalue()
