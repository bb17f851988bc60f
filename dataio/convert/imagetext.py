"""WebDataset tars of pictures and captions, re-written with pictures and texts as fields. `tiphys index` uses such tars
as they are.

A sample is the run of members with one key (the path up to the first dot of its last part): a `.jpg`, `.png` or `.webp`
and a `.txt`, `.caption` or `.json` (its `caption` or `text`). Members are read, never extracted; links and anything but
plain files are refused.
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

_TARS = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "text", "caption")
_SAMPLE_BYTES = RECORD_BYTES


class ImageText(Converter):
    name = "webdataset"

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in source.files:
            if path.endswith(_TARS):
                with source.open(path) as stream:
                    for _, members in _samples(stream, path, source.where(path)):
                        return 0.7 if set(members) & set(_PICTURES) and set(members) & {*_TEXTS, "json"} else 0.0
        return 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = [p for p in self.source.files if p.endswith(_TARS)]
        if not found:
            raise DataError(f"{self.source.url}: no .tar")
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
        picture = next((members[e] for e in _PICTURES if e in members), None)
        if picture is None:
            raise DataError(f"{where}: has no picture ({', '.join(_PICTURES)})")
        image = decode_image(picture, where)
        if image.dtype != np.uint8:
            raise DataError(f"{where}: a picture of 16 bits a channel")
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
        fields: dict[str, Any] = {"image": image[None], "text": _caption(members, where)}
        return Episode(f"{self.source.name}/{identity}", self.source.name, fields, 0)


def _caption(members: dict[str, bytes], where: str) -> str:
    for extension in _TEXTS:
        if extension in members:
            check_size(len(members[extension]), TEXT_BYTES, where, "the caption")
            return str(texts([members[extension]], where)[0])
    if "json" in members:
        about = parse_json(members["json"], f"{where}, .json")
        for key in ("caption", "text"):
            if isinstance(about, dict) and isinstance(about.get(key), str):
                return str(texts([about[key]], where)[0])
    raise DataError(f"{where}: has no caption ({', '.join(_TEXTS)}, or `caption` in .json)")


def _samples(stream: BinaryIO, path: str, where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension -> bytes) of each sample, in order."""
    key, size = "", 0
    members: dict[str, bytes] = {}
    for name, data in _members(stream, path, where):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        here = folder + slash + stem
        if here != key and members:
            yield key, members
            members, size = {}, 0
        key = here
        extension = extension.lower()
        size = check_size(size + len(data), _SAMPLE_BYTES, f"{where}, sample {key!r}")
        if extension in members:
            raise DataError(f"{where}: the sample {key!r} has two members .{extension}")
        members[extension] = data
    if members:
        yield key, members


def _members(stream: BinaryIO, path: str, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the plain files of a tar, read forward."""
    if not path.endswith(".tar"):
        stream = cast(BinaryIO, io.BufferedReader(BoundedInflate(stream, where)))
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 18, errorlevel=2) as tar:
            for member in tar:
                cast(Any, tar).members = []  # else tarfile keeps every header
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{where}: member {member.name!r} is no plain file (a link or device); it is not followed"
                    )
                check_size(member.size, RECORD_BYTES, f"{where}, {member.name}")
                content = tar.extractfile(member)
                data = content.read(member.size) if content is not None else b""
                if len(data) != member.size:
                    raise DataError(f"{where}, {member.name}: {len(data):,} of {member.size:,} bytes; the tar is cut")
                yield member.name, data
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the tar is damaged ({error})") from None
