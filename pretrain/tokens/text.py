"""Text <-> ids, with the tokenizer of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.vocabulary import Vocabulary

_REMEMBER = 1 << 16  # number of texts whose ids are kept
_LONGEST = 1 << 20  # characters; a longer text is cut before the tokenizer sees it


class TextTokenizer:
    """A picklable wrapper of the `tokenizers` library. It keeps the ids of texts, because instructions repeat.

    Special tokens in a text are read as plain text, so an untrusted text can never become a control id.
    """

    def __init__(self, definition: str):
        self.definition = definition
        self._ids: dict[str, np.ndarray] = {}
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
        new = [t for t in dict.fromkeys(wanted) if t not in self._ids]
        known = self._ids
        if new:
            if len(known) + len(new) > _REMEMBER:
                self._ids = {}
                known = {t: known[t] for t in dict.fromkeys(wanted) if t in known}
            found = _safely(self._native.encode_batch, [t[:_LONGEST] for t in new], add_special_tokens=False)
            known.update((t, np.asarray(e.ids, np.int32)) for t, e in zip(new, found, strict=True))
            if len(known) <= _REMEMBER:
                self._ids = known
        return [known[t][:limit] if limit else known[t] for t in wanted]

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


def _safely(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call the library. A tokenizer that is not valid raises plain Exception, or panics, which is no Exception."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"text tokenizer: {error}") from None
        raise
