"""The files of a Zarr group, in a folder or in one zip, and the metadata of its arrays, which is checked before it is used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np

from tiphys.dataio.convert.archive import open_member, open_zip
from tiphys.dataio.convert.limits import JSON_BYTES, RECORD_BYTES, check_shape, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError

_CODECS = {
    "blosc",
    "zlib",
    "gzip",
    "zstd",
    "lz4",
    "bz2",
    "lzma",
    "bytes",
    "transpose",
    "crc32c",
    "sharding_indexed",
    "shuffle",
    "delta",
    "vlen-utf8",
}
_METADATA = (".zarray", "zarr.json", ".zattrs")


def read_metadata(files: Files, path: str, where: str) -> tuple[Literal[2, 3], dict[str, Any]]:
    """The version and the metadata of an array. Both the checks and the zarr library use this version."""
    version: Literal[2, 3] = 2 if (data := files.get(f"{path}/zarr.json")) is None else 3
    if data is None:
        data = files.get(f"{path}/.zarray")
    metadata = parse_json(data or b"", where)
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: its metadata is not a JSON object")
    return version, metadata


def is_group(files: Files, path: str, where: str) -> bool:
    """Whether the zarr.json in this folder describes a group of Zarr 3."""
    version, metadata = read_metadata(files, path, where)
    return version == 3 and metadata.get("node_type") == "group"


def read_attributes(files: Files, path: str, where: str) -> dict[str, Any]:
    """The attributes of a group."""
    prefix = f"{path}/" if path else ""
    data = files.get(f"{prefix}zarr.json")
    attributes = parse_json(data if data is not None else files.get(f"{prefix}.zattrs") or b"{}", where)
    if data is not None:
        attributes = attributes.get("attributes") if isinstance(attributes, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def holds_texts(metadata: dict[str, Any]) -> bool:
    """Whether the array holds texts: of variable length (vlen-utf8) or of a fixed length (UTF-32)."""
    if "data_type" in metadata:
        kind = metadata["data_type"]
        return kind == "string" or (isinstance(kind, dict) and kind.get("name") == "fixed_length_utf32")
    kind, filters = str(metadata.get("dtype")), metadata.get("filters")
    ids = [f.get("id") for f in filters if isinstance(f, dict)] if isinstance(filters, list) else []
    return kind[1:2] == "U" or (kind == "|O" and ids == ["vlen-utf8"])


def check_metadata(version: int, metadata: dict[str, Any], where: str) -> None:
    """Raises DataError for objects, unknown codecs and too large chunks, before the zarr library sees them."""
    try:
        if version == 2:
            kind, shape, chunks = metadata["dtype"], metadata["shape"], metadata["chunks"]
            codecs = [c["id"] for c in [metadata.get("compressor"), *(metadata.get("filters") or [])] if c is not None]
        else:
            kind, shape = metadata["data_type"], metadata["shape"]
            chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            codecs = list(_codec_names(metadata["codecs"]))
        if holds_texts(metadata):
            dtype, itemsize = None, _text_bytes(kind)
        else:
            dtype = np.dtype(str(kind) if version == 3 else kind)
            itemsize = dtype.itemsize
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: its metadata cannot be read ({type(error).__name__}: {error})") from None
    if dtype is not None and dtype.kind not in "biuf":
        raise DataError(f"{where}: dtype {dtype} cannot be read")
    unknown = sorted({str(c) for c in codecs} - _CODECS)
    if unknown:
        raise DataError(f"{where}: the codec {unknown[0]!r} is not allowed")
    check_shape(shape, 0, where)
    check_shape(chunks, itemsize, f"{where}, a chunk", RECORD_BYTES)
    if len(shape) != len(chunks) or 0 in chunks:
        raise DataError(f"{where}: chunks {chunks} do not divide the shape {shape}")


def _text_bytes(kind: Any) -> int:
    """Bytes of one text in memory, as far as the metadata tells."""
    if isinstance(kind, dict):
        return int(kind["configuration"]["length_bytes"])
    return 4 * int(kind[2:]) if kind[1:2] == "U" else 16


def _codec_names(codecs: Any) -> Iterator[str]:
    """The names of Zarr 3 codecs, including those inside shards."""
    for codec in codecs:
        name = codec if isinstance(codec, str) else codec["name"]
        yield str(name).removeprefix("numcodecs.")
        if isinstance(codec, dict) and isinstance(codec.get("configuration"), dict):
            for key in ("codecs", "index_codecs"):
                yield from _codec_names(codec["configuration"].get(key) or [])


class Files:
    """The files of a folder, or of one zip, which stays open."""

    def __init__(self, source: Source):
        self._source, self._stack, self._zip = source, ExitStack(), None
        self.names = source.files
        if source.single:
            stream = self._stack.enter_context(source.open(source.single))
            self._zip = self._stack.enter_context(open_zip(stream, source.url))
            self.names = self._zip.namelist()
        self._known = frozenset(self.names)
        self._metadata: dict[str, bytes] = {}

    def get(self, path: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        if path not in self._known:
            return None
        if path.endswith(_METADATA):  # read once: what is checked is what the zarr library gets
            if path not in self._metadata:
                self._metadata[path] = self._read(path, JSON_BYTES)
            return self._metadata[path]
        return self._read(path, RECORD_BYTES)

    def _read(self, path: str, limit: int) -> bytes:
        if self._zip is not None:
            with open_member(self._zip, path, self._source.url, limit) as (stream, size):
                return stream.read(size)
        return self._source.read(path, limit)

    def versions(self) -> list[str]:
        names = [self._source.single] if self._source.single else [p for p in self.names if p.endswith(_METADATA)]
        return [self._source.version(n) for n in names]


def zarr_store(files: Files) -> Any:
    """The files as a read-only Store of the zarr library, which is imported only here, when it is needed."""
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    class ReadOnly(Store):
        supports_writes = supports_deletes = supports_listing = False

        def __init__(self) -> None:
            super().__init__(read_only=True)

        def __eq__(self, other: object) -> bool:
            return self is other

        async def get(
            self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
        ) -> Buffer | None:
            data = files.get(key)
            if data is None:
                return None
            if isinstance(byte_range, RangeByteRequest):
                data = data[byte_range.start : byte_range.end]
            elif isinstance(byte_range, OffsetByteRequest):
                data = data[byte_range.offset :]
            elif isinstance(byte_range, SuffixByteRequest):
                data = data[-byte_range.suffix :]
            return prototype.buffer.from_bytes(data)

        async def get_partial_values(
            self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
        ) -> list[Buffer | None]:
            return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

        async def exists(self, key: str) -> bool:
            return key in files.names

        async def set(self, key: str, value: Buffer) -> None:
            raise PermissionError("read-only")

        async def delete(self, key: str) -> None:
            raise PermissionError("read-only")

        async def list(self) -> AsyncIterator[str]:
            for name in files.names:
                yield name

        async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
            for name in files.names:
                if name.startswith(prefix):
                    yield name

        async def list_dir(self, prefix: str) -> AsyncIterator[str]:
            head = prefix.rstrip("/") + "/" if prefix else ""
            for name in sorted({n[len(head) :].partition("/")[0] for n in files.names if n.startswith(head)}):
                yield name

    make: Callable[[], Any] = ReadOnly
    return make()
