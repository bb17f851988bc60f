"""Zarr replay buffers of Diffusion Policy: arrays `data/NAME` over all steps, cut at `meta/episode_ends`.

https://github.com/real-stanford/diffusion_policy, `replay_buffer.py`. A folder or a `.zarr.zip`, Zarr 2 or 3. Only codecs
that decode bytes are allowed: no pickles, no objects. If an array has the metadata of both versions, version 3 counts, as
in the zarr library.

Instructions are texts of an episode. They come from `meta/NAME` with one text for each episode, and from attributes of the
groups. Other values of `meta/` with one value for each episode go into the episode's `info`.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tiphys.dataio.convert.archive import open_member, open_zip
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import canonical, channels_last, is_image_shape, is_text_name, texts
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
    "vlen-utf8",
}
_IMAGE_NAME = re.compile(r"(img|image|rgb|camera)")
_METADATA = (".zarray", "zarr.json", ".zattrs")
_PIECE_BYTES = 512 << 20  # approximate size of a piece, decoded


class Zarr(Converter):
    name = "zarr"
    archives = (".zip",)

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
        pattern = re.compile(r"(.*?)/?meta/episode_ends/(?:\.zarray|zarr\.json)")
        found = list({m.group(1) for p in self._files.names if (m := pattern.fullmatch(p))})
        if len(found) != 1:
            raise DataError(
                f"{self.source.url}: there are {len(found)} arrays meta/episode_ends, but one replay buffer is expected"
            )
        return found[0]

    def _path(self, name: str) -> str:
        return "/".join(p for p in (self._root, name) if p)

    def _arrays(self, folder: str) -> list[str]:
        """The names of the arrays below a folder of the group."""
        prefix = f"{self._path(folder)}/".removeprefix("/")
        pattern = re.compile(re.escape(prefix) + r"(.+)/(?:\.zarray|zarr\.json)")
        found = {m.group(1) for p in self._files.names if (m := pattern.fullmatch(p))}
        return sorted(n for n in found if not _is_group(self._files, prefix + n, self.source.url))

    def _array(self, name: str) -> Any:
        import zarr

        where = f"{self.source.url}, {name}"
        path = self._path(name)
        version, metadata = _metadata(self._files, path, where)
        _check_metadata(version, metadata, where)
        try:
            return zarr.open_array(_store(self._files), path=path, mode="r", zarr_format=version)
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
        if value.dtype.kind in "UTO":
            return texts(value.reshape(-1).tolist(), where).reshape(value.shape)
        return value.astype(value.dtype.newbyteorder("="), copy=False)

    @cached_property
    def _ends(self) -> np.ndarray:
        array = self._array("meta/episode_ends")
        where = f"{self.source.url}, meta/episode_ends"
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{where}: must be a one-dimensional array of integers")
        ends = self._read(array, 0, int(array.shape[0]), where).astype(np.int64)
        if not len(ends) or bool(np.any(np.diff(ends, prepend=0) <= 0)):
            raise DataError(f"{where}: the row numbers must be positive and ascend")
        return ends

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name in the source -> field: `NAME` of arrays in data/, `meta/NAME` of texts by episode, `@NAME` of attributes."""
        usual = {}
        for key in self._arrays("data"):
            name = canonical(key.replace("/", "."))
            _, metadata = _metadata(self._files, self._path(f"data/{key}"), f"{self.source.url}, data/{key}")
            keep = name.partition(".")[0] in ("observation", "action", "reward", "terminated", "truncated")
            if not keep and not (_holds_texts(metadata) and is_text_name(key)):
                name = f"observation.{name}"
            usual[key] = name
        usual |= {f"meta/{k}": canonical(k) for k, v in self._by_episode.items() if _is_text(v) and is_text_name(k)}
        usual |= {source: canonical(source.rpartition("@")[2]) for source in self._texts}
        return self.names.fields(usual, self.source.url)

    @cached_property
    def _columns(self) -> dict[str, Any]:
        """Name in the source -> array with one row per step."""
        names = [n for n in self._arrays("data") if n in self._names]
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

    @cached_property
    def _by_episode(self) -> dict[str, np.ndarray]:
        """Arrays `meta/NAME` with one number or text for each episode."""
        out = {}
        for name in self._arrays("meta"):
            if name == "episode_ends":
                continue
            try:
                array = self._array(f"meta/{name}")
                if array.shape != (len(self._ends),):
                    raise DataError(f"shape {array.shape}, not one value for each of {len(self._ends):,} episodes")
                out[name] = self._read(array, 0, len(self._ends), f"{self.source.url}, meta/{name}")
            except DataError as error:
                self.leave_out(f"meta/{name}", str(error).removeprefix(f"{self.source.url}, meta/{name}: "))
        return out

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Texts in the attributes of the groups, which hold for all episodes: `@NAME` or `data@NAME` -> text."""
        out = {}
        for group in ("", "data", "meta"):
            for name, value in _attributes(self._files, self._path(group), self.source.url).items():
                if isinstance(value, str) and is_text_name(name):
                    out[f"{group}@{name}"] = value
                else:
                    self.leave_out(f"{group or 'root'}, attribute {name}", "describes the file, not an episode")
        for path in self._arrays(""):
            if path.partition("/")[0] not in ("data", "meta"):
                self.leave_out(path, "outside of data/ and meta/")
        return out

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
        fields: dict[str, Any] = {}
        for key, name in self._names.items():
            if key in self._texts:
                fields[name] = self._texts[key]
            elif key not in self._columns:
                fields[name] = str(self._by_episode[key.removeprefix("meta/")][number])
        for key, array in self._columns.items():
            name = self._names[key]
            value = self._read(array, begin, end, f"{where}, data/{key}")
            if name in ("reward", "terminated", "truncated"):
                value = value.reshape(end - begin)
            if name in ("terminated", "truncated"):
                value = value.astype(bool)
            fields[name] = channels_last(_as_image(value, key, f"{where}, data/{key}"))
        rest = {k: v[number] for k, v in self._by_episode.items() if not (_is_text(v) and is_text_name(k))}
        info = {k: v if isinstance(v, str) else v.item() for k, v in rest.items()}
        return Episode(f"{self.source.name}/{number:06d}", self.source.name, fields, end - begin, info=info)


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind == "T"


def _as_image(value: np.ndarray, key: str, where: str) -> np.ndarray:
    """Images stored as floats from 0 to 255 (as in PushT) as uint8; other values as they are.

    Raises DataError if an image holds other values, such as fractions.
    """
    if value.dtype.kind != "f" or value.ndim != 4 or not is_image_shape(value.shape[1:]) or not _IMAGE_NAME.search(key):
        return value
    with np.errstate(invalid="ignore"):
        out = value.astype(np.uint8)
    if not bool(np.all(out == value)):
        raise DataError(f"{where}: images of {value.dtype} must hold whole numbers from 0 to 255")
    return out


def _metadata(files: _Files, path: str, where: str) -> tuple[Literal[2, 3], dict[str, Any]]:
    """The version and the metadata of an array. Both the checks and the zarr library use this version."""
    version: Literal[2, 3] = 2 if (data := files.get(f"{path}/zarr.json")) is None else 3
    if data is None:
        data = files.get(f"{path}/.zarray")
    metadata = parse_json(data or b"", where)
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: its metadata is not a JSON object")
    return version, metadata


def _is_group(files: _Files, path: str, where: str) -> bool:
    """Whether the zarr.json in this folder describes a group of Zarr 3."""
    version, metadata = _metadata(files, path, where)
    return version == 3 and metadata.get("node_type") == "group"


def _attributes(files: _Files, path: str, where: str) -> dict[str, Any]:
    """The attributes of a group."""
    prefix = f"{path}/" if path else ""
    data = files.get(f"{prefix}zarr.json")
    attributes = parse_json(data if data is not None else files.get(f"{prefix}.zattrs") or b"{}", where)
    if data is not None:
        attributes = attributes.get("attributes") if isinstance(attributes, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def _holds_texts(metadata: dict[str, Any]) -> bool:
    """Whether the array holds texts: of variable length (vlen-utf8) or of a fixed length (UTF-32)."""
    if "data_type" in metadata:
        kind = metadata["data_type"]
        return kind == "string" or (isinstance(kind, dict) and kind.get("name") == "fixed_length_utf32")
    kind, filters = str(metadata.get("dtype")), metadata.get("filters")
    ids = [f.get("id") for f in filters if isinstance(f, dict)] if isinstance(filters, list) else []
    return kind[1:2] == "U" or (kind == "|O" and ids == ["vlen-utf8"])


def _check_metadata(version: int, metadata: dict[str, Any], where: str) -> None:
    """Raises DataError for objects, unknown codecs and too large chunks, before the zarr library sees them."""
    try:
        if version == 2:
            kind, shape, chunks = metadata["dtype"], metadata["shape"], metadata["chunks"]
            codecs = [c["id"] for c in [metadata.get("compressor"), *(metadata.get("filters") or [])] if c is not None]
        else:
            kind, shape = metadata["data_type"], metadata["shape"]
            chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            codecs = list(_codec_names(metadata["codecs"]))
        if _holds_texts(metadata):
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
