"""Reads the members of a tar that is not trusted: only regular files, no compression, nothing is extracted, sizes are checked."""

from __future__ import annotations

import io
import re
import tarfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError

MAX_MEMBER = 8 << 30  # most bytes of a member
MAX_HEADER = 1 << 16  # most bytes of the header of a .npy member
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # key and extension, as WebDataset splits a name


class Member(NamedTuple):
    """A file of a tar."""

    name: str
    header: int  # byte at which its first header block begins
    offset: int  # byte at which its content begins
    size: int  # bytes of its content


class Sample(NamedTuple):
    """Consecutive members with the same key."""

    key: str
    members: dict[str, Member]  # by extension, in lower case
    begin: int  # first byte
    end: int  # byte after the padding of the last member


class CheckedHeader(tarfile.TarInfo):
    """A header whose extensions are short. Those of sparse files are not parsed, because sparse files are refused."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        where = f"byte {self.offset}"
        if self.size < 0:
            raise DataError(f"{where}: a member claims {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise DataError(f"{where}: {self.name!r} is a sparse file; only regular files are allowed")
        if self.type in _EXTENSIONS:
            if self.size > MAX_HEADER:
                raise DataError(f"{where}: an extended header has {self.size} bytes; at most {MAX_HEADER} are read")
            file: Any = tar.fileobj
            body = file.read(self._block(self.size))  # type: ignore[attr-defined]
            _check_extension(body[: self.size], self.type, where)
            tar.fileobj = _Unread(body, file)
            try:
                return super()._proc_member(tar)  # type: ignore[misc, no-any-return]
            finally:
                tar.fileobj = file
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]


class _Unread(io.RawIOBase):
    """A stream of which some bytes were read already. It cannot seek, as the stream may be a pipe."""

    def __init__(self, data: bytes, file: Any) -> None:
        self._data, self._file = data, file

    def read(self, size: int = -1) -> bytes:
        head, self._data = self._data[:size], self._data[size:]
        return head if len(head) == size else head + self._file.read(size - len(head))

    def tell(self) -> int:
        return int(self._file.tell()) - len(self._data)


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _check_extension(body: bytes, kind: bytes, where: str) -> None:
    """Raises DataError if the records `LENGTH KEY=VALUE` of a PAX header are damaged, or describe a sparse file or a size that is
    none. (tarfile searches for a length with an expression that takes very long for a body of digits.)"""
    at = 0
    while kind in _PAX and at < len(body) and body[at]:
        space = body.find(b" ", at, at + 8)
        length = body[at:space] if space > at else b""
        record = body[space + 1 : at + int(length)] if length.isdigit() else b""
        key, equals, value = record.partition(b"=")
        if not equals or not key or not value.endswith(b"\n") or at + int(length) > len(body):
            raise DataError(f"{where}: the extended header is damaged")
        if key.startswith(b"GNU.sparse") or (key == b"size" and not (value[:-1].isdigit() and len(value) < 20)):
            raise DataError(
                f"{where}: the extended header has {key.decode(errors='replace')} = {value[:40]!r}, which is not read"
            )
        at += int(length)


def members(file: Path) -> Iterator[Member]:
    """The files of an uncompressed tar, in order. Raises DataError if the tar is damaged, or has something else than files."""
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:", tarinfo=CheckedHeader) as tar:
            behind = -1
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= behind:
                    raise DataError(f"byte {info.offset}: {info.name!r} claims {info.size} bytes")
                behind = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(
                        f"byte {info.offset}: {info.name!r} is a link or a special file; only regular files are allowed"
                    )
                if info.size > MAX_MEMBER or info.offset_data + info.size > size:
                    raise DataError(
                        f"byte {info.offset}: {info.name!r} claims {info.size} bytes: more than the tar has, or more than "
                        f"{MAX_MEMBER}"
                    )
                yield Member(info.name, info.offset, info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the tar is cut off or damaged: {error}") from None
    with open(file, "rb") as stream:
        stream.seek(end)
        tail = stream.read(1024)
    if tail.strip(b"\0"):  # tarfile treats a damaged header as the end
        raise DataError(f"byte {end}: the header of the next member is damaged")
    if len(tail) < 1024:
        raise DataError(f"byte {end}: the end-of-archive marker is missing; the tar is cut off")


def split_name(name: str) -> tuple[str, str] | None:
    """(key of its sample, extension in lower case) of a member, as WebDataset splits its name: at the first dot of the last part.

    None if it belongs to no sample: it has no extension, or macOS added it (`._0.png`, `.DS_Store`, `__MACOSX/…`).
    """
    match = _SAMPLE.fullmatch(name)
    if not match or "__MACOSX" in match[1].split("/")[:-1]:
        return None
    return match[1], match[2].lower()


def samples(file: Path) -> Iterator[Sample]:
    """The samples of a WebDataset tar: consecutive members with the same key. Members without an extension are skipped."""
    key, found = "", dict[str, Member]()
    for member in members(file):
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key and found:
            yield _sample(key, found)
            found = {}
        key, extension = split
        if extension in found:
            raise DataError(f"byte {member.header}: {member.name!r} appears twice in one sample")
        found[extension] = member
    if found:
        yield _sample(key, found)


def _sample(key: str, found: dict[str, Member]) -> Sample:
    last = max(found.values(), key=lambda m: m.offset)
    end = last.offset + -(-last.size // 512) * 512
    return Sample(key, found, min(m.header for m in found.values()), end)


def npy_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, bytes of the header) of a `.npy` member, from its first bytes. Raises DataError if it is not valid."""
    stream = io.BytesIO(data[: MAX_HEADER + 16])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, tokenize.TokenError) as error:
        raise DataError(f"the header of the .npy member is damaged: {error}") from None
    if fortran or dtype.hasobject:
        raise DataError("the .npy member is in Fortran order or holds Python objects; neither is read")
    return dtype, shape, stream.tell()
