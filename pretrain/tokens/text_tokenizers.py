"""Makes a run's text tokenizer: from a given file, or by training a byte-level BPE on the texts of the datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tiphys.dataio.episode import DataError
from tiphys.dataio.private import read_regular
from tiphys.pretrain.tokens.text import TextTokenizer

BYTES = 256
MOST_LEARNT = 32_000  # ids, if the recipe does not say how many
_MOST_BYTES = 256 << 20  # of a tokenizer's file
_LEARN_FROM = 16 << 20  # characters; enough for 32,000 merges, and a bound for untrusted texts


def load(path: str, vocabulary: int) -> str:
    """The tokenizer's JSON, from a tokenizer.json or a SentencePiece model (.model).

    Raises DataError if the file cannot be read, is neither, or has more than `vocabulary` ids (0: any number).
    """
    try:
        data = read_regular(path, _MOST_BYTES)
    except DataError as error:
        raise DataError(f"model.text_tokenizer: {error}") from None
    except OSError as error:
        raise DataError(f"model.text_tokenizer: {path} cannot be read: {error.strerror or error}") from None
    if path.endswith(".model"):
        from tiphys.pretrain.tokens.sentencepiece import to_tokenizer

        definition = to_tokenizer(data, path)
    else:
        definition = data.decode("utf-8", "replace")
    try:
        size = TextTokenizer(definition).size
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"model.text_tokenizer: {path} is not a valid tokenizer: {error}") from error
    if vocabulary and size > vocabulary:
        raise DataError(
            f"model.text_tokenizer: {path} has {size} ids, but model.text_vocabulary is {vocabulary}; set it to {size}"
        )
    return definition


def learn(texts: Iterable[str], vocabulary: int) -> str:
    """The JSON of a byte-level BPE with at most `vocabulary` ids. Every text can be encoded, and decodes to itself.

    The result depends only on the set of texts: they are sorted first, and the trainer breaks ties by id. Merges are learned
    until every word is one id or the vocabulary is full. Raises DataError if `vocabulary` is less than 256.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < BYTES:
        raise DataError(
            f"model.text_vocabulary: {vocabulary} ids are too few; at least {BYTES} are needed, one for each byte"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,  # if a run has only one instruction, its words still become one id each
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(_bounded(sorted(set(texts))), trainer)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


def _bounded(texts: Iterable[str]) -> Iterable[str]:
    left = _LEARN_FROM
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
