"""Reading a tar that a stranger may have made: regular files only, nothing compressed, nothing extracted, every end checked."""

from __future__ import annotations

import io
import re
import tarfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiphys.dataio.episode import DataError

MAX_MEMBER = 8 << 30  # bytes
MAX_HEADER = 1 << 16  # bytes of the header of a .npy member
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # key and extension, as WebDataset splits a name


class Member(NamedTuple):
    """A file of a tar: where its first header block and its data begin."""

    name: str
    header: int
    offset: int
    size: int


class Sample(NamedTuple):
    """Consecutive members with one key, by extension."""

    key: str
    members: dict[str, Member]
    begin: int
    end: int  # with the last member's padding


def members(file: Path) -> Iterator[Member]:
    """The files of an uncompressed tar in order. Raises DataError at the first byte that is not as it should be."""
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(
                        f"byte {info.offset}: {info.name!r} is a link or a special file; only files are read"
                    )
                if info.size > MAX_MEMBER or info.offset_data + info.size > size:
                    raise DataError(f"byte {info.offset}: {info.name!r} claims {info.size} bytes: more than there are")
                yield Member(info.name, info.offset, info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the tar is cut off or damaged: {error}") from None
    with open(file, "rb") as stream:
        stream.seek(end)
        tail = stream.read(1024)
    if tail.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise DataError(f"byte {end}: the header of the next member is damaged")
    if len(tail) < 1024:
        raise DataError(f"byte {end}: the end-of-archive marker is missing; the tar is cut off")


def samples(file: Path) -> Iterator[Sample]:
    """The samples of a WebDataset tar: neighbouring members of one key. Members without an extension are passed over."""
    key, found = "", dict[str, Member]()
    for member in members(file):
        match = _SAMPLE.fullmatch(member.name)
        if not match:
            continue
        if match[1] != key and found:
            yield _sample(key, found)
            found = {}
        key, extension = match[1], match[2].lower()
        if extension in found:
            raise DataError(f"byte {member.header}: {member.name!r} stands twice in one sample")
        found[extension] = member
    if found:
        yield _sample(key, found)


def _sample(key: str, found: dict[str, Member]) -> Sample:
    last = max(found.values(), key=lambda m: m.offset)
    end = last.offset + -(-last.size // 512) * 512
    return Sample(key, found, min(m.header for m in found.values()), end)


def npy_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, bytes of the header) of a `.npy` member from its first bytes. Raises DataError."""
    stream = io.BytesIO(data[: MAX_HEADER + 16])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, tokenize.TokenError) as error:
        raise DataError(f"the header of the .npy member is damaged: {error}") from None
    if fortran or dtype.hasobject:
        raise DataError("the .npy member is in Fortran order or holds Python objects")
    return dtype, shape, stream.tell()
