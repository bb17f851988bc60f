"""Where a run's text tokenizer comes from: a file that is given, or a byte-level BPE learned from the recipe's own texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.text import TextTokenizer

BYTES = 256
_LEARN_FROM = 16 << 20  # characters; enough for 32,000 merges, and bounded for texts that come from strangers


def load(path: str, vocabulary: int) -> str:
    """The JSON of a tokenizer.json or a SentencePiece model, checked to fit into `vocabulary` ids.

    Raises DataError where the file is neither, or has more ids.
    """
    if path.endswith(".model"):
        from tiphys.pretrain.tokens.sentencepiece import to_tokenizer

        definition = to_tokenizer(Path(path).read_bytes(), path)
    else:
        definition = Path(path).read_text(encoding="utf-8")
    try:
        size = TextTokenizer(definition).size
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"model.text_tokenizer: {path} is no tokenizer.json: {error}") from error
    if size > vocabulary:
        raise DataError(
            f"model.text_tokenizer: {path} has {size} ids, model.text_vocabulary is {vocabulary}; set it to {size}"
        )
    return definition


def learn(texts: Iterable[str], vocabulary: int) -> str:
    """A byte-level BPE of at most `vocabulary` ids as JSON. Any text has an encoding, and decodes to itself.

    The result depends on the set of texts only: they are sorted first, and the trainer breaks ties by id.
    Merges are learned until every word is one id or the vocabulary is full.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < BYTES:
        raise DataError(f"model.text_vocabulary: {vocabulary} ids cannot hold the {BYTES} bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,  # a run with one instruction sees its words as one id each, not as bytes
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
