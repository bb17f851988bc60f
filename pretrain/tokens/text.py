"""Text <-> ids, with the tokenizer of a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.vocabulary import Vocabulary

_REMEMBER = 1 << 16  # number of texts whose ids are kept
_REMEMBERED_IDS = 1 << 24  # number of their ids
_LONGEST = 1 << 20  # characters that the tokenizer sees at once; a longer text is encoded in parts
_TOGETHER = 1 << 22  # characters of texts that are encoded together
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte that no piece holds


class TextTokenizer:
    """A picklable wrapper of the `tokenizers` library. It keeps the ids of texts, because instructions repeat.

    Special tokens in a text are read as plain text, so an untrusted text can never become a control id.
    """

    def __init__(self, definition: str):
        self.definition = definition
        self._ids: dict[str, np.ndarray] = {}
        self._kept = 0  # ids in it
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"definition": self.definition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["definition"])  # type: ignore[misc]

    @property
    def _native(self) -> Any:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = _safely(Tokenizer.from_str, self.definition)
            self._tokenizer.encode_special_tokens = True
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return self._tokenizer

    @property
    def size(self) -> int:
        return int(self._native.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Iterable[str], limit: int = 0) -> list[np.ndarray]:
        """The int32 ids of each text, at most `limit` of them (0: all)."""
        wanted = list(texts)
        known: dict[str, np.ndarray] = {}
        for group in _together(t for t in dict.fromkeys(wanted) if t not in self._ids):
            known.update(zip(group, self._encoded(group), strict=True))
        known.update((t, self._ids[t]) for t in wanted if t not in known)
        self._remember(known)
        return [known[t][:limit] if limit else known[t] for t in wanted]

    def count(self, texts: Sequence[str], limit: int = 0) -> list[int]:
        """The number of ids that `encode` gives for each text, without holding the ids of all texts at once."""
        return [len(ids) for group in _together(texts) for ids in self.encode(group, limit)]

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [[t[i : i + _LONGEST] for i in range(0, max(len(t), 1), _LONGEST)] for t in texts]
        found = _safely(self._native.encode_batch, [p for some in parts for p in some], add_special_tokens=False)
        ids = iter([np.asarray(e.ids, np.int32) for e in found])
        return [np.concatenate([next(ids) for _ in some]) for some in parts]

    def _remember(self, known: dict[str, np.ndarray]) -> None:
        new = {t: ids for t, ids in known.items() if t not in self._ids}
        more = sum(map(len, new.values()))
        if len(self._ids) + len(new) > _REMEMBER or self._kept + more > _REMEMBERED_IDS:
            self._ids, self._kept = {}, 0
        if len(new) <= _REMEMBER and more <= _REMEMBERED_IDS:
            self._ids.update(new)
            self._kept += more

    def sizes(self) -> np.ndarray:
        """int64 [ids]: how many bytes of text each id stands for."""
        decoder = json.dumps(json.loads(self.definition).get("decoder") or {}) if self.definition else ""
        by_byte = '"ByteLevel"' in decoder  # each character of a piece is one byte
        added = {t.content for t in self._native.get_added_tokens_decoder().values()} if self.definition else set()
        out = np.zeros(self.size if self.definition else 0, np.int64)
        for piece, number in self.pieces().items():
            if piece not in added and by_byte:
                out[number] = len(piece)
            elif _BYTE.fullmatch(piece):
                out[number] = 1
            else:
                out[number] = len(piece.replace("\u2581", " ").encode())
        return out

    def pieces(self) -> dict[str, int]:
        """Every piece of the tokenizer, as the library writes it, with its id; empty without a tokenizer."""
        return dict(self._native.get_vocab(with_added_tokens=True)) if self.definition else {}

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(_safely(self._native.decode, [int(i) for i in ids], skip_special_tokens=False))

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises DataError if the tokenizer of a file does not work, or has more ids than the vocabulary has for texts."""
        if not self.definition:
            return
        try:
            low, high = vocabulary.range("text")
        except KeyError as error:
            raise DataError(f"text tokenizer: {error.args[0]}") from None
        ids = self.encode(["a text"])[0]
        if self.size > high - low or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < high - low):
            raise DataError(f"text tokenizer: it has {self.size} ids, but the vocabulary has {high - low} for texts")


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in groups of about _TOGETHER characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _safely(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call the library. A tokenizer that is not valid raises plain Exception, or panics, which is no Exception."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"text tokenizer: {error}") from None
        raise
