"""Text: JSON lines, Parquet, and plain `.txt` or `.md` files. JSON lines and plain files may be gzipped.

A document is an episode without actions. In JSON lines and Parquet its text is the value called `text`, `content`,
`document` or `caption`; the option `column` names another one. A plain file of up to 1 MiB is one document. A larger
one holds a document for each paragraph (lines between blank lines). The option `split: file|paragraph|line` overrides
this.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any, BinaryIO, cast

from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt, group_files
from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.limits import TEXT_BYTES, BoundedInflate, parse_json
from tiphys.dataio.convert.parquet import batches, is_text, open_parquet, plain, values
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.format.captions import clean_text, decode_text

_PIECE_BYTES = 256 << 20  # approximate size of a piece
_TEXT_KEYS = ("text", "content", "document", "caption")
_MAX_SINGLE_DOCUMENT = 1 << 20  # bytes; a larger plain file holds several documents
_ONE_TEXT = "a document has one text; the option `column` chooses it"
_PLAIN = (".txt", ".md", ".txt.gz", ".md.gz")
_JSON = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


class Text(Converter):
    name = "text"
    archives = tuple(s for s in (*_PLAIN, *_JSON) if s.endswith(".gz"))
    options_known = frozenset({"column", "split"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        if any(p.endswith(".mp4") for p in source.files):
            return 0.0
        for path in source.files:
            if path.endswith(_JSON):
                with ExitStack() as stack:
                    lines = _lines(_open(source, path, stack), source.where(path))
                    value = parse_json(next(lines, b""), source.where(path))
                    return (
                        0.5
                        if isinstance(value, dict) and any(isinstance(value.get(c), str) for c in _TEXT_KEYS)
                        else 0.0
                    )
            if path.endswith(".parquet"):
                with open_parquet(source, path) as file:
                    return 0.5 if set(_TEXT_KEYS) & set(file.schema_arrow.names) else 0.0
        return 0.2 if any(p.endswith(_PLAIN) for p in source.files) else 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = [p for p in self.source.files if p.endswith((*_JSON, *_PLAIN, ".parquet"))]
        if not found:
            raise DataError(f"{self.source.url}: there is no file *.jsonl, *.ndjson, *.parquet, *.txt or *.md")
        if any(p.endswith((*_JSON, ".parquet")) for p in found):  # then plain files such as README.md are not data
            found = [p for p in found if not p.endswith(_PLAIN)]
        return found

    def tasks(self) -> list[TaskSpec]:
        return [TaskSpec(self.source.name, (field_spec("text", "str", (), per="episode"),))]

    def pieces(self) -> list[Piece]:
        return group_files(self.source, self._files, _PIECE_BYTES)

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        number = 0
        for path in piece.data["files"]:
            documents = self._documents(path)
            for line, document in enumerate(documents):
                if number >= start:
                    where = f"{self.source.where(path)}, document {line}"
                    yield document if isinstance(document, BadEpisode) else self._episode(path, line, document, where)
                number += 1

    def _episode(self, path: str, line: int, document: str | bytes, where: str) -> Item:
        def make() -> Episode:
            decoded = decode_text(document, where) if isinstance(document, bytes) else document
            text = clean_text(decoded, where)
            return Episode(f"{self.source.name}/{path}/{line:08d}", self.source.name, {"text": text}, 0)

        return attempt(make, where)

    def _documents(self, path: str) -> Iterator[str | bytes | BadEpisode]:
        if path.endswith(".parquet"):
            yield from self._parquet(path)
            return
        with ExitStack() as stack:
            stream = _open(self.source, path, stack)
            if path.endswith(_JSON):
                for number, line in enumerate(_lines(stream, self.source.where(path)), 1):
                    yield self._text_of_line(line, f"{self.source.where(path)}, line {number}")
                return
            split = self.options.get("split") or (
                "file" if self.source.size(path) <= _MAX_SINGLE_DOCUMENT else "paragraph"
            )
            if split == "file":
                data = stream.read(TEXT_BYTES + 1)
                if len(data) > TEXT_BYTES:
                    raise DataError(
                        f"{self.source.where(path)}: a document of over {TEXT_BYTES:,} bytes; set the option `split` to "
                        "paragraph or line"
                    )
                yield data
            elif split in ("line", "paragraph"):
                yield from _blocks(
                    _lines(stream, self.source.where(path), keep_blank=True), split == "line", self.source.where(path)
                )
            else:
                raise DataError(f"options: split {split!r} must be file, paragraph or line")

    def _text_of_line(self, line: bytes, where: str) -> str | BadEpisode:
        wanted = [self.options["column"]] if "column" in self.options else _TEXT_KEYS
        try:
            value = parse_json(line, where)
        except DataError as error:
            return BadEpisode(where, str(error))
        for column in wanted:
            if isinstance(value, dict) and isinstance(value.get(column), str):
                for other in sorted(value.keys() - {column}):
                    self.leave_out(str(other), _ONE_TEXT)
                return str(value[column])
        return BadEpisode(where, f"no text is called {' or '.join(wanted)}; set the option `column`")

    def _parquet(self, path: str) -> Iterator[str | BadEpisode]:
        import pyarrow as pa

        where = self.source.where(path)
        with open_parquet(self.source, path) as file:
            wanted = [self.options["column"]] if "column" in self.options else _TEXT_KEYS
            column = next((c for c in wanted if c in file.schema_arrow.names), None)
            if column is None:
                raise DataError(f"{where}: no column is called {' or '.join(wanted)}; set the option `column`")
            kind: Any = file.schema_arrow.field(column).type
            if not (is_text(kind) or pa.types.is_null(kind)):  # a column without any value has the type null
                raise DataError(f"{where}: column {column!r} holds {kind}, not texts")
            for other in [c for c in file.schema_arrow.names if c != column]:
                self.leave_out(other, _ONE_TEXT)
            row = 0
            for batch in batches(file, [column], where, 256):
                for value in values(plain(batch.column(0), f"{where}, {column}"), f"{where}, {column}"):
                    yield value if isinstance(value, str) else BadEpisode(f"{where}, row {row}", "the row has no text")
                    row += 1


def _open(source: Source, path: str, stack: ExitStack) -> BinaryIO:
    """The file as a stream, decompressed if it is gzipped."""
    stream = stack.enter_context(source.open(path))
    if path.endswith(".gz"):
        return cast(BinaryIO, stack.enter_context(io.BufferedReader(BoundedInflate(stream, source.where(path)))))
    return stream


def _lines(stream: BinaryIO, where: str, keep_blank: bool = False) -> Iterator[bytes]:
    """The lines of a file, one at a time. Raises DataError if one has more than TEXT_BYTES."""
    number = 0
    while line := stream.readline(TEXT_BYTES + 2):
        number += 1
        if len(line) > TEXT_BYTES:
            raise DataError(f"{where}, line {number}: the line has over {TEXT_BYTES:,} bytes")
        if keep_blank or line.strip():
            yield line.rstrip(b"\r\n")


def _blocks(lines: Iterator[bytes], by_line: bool, where: str) -> Iterator[bytes]:
    """Each line that is not blank, or (unless `by_line`) each paragraph of such lines."""
    block: list[bytes] = []
    size = 0
    for line in lines:
        if line.strip():
            block.append(line)
            size += len(line) + 1
            if size > TEXT_BYTES:
                raise DataError(f"{where}: a paragraph of over {TEXT_BYTES:,} bytes; set the option `split` to line")
        if block and (by_line or not line.strip()):
            yield b"\n".join(block)
            block, size = [], 0
    if block:
        yield b"\n".join(block)
