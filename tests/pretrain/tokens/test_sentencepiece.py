"""Text tokenizers from files: SentencePiece models against the real library, tokenizer.json, and files that are neither."""

import io

import numpy as np
import pytest

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.text_tokenizers import learn, load

TRAINED_ON = ["go to the red ball", "pick up the grey key", "öffne die Tür, bitte", "13 lazy dogs jump over it"] * 20
READ = [
    "go to the red ball",
    "  pick   up the  key ",
    "Tür öffnen; jump!",
    "",
    "<s> </s> <unk>",
    "ﬁne Ⅳ ｗｉｄｅ",
    "日本 🙂 unheard-of",
]


@pytest.fixture(scope="module", params=["unigram", "unigram bytes", "bpe", "bpe bytes"])
def model(request, tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    kind, _, byte = request.param.partition(" ")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON),
        model_writer=out,
        vocab_size=90 + 256 * bool(byte),
        model_type=kind,
        byte_fallback=bool(byte),
        minloglevel=2,
        hard_vocab_limit=False,
    )
    file = tmp_path_factory.mktemp("spm") / "text.model"
    file.write_bytes(out.getvalue())
    return file, sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def test_ids_and_texts_equal_those_of_the_library(model):
    file, library = model
    ours = TextTokenizer(load(str(file), 1000))
    for text in READ:
        ids = library.encode(text)
        assert ours.encode([text])[0].tolist() == ids, text
        if library.unk_id() not in ids:
            assert ours.decode(ids) == library.decode(ids), text


def test_the_error_for_a_broken_model_names_its_file(model):
    data = model[0].read_bytes()
    rng = np.random.default_rng(0)
    bad = model[0].with_name("bad.model")
    for _ in range(60):
        mutated = bytearray(data[: int(rng.integers(1, 3000))])
        for _ in range(int(rng.integers(0, 8))):
            mutated[int(rng.integers(len(mutated)))] = int(rng.integers(256))
        bad.write_bytes(bytes(mutated))
        try:
            TextTokenizer(load(str(bad), 1 << 20)).encode(["go to the ball"])
        except DataError as error:
            assert "bad.model" in str(error)  # noqa: PT017 — after some mutations the model is still valid


def test_a_tokenizer_json_is_used_unchanged_and_must_fit(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(learn(["go to the red ball"], 280))
    assert load(str(file), 280) == file.read_text()
    with pytest.raises(DataError, match=r"has 2\d\d ids, but model\.text_vocabulary is 260; set it to 2"):
        load(str(file), 260)
    file.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a valid tokenizer"):
        load(str(file), 300)
    with pytest.raises(DataError, match="100 ids are too few; at least 256"):
        learn([], 100)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_only_regular_files_are_tokenizers(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        load(str(tmp_path / name), 300)
