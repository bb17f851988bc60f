"""Zarr replay buffers of Diffusion Policy: arrays `data/NAME` over all steps, cut at `meta/episode_ends`.

https://github.com/real-stanford/diffusion_policy, `replay_buffer.py`. A folder or a `.zarr.zip`, Zarr 2 or 3. Only codecs
that decode bytes are allowed: no pickles, no objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert.archive import open_member, open_zip
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import canonical, channels_last, is_image_shape
from tiphys.dataio.convert.limits import EPISODE_STEPS, FIELDS, JSON_BYTES, RECORD_BYTES, check_shape, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode

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
}
_IMAGE_NAME = re.compile(r"(img|image|rgb|camera)")
_PIECE_BYTES = 512 << 20  # approximate size of a piece, decoded


class Zarr(Converter):
    name = "zarr"

    @classmethod
    def recognise(cls, source: Source) -> float:
        if source.single:
            return 0.9 if source.single.endswith(".zarr.zip") else 0.0
        return 1.0 if any(re.search(r"(^|/)meta/episode_ends/(\.zarray|zarr\.json)$", p) for p in source.files) else 0.0

    @cached_property
    def _files(self) -> _Files:
        return _Files(self.source)

    @cached_property
    def _root(self) -> str:
        """The folder of the Zarr group; '' if it is the source itself."""
        found = [
            m.group(1)
            for p in self._files.names
            if (m := re.fullmatch(r"(.*?)/?meta/episode_ends/(?:\.zarray|zarr\.json)", p))
        ]
        if len(found) != 1:
            raise DataError(
                f"{self.source.url}: there are {len(found)} arrays meta/episode_ends, but one replay buffer is expected"
            )
        return found[0]

    def _array(self, name: str) -> Any:
        import zarr

        where = f"{self.source.url}, {name}"
        path = f"{self._root}/{name}" if self._root else name
        _check_metadata(self._files, path, where)
        try:
            return zarr.open_array(_store(self._files), path=path, mode="r")
        except DataError:
            raise
        except Exception as error:  # zarr raises whatever its metadata parsers and codecs do
            raise DataError(f"{where}: not a readable Zarr array ({type(error).__name__}: {error})") from None

    def _read(self, array: Any, start: int, stop: int, where: str) -> np.ndarray:
        check_shape((stop - start, *array.shape[1:]), array.dtype.itemsize, where)
        try:
            value = np.asarray(array[start:stop])
        except DataError:
            raise
        except Exception as error:  # as above
            raise DataError(f"{where}: cannot be decoded ({type(error).__name__}: {error})") from None
        return value.astype(value.dtype.newbyteorder("="), copy=False)

    @cached_property
    def _ends(self) -> np.ndarray:
        array = self._array("meta/episode_ends")
        where = f"{self.source.url}, meta/episode_ends"
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{where}: must be a one-dimensional array of integers")
        ends = checked_cast(self._read(array, 0, int(array.shape[0]), where), np.int64, where)
        if not len(ends) or bool(np.any(np.diff(ends, prepend=0) <= 0)):
            raise DataError(f"{where}: the row numbers must be positive and ascend")
        return ends

    @cached_property
    def _columns(self) -> dict[str, Any]:
        prefix = f"{self._root}/data/" if self._root else "data/"
        names = sorted(
            {
                m.group(1)
                for p in self._files.names
                if (m := re.fullmatch(re.escape(prefix) + r"(.+)/(?:\.zarray|zarr\.json)", p))
            }
        )
        if not names or len(names) > FIELDS:
            raise DataError(
                f"{self.source.url}: there are {len(names)} arrays under data/; 1 to {FIELDS:,} are expected"
            )
        arrays = {n: self._array(f"data/{n}") for n in names}
        rows = int(self._ends[-1])
        for name, array in arrays.items():
            if not array.shape or array.shape[0] < rows:
                raise DataError(
                    f"{self.source.url}, data/{name}: shape {array.shape} has fewer than the {rows:,} rows of episode_ends"
                )
        return arrays

    def pieces(self) -> list[Piece]:
        row = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self._columns.values())
        bounds = [0, *self._ends.tolist()]
        out: list[Piece] = []
        first = 0
        for number in range(1, len(bounds)):
            if (bounds[number] - bounds[first]) * row >= _PIECE_BYTES or number == len(bounds) - 1:
                out.append(
                    Piece(f"{len(out):06d}", {"first": first, "bounds": bounds[first : number + 1], "files": []})
                )
                first = number
        return out

    def versions(self, piece: Piece) -> list[str]:
        return self._files.versions()

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        first, bounds = piece.data["first"], piece.data["bounds"]

        def where(i: int) -> str:
            return f"{self.source.url}, episode {first + i} (rows {bounds[i]}–{bounds[i + 1]})"

        yield from read_each(
            range(len(bounds) - 1), lambda i: self._episode(first + i, bounds[i], bounds[i + 1], where(i)), where, start
        )

    def _episode(self, number: int, begin: int, end: int, where: str) -> Episode:
        if end - begin > EPISODE_STEPS:
            raise DataError(f"{where}: {end - begin:,} steps; the limit is {EPISODE_STEPS:,}")
        fields = {}
        for key, array in self._columns.items():
            name = canonical(key.replace("/", "."))
            if name.partition(".")[0] not in ("observation", "action", "reward", "terminated", "truncated"):
                name = f"observation.{name}"
            value = self._read(array, begin, end, f"{where}, data/{key}")
            if name in ("reward", "terminated", "truncated"):
                value = value.reshape(end - begin)
            if name in ("terminated", "truncated"):
                value = checked_flags(value, f"{where}, data/{key}")
            fields[name] = channels_last(_as_image(value, key, f"{where}, data/{key}"))
        return Episode(f"{self.source.name}/{number:06d}", self.source.name, fields, end - begin)


def _as_image(value: np.ndarray, key: str, where: str) -> np.ndarray:
    """Images stored as floats from 0 to 255 (as in PushT) as uint8; other values as they are.

    Raises DataError if an image holds other values, such as fractions.
    """
    if value.dtype.kind != "f" or value.ndim != 4 or not is_image_shape(value.shape[1:]) or not _IMAGE_NAME.search(key):
        return value
    return checked_cast(value, np.uint8, where, "images of floats must hold whole numbers from 0 to 255")


def _check_metadata(files: _Files, path: str, where: str) -> None:
    """Raises DataError for objects, unknown codecs and too large chunks, before the zarr library sees them."""
    zarr2 = files.get(f"{path}/.zarray")
    data = zarr2 if zarr2 is not None else files.get(f"{path}/zarr.json")
    metadata = parse_json(data or b"", where)
    try:
        if zarr2 is not None:
            dtype, shape, chunks = np.dtype(metadata["dtype"]), metadata["shape"], metadata["chunks"]
            codecs = [c["id"] for c in [metadata.get("compressor"), *(metadata.get("filters") or [])] if c is not None]
        else:
            dtype, shape = np.dtype(str(metadata["data_type"])), metadata["shape"]
            chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            codecs = list(_codec_names(metadata["codecs"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: its metadata cannot be read ({type(error).__name__}: {error})") from None
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: dtype {dtype} cannot be read")
    unknown = sorted({str(c) for c in codecs} - _CODECS)
    if unknown:
        raise DataError(f"{where}: the codec {unknown[0]!r} is not allowed")
    check_shape(shape, 0, where)
    check_shape(chunks, dtype.itemsize, f"{where}, a chunk", RECORD_BYTES)
    if len(shape) != len(chunks) or 0 in chunks:
        raise DataError(f"{where}: chunks {chunks} do not divide the shape {shape}")


def _codec_names(codecs: Any) -> Iterator[str]:
    """The names of Zarr 3 codecs, including those inside shards."""
    for codec in codecs:
        name = codec if isinstance(codec, str) else codec["name"]
        yield str(name).removeprefix("numcodecs.")
        if isinstance(codec, dict) and isinstance(codec.get("configuration"), dict):
            for key in ("codecs", "index_codecs"):
                yield from _codec_names(codec["configuration"].get(key) or [])


class _Files:
    """The files of a folder, or of one zip, which stays open."""

    def __init__(self, source: Source):
        self._source, self._stack, self._zip = source, ExitStack(), None
        self.names = source.files
        if source.single:
            stream = self._stack.enter_context(source.open(source.single))
            self._zip = self._stack.enter_context(open_zip(stream, source.url))
            self.names = self._zip.namelist()
        self._known = frozenset(self.names)

    def get(self, path: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        if path not in self._known:
            return None
        if self._zip is not None:
            with open_member(self._zip, path, self._source.url, RECORD_BYTES) as (stream, size):
                return stream.read(size)
        return self._source.read(path, JSON_BYTES if path.endswith((".zarray", "zarr.json")) else RECORD_BYTES)

    def versions(self) -> list[str]:
        names = (
            [self._source.single]
            if self._source.single
            else [p for p in self.names if p.endswith((".zarray", "zarr.json"))]
        )
        return [self._source.version(n) for n in names]


def _store(files: _Files) -> Any:
    """The files as a read-only Store of the zarr library, which is imported only here, when it is needed."""
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    class Files(Store):
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

    make: Callable[[], Any] = Files
    return make()
