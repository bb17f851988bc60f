"""Converts a SentencePiece model to the JSON of the `tokenizers` library, so that a policy needs no other library for text.

The file is a protocol buffer (sentencepiece_model.proto, messages ModelProto, SentencePiece, TrainerSpec, NormalizerSpec). It
may come from an untrusted source: sizes are bounded, and nothing in it is run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tiphys.dataio.episode import DataError

_LARGEST = 64 << 20
_MOST_PIECES = 1 << 20
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"
_UNREACHABLE = "\ufdd0"  # a noncharacter: it is in no text, so no text becomes a control id


@dataclass(frozen=True)
class _Model:
    pieces: list[tuple[str, float, int]]  # text, score, type
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    characters: bytes = b""  # the precompiled map of the normaliser
    prefix: bool = True  # a space is put before the text
    trims: bool = True  # several spaces become one, and those at both ends are removed


def to_tokenizer(data: bytes, name: str) -> str:
    """The tokenizer's JSON. Raises DataError if the file is not a SentencePiece model of type unigram or BPE."""
    from tokenizers import AddedToken, Tokenizer, models

    if len(data) > _LARGEST:
        raise DataError(f"{name}: the file has {len(data)} bytes; a SentencePiece model may have at most {_LARGEST}")
    try:
        model = _parse(data)
    except (IndexError, ValueError, struct.error, TypeError, AttributeError) as error:
        raise DataError(f"{name}: not a SentencePiece model: {error}") from error
    if model.kind not in (_UNIGRAM, _BPE):
        raise DataError(
            f"{name}: a SentencePiece model of type {model.kind}, whose pieces are words or characters, cannot be used; train a "
            "unigram or BPE model"
        )
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise DataError(f"{name}: not a SentencePiece model: it has no unknown piece")
    names = [_UNREACHABLE + text if kind in (_UNKNOWN, _CONTROL, _UNUSED) else text for text, _, kind in model.pieces]
    if model.kind == _UNIGRAM:
        scored = [(text, score) for text, (_, score, _) in zip(names, model.pieces, strict=True)]
        core: Any = models.Unigram(scored, unk_id=unknown, byte_fallback=model.byte_fallback)
    else:
        ids = {text: i for i, text in enumerate(names)}
        core = models.BPE(
            ids, _merges(model, ids), unk_token=names[unknown], fuse_unk=True, byte_fallback=model.byte_fallback
        )
    tokenizer = Tokenizer(core)
    _surround(tokenizer, model)
    defined = [text for text, _, kind in model.pieces if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])
    return str(tokenizer.to_str())


def _surround(tokenizer: Any, model: _Model) -> None:
    """Adds the normaliser, the splitting at spaces, and the decoder."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[Any] = [normalizers.Precompiled(model.characters)] if model.characters else []
    if model.trims:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    back: list[Any] = [decoders.ByteFallback()] if model.byte_fallback else []
    back += [decoders.Replace(_SPACE, " "), decoders.Fuse()]
    back += [decoders.Strip(" ", 1, 0)] if model.prefix else []
    tokenizer.decoder = decoders.Sequence(back)


def _merges(model: _Model, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which they were merged. The later a piece was merged, the lower its score."""
    found = []
    for text, score, kind in model.pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _parse(data: bytes) -> _Model:
    pieces: list[tuple[str, float, int]] = []
    more: dict[str, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
            if len(pieces) > _MOST_PIECES:
                raise ValueError(f"it has more than {_MOST_PIECES} pieces")
        elif number == 2:
            trainer = dict(_fields(value))
            more |= {"kind": trainer.get(3, _UNIGRAM), "byte_fallback": bool(trainer.get(35, 0))}
        elif number == 3:
            spec = dict(_fields(value))
            more |= {"characters": spec.get(2, b""), "prefix": bool(spec.get(3, 1)), "trims": bool(spec.get(4, 1))}
    if not pieces:
        raise ValueError("it has no pieces")
    return _Model(pieces, **more)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message. A varint gives an int, anything else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Any
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at}: wire type {wire} does not exist")
        if at + size > len(data):
            raise ValueError(f"byte {at}: a field of {size} bytes goes past the end of the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"byte {at}: a number has more than ten bytes")
