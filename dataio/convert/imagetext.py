"""WebDataset tars of images and captions, rewritten with the image and the text as fields. `tiphys index` uses such
tars as they are.

A sample is a run of members with the same key; `tiphys.dataio.format.captions` tells which of them are its picture and
its caption. Members are read, never extracted. Links, devices and sparse files are refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from typing import Any, BinaryIO, cast

import numpy as np

from tiphys.dataio.convert.converter import Converter, Item, Piece, attempt
from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.limits import RECORD_BYTES, BoundedInflate, check_size, decode_image, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format import captions
from tiphys.dataio.format.tar import CheckedHeader, split_name

_TARS = (".tar", ".tar.gz", ".tgz")
_INSPECTED = 64  # samples of a tar from which the format is recognised


class ImageText(Converter):
    name = "webdataset"
    archives = _TARS

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in [p for p in source.files if p.endswith(_TARS)][:4]:
            with source.open(path) as stream:
                for _, members in islice(_samples(stream, path, source.where(path)), _INSPECTED):
                    if captions.has_picture_and_caption(members):
                        return 0.7
        return 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = [p for p in self.source.files if p.endswith(_TARS)]
        if not found:
            raise DataError(f"{self.source.url}: has no .tar, .tar.gz or .tgz file")
        return found

    def tasks(self) -> list[TaskSpec]:
        image = field_spec("image", np.uint8, (0, 0, 3), role="observation", modality="image")
        return [TaskSpec(self.source.name, (image, field_spec("text", "str", (), per="episode")))]

    def pieces(self) -> list[Piece]:
        return [Piece(f"{i:06d}", {"files": [path]}) for i, path in enumerate(self._files)]

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        path = piece.data["files"][0]
        where = self.source.where(path)
        with self.source.open(path) as stream:
            for number, (key, members) in enumerate(_samples(stream, path, where)):
                if number >= start:
                    here = f"{where}, sample {key!r}"
                    yield attempt(partial(self._read, key, members, path, here), here)

    def _read(self, key: str, members: dict[str, bytes], path: str, where: str) -> Episode:
        try:
            identity = f"{self.source.name}/{path}/{captions.check_key(key)}"
            picture = captions.picture_extension(members)
            text, source = captions.caption(members, picture, members.__getitem__)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        reason = f"a sample has one image and one text: .{picture} and .{source}"
        for extension in sorted(members.keys() - {picture, source}):
            self.leave_out(f"members .{extension}", reason)
        for name in _keys(members[source]) if source.rpartition(".")[2] == "json" else ():
            if name not in captions.KEYS:
                self.leave_out(f"{name} in .{source}", reason)
        image = decode_image(members[picture], where)
        if image.dtype != np.uint8:
            raise DataError(f"{where}: the image has 16 bits per channel; only 8 are supported")
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
        fields: dict[str, Any] = {"image": image[None], "text": text}
        return Episode(identity, self.source.name, fields, 0)


def _keys(data: bytes) -> list[str]:
    content = parse_json(data, "")
    return sorted(content) if isinstance(content, dict) else []


def _samples(stream: BinaryIO, path: str, where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of each sample, in order."""
    key, size = "", 0
    members: dict[str, bytes] = {}
    for name, data in _members(stream, path, where):
        split = split_name(name)
        if split is None:
            continue
        if split[0] != key and members:
            yield key, members
            members, size = {}, 0
        key, extension = split
        size = check_size(size + len(data), RECORD_BYTES, f"{where}, sample {key!r}")
        if extension in members:
            raise DataError(f"{where}: sample {key!r} has two .{extension} members")
        members[extension] = data
    if members:
        yield key, members


def _members(stream: BinaryIO, path: str, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each plain file of a tar, read forward."""
    if not path.endswith(".tar"):
        stream = cast(BinaryIO, io.BufferedReader(BoundedInflate(stream, where)))
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 18, errorlevel=2, tarinfo=CheckedHeader) as tar:
            for member in tar:
                cast(Any, tar).members = []  # otherwise tarfile keeps every header
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{where}: member {member.name!r} is not a plain file (a link, a device or a sparse file)"
                    )
                check_size(member.size, RECORD_BYTES, f"{where}, {member.name}")
                content = tar.extractfile(member)
                data = content.read(member.size) if content is not None else b""
                if len(data) != member.size:
                    raise DataError(
                        f"{where}, {member.name}: {len(data):,} of {member.size:,} bytes; the tar is truncated"
                    )
                yield member.name, data
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the tar is damaged ({error})") from None
