"""Pictures and captions in WebDataset tars of others: the one rule for `tiphys index` and `tiphys convert`.

A sample consists of the members with the same key, see `tiphys.dataio.format.tar.split_name`. Its picture is the member
whose extension is, or ends with, one of IMAGES: `0.png`, `0.v1.png`. In the same way, its caption is the member of one of
CAPTIONS, or else a key of the `.json` member.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.sample import MAX_TEXT

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "caption", "text")
KEYS = ("caption", "text", "prompt", "description")  # keys of a .json member that may hold a caption; the first counts
_NOT_UTF8 = "save it as UTF-8, or leave it out"


class NoCaption(DataError):
    """The sample has no caption, or an empty one. Its picture may still be of use."""


def picture_extension(extensions: Collection[str]) -> str:
    """The extension of the member that holds the picture. Raises DataError if there is none, or if there are several."""
    found = _matching(extensions, IMAGES)
    if not found:
        raise DataError(
            f"it has no picture ({', '.join(IMAGES)}), only {', '.join('.' + e for e in extensions)}; the members of a sample "
            "must follow each other in the tar"
        )
    if len(found) > 1:
        raise DataError(
            f"it has several pictures ({', '.join('.' + e for e in found)}): the name of a sample ends at its first dot, "
            "so write the tar again without further dots in the names"
        )
    return found[0]


def caption(extensions: Collection[str], picture: str, read: Callable[[str], bytes]) -> tuple[str, str]:
    """The caption of a sample, and the extension of the member that holds it.

    Parameters
    ----------
    extensions : Collection[str]
        Of its members.
    picture : str
        Extension of its picture. The caption of `v1.png` is in `v1.txt`, if there is one.
    read : Callable[[str], bytes]
        The content of the member with this extension.

    Raises
    ------
    NoCaption
        If there is no text in any of the places that can hold one.
    DataError
        If the text is not UTF-8 or too long, or the `.json` is damaged.
    """
    prefix = picture.rpartition(".")[0]
    own = [f"{prefix}.{e}" for e in CAPTIONS if prefix and f"{prefix}.{e}" in extensions]
    for extension in own or _matching(extensions, CAPTIONS):
        text = clean_text(decode_text(read(extension), f"its .{extension}"), f"its .{extension}").strip()
        if text:
            return text, extension
    own = [f"{prefix}.json"] if prefix and f"{prefix}.json" in extensions else []
    for extension in own or _matching(extensions, ("json",)):
        text = _caption_in_json(read(extension), f"its .{extension}")
        if text:
            return text, extension
    raise NoCaption(f"it has no caption ({', '.join('.' + e for e in CAPTIONS)}, or {', '.join(KEYS)} in .json)")


def has_picture_and_caption(extensions: Collection[str]) -> bool:
    """Whether members with these extensions can be a captioned picture. A sample that ShardWriter wrote is none."""
    both = _matching(extensions, IMAGES) and _matching(extensions, (*CAPTIONS, "json"))
    return bool(both) and "steps.npy" not in extensions


def decode_text(data: bytes, where: str) -> str:
    """The bytes as text. Raises DataError with the first byte that is not UTF-8, or if there are over MAX_TEXT bytes."""
    if len(data) > MAX_TEXT:
        raise DataError(f"{where} has {len(data):,} bytes; at most {MAX_TEXT:,} are read")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{where} is UTF-16, not UTF-8; {_NOT_UTF8}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02X}; {_NOT_UTF8}") from None


def clean_text(text: str, where: str) -> str:
    """The text without a byte order mark and without line ends around it; line ends inside become a single newline.

    Raises DataError if it contains a NUL or half of a surrogate pair, or is too long.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    if "\0" in text:
        raise DataError(f"{where} contains a NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(f"{where} contains half of a surrogate pair, at character {error.start}") from None
    if size > MAX_TEXT:
        raise DataError(f"{where} has {size:,} bytes; at most {MAX_TEXT:,} are read")
    return text


def check_key(key: str) -> str:
    """The key of a sample. Raises DataError if it is not UTF-8."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise DataError("its name in the tar is not UTF-8; write the tar again with UTF-8 names") from None
    return key


def _matching(extensions: Collection[str], endings: tuple[str, ...]) -> list[str]:
    """The extensions that are one of `endings` (the first of them), or else all that end with one."""
    exact = [e for e in endings if e in extensions]
    return exact[:1] or [e for e in extensions if e.rpartition(".")[2] in endings]


def _caption_in_json(data: bytes, where: str) -> str:
    if len(data) > MAX_TEXT:
        raise DataError(f"{where} has {len(data):,} bytes; at most {MAX_TEXT:,} are read")
    try:
        content = json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); {_NOT_UTF8}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error})") from None
    values = (content.get(key) for key in KEYS) if isinstance(content, dict) else ()
    texts = (clean_text(v, where).strip() for v in values if isinstance(v, str))
    return next((t for t in texts if t), "")
