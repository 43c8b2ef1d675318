"""A document that is read and tokenised in parts has the tokens of the whole."""

import io
import random

import pytest
import sentencepiece
import tokenizers

from mst_train.data import corpus, load_corpus, load_tokenizer, manifest, readers, shards
from mst_train.data import tokenizer as tokenizer_module
from mst_train.data.pieces import before_line, between_words

BOS, EOS = "<s>", "</s>"
WORDS = [a + b for a in ("", "ka", "un", "x = ") for b in ("lo", "mi(", "ter", "te):", "é")]


def lines(count):
    """Lines of words, some of them empty or indented."""
    generator = random.Random(0)
    made = []
    for _ in range(count):
        made.append("    " * generator.randint(0, 2) + " ".join(generator.choices(WORDS, k=6)))
        made += [""] * generator.choice([0, 0, 1, 3])
    return "\n".join(made)


def sentencepiece_model(folder, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(300).split("\n")),
        model_writer=model,
        **{"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 4}
        | settings,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def library(folder, made, *alphabet, vocab_size=300):
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    made.train_from_iterator(lines(300).split("\n"), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(f'{{"eos_token": "{EOS}"}}')
    return folder / "tokenizer.json"


def of_llama2(folder):
    """A space before the text; line ends are tokens of their own."""
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return sentencepiece_model(folder, **identity, allow_whitespace_only_pieces=True)


def of_gemma(folder):
    """No space before the text; runs of line ends are tokens."""
    return sentencepiece_model(
        folder,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n\n", "\n\n\n", "\n\n\n\n"],
    )


def of_sentencepiece(folder):
    """Its defaults: a space before the text, and one for every run of whitespace."""
    return sentencepiece_model(folder)


def json_of_llama3(folder):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library(folder, made, *tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=400)


def json_of_llama2(folder):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    made.normalizer = tokenizers.normalizers.Sequence(parts)
    # Llama-2's has none, and no token of several words.
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    return library(folder, made, "\n")


def json_with_a_space(folder):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return library(folder, made, *tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=400)


ALL = [of_llama2, of_gemma, of_sentencepiece, json_of_llama3, json_of_llama2, json_with_a_space]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("together", [1, 10**6])
def test_a_long_file_has_the_tokens_of_the_whole(
    family, together, tmp_path, configure, monkeypatch
):
    """One beginning-of-sequence token, at the start, and no space where a part begins."""
    text = lines(200)
    source = tmp_path / "long.txt"
    source.write_text(text)
    tokenizer = load_tokenizer(family(tmp_path))
    whole = tokenizer.encode([text])[0]
    bos = whole[0]
    assert whole.count(bos) == 1

    monkeypatch.setattr(readers, "TEXT_PART_BYTES", 700)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", together)  # parts in batches of their own
    monkeypatch.setattr(tokenizer_module, "ENCODE_PART_CHARACTERS", 200)
    found = load_corpus(configure(source=str(source), tokenizer=str(tmp_path)))
    tokens = found.tokens[:].tolist()
    assert found.documents.borders(0, 1).tolist() == [0, len(whole) + 1]
    assert tokens.count(bos) == 1
    assert tokens == [*whole, tokenizer.eod]


@pytest.mark.parametrize("end", ["", "\n"])
def test_every_document_begins_with_the_token_whatever_came_before(
    end, tmp_path, configure, monkeypatch
):
    texts = [lines(30) + end, "short", lines(20) + end, lines(1)]
    source = tmp_path / "texts"
    source.mkdir()
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_text(text)
    tokenizer = load_tokenizer(json_of_llama3(tmp_path))
    expected = [token for ids in tokenizer.encode(texts) for token in (*ids, tokenizer.eod)]
    monkeypatch.setattr(readers, "TEXT_PART_BYTES", 256)
    found = load_corpus(configure(source=str(source), tokenizer=str(tmp_path)))
    assert found.tokens[:].tolist() == expected


def test_tokens_of_an_older_format_are_not_read_from_the_cache(tmp_path, configure, monkeypatch):
    data = configure()
    with monkeypatch.context() as patch:
        for module in (corpus, manifest, shards):
            patch.setattr(module, "FORMAT", 2)
        old = load_corpus(data)
    new = load_corpus(data)
    assert new.folder != old.folder
    assert new.fingerprint != old.fingerprint


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one\ntwo", 4),
        ("one\n\n\n  two\nthree\n", 12),
        ("one\n  two\n\n", 10 + 1),  # no line but indented ones: after the last newline
        ("one", 3),
        ("", 0),
    ],
)
def test_where_a_text_is_cut(text, place):
    assert before_line(text, 0, len(text)) == place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one\ntwo three", 4),
        ("one two\n\nthree\n# 4", 3),  # neither in a run of line ends nor before a sign
        ("one two\r\nthree", 3),
        ("1\n2 3", 2),  # before the last line
        ("one", 3),
        ("", 0),
    ],
)
def test_where_tokens_do_not_depend_on_the_cut(text, place):
    assert between_words(text, 0, len(text)) == place


def test_the_trained_tokenizer_s_parts_have_the_tokens_of_the_whole(monkeypatch):
    """It has tokens that begin with a line end: no cut is between that and their sign."""
    text = "".join(f"value {number}\n# of it: {number}\n" for number in range(300))
    trained = tokenizer_module.train_tokenizer([text], 300)
    whole = trained.encode([text])
    assert trained.encode(["a\n# b"]) != [trained.encode(["a\n"])[0] + trained.encode(["# b"])[0]]
    monkeypatch.setattr(tokenizer_module, "ENCODE_PART_CHARACTERS", 50)
    assert trained.encode([text]) == whole
