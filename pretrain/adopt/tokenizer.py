"""The text tokenizer of a model of `transformers`, as a vocabulary that has texts only."""

from __future__ import annotations

from pathlib import Path

from tiphys.dataio.episode import DataError
from tiphys.pretrain.policy_files import TOKENIZERS
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.text_tokenizers import load
from tiphys.pretrain.tokens.vocabulary import Vocabulary

_MOST_IDS = 1 << 22


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer in the folder of a model; None: there is none."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def text_vocabulary(folder: Path, size: int, new: Vocabulary) -> Vocabulary:
    """The vocabulary of a model with `size` token ids.

    If the recipe's tokenizer `new` has the same pieces, both have the same definition, so that every id stays in its place.

    Raises
    ------
    DataError
        If the folder has no tokenizer, or one that is not valid.
    """
    file = tokenizer_file(folder)
    if file is None:
        raise DataError(
            f"{folder}: there is no tokenizer ({' or '.join(TOKENIZERS)}), so nobody knows which text a token stands for; add "
            "the one that the model was trained with"
        )
    try:
        definition = load(str(file), _MOST_IDS)
    except DataError as error:
        raise DataError(str(error).removeprefix("model.text_tokenizer: ")) from None
    if new.text_tokenizer and TextTokenizer(definition).pieces() == TextTokenizer(new.text_tokenizer).pieces():
        definition = new.text_tokenizer
    return Vocabulary(size, (("text", 0, size),), 0, 0, 0, 0, text_tokenizer=definition)
