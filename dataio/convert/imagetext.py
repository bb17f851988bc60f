"""WebDataset tars of images and captions, rewritten with the image and the text as fields. `tiphys index` uses such
tars as they are.

A sample is a run of members with the same key (the path up to the first dot of its last part): an image (`.jpg`,
`.jpeg`, `.png`, `.webp`) and a caption (`.txt`, `.text`, `.caption`, or `caption` or `text` in a `.json`). Members are
read, never extracted. Links, devices and sparse files are refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, BinaryIO, cast

import numpy as np

from tiphys.dataio.convert.converter import Converter, Item, Piece, attempt
from tiphys.dataio.convert.infer import field_spec, texts
from tiphys.dataio.convert.limits import RECORD_BYTES, TEXT_BYTES, BoundedInflate, check_size, decode_image, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format.tar import CheckedHeader

_TARS = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "text", "caption")


class ImageText(Converter):
    name = "webdataset"
    archives = _TARS

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in source.files:
            if path.endswith(_TARS):
                with source.open(path) as stream:
                    for _, members in _samples(stream, path, source.where(path)):
                        return 0.7 if set(members) & set(_IMAGES) and set(members) & {*_TEXTS, "json"} else 0.0
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
                    yield attempt(partial(self._read, members, f"{path}/{key}", here), here)

    def _read(self, members: dict[str, bytes], identity: str, where: str) -> Episode:
        kind = next((e for e in _IMAGES if e in members), None)
        if kind is None:
            raise DataError(f"{where}: has no image ({', '.join(_IMAGES)})")
        image = decode_image(members[kind], where)
        caption = next((e for e in (*_TEXTS, "json") if e in members), "")
        for extension in sorted(members.keys() - {kind, caption}):
            self.leave_out(f"members .{extension}", f"a sample has one image and one text: .{kind} and .{caption}")
        if image.dtype != np.uint8:
            raise DataError(f"{where}: the image has 16 bits per channel; only 8 are supported")
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
        fields: dict[str, Any] = {"image": image[None], "text": _caption(members, where)}
        return Episode(f"{self.source.name}/{identity}", self.source.name, fields, 0)


def _caption(members: dict[str, bytes], where: str) -> str:
    for extension in _TEXTS:
        if extension in members:
            check_size(len(members[extension]), TEXT_BYTES, where, "the caption")
            return str(texts([members[extension]], where)[0])
    if "json" in members:
        content = parse_json(members["json"], f"{where}, .json")
        for key in ("caption", "text"):
            if isinstance(content, dict) and isinstance(content.get(key), str):
                return str(texts([content[key]], where)[0])
    raise DataError(f"{where}: has no caption ({', '.join(_TEXTS)}, or `caption` or `text` in .json)")


def _samples(stream: BinaryIO, path: str, where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of each sample, in order."""
    key, size = "", 0
    members: dict[str, bytes] = {}
    for name, data in _members(stream, path, where):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        member_key = folder + slash + stem
        if member_key != key and members:
            yield key, members
            members, size = {}, 0
        key = member_key
        extension = extension.lower()
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
