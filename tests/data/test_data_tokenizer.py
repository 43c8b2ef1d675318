import io
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mst_train.data import tokenizer as module
from mst_train.data.tokenizer import Tokenizer, train_tokenizer
from mst_train.errors import UserError

CODE = "def f(x):\n    if x:\n        return [\n            x,\n        ]\n\n\n"
WORDS = [a + b + c for a in ("", "ka", "un") for b in ("lo", "mi") for c in ("ter", "ves", "te")]
DOCUMENTS = [
    " ".join(random.Random(number).choices(WORDS, k=60)) + "\n" + CODE for number in range(30)
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 330)


def foreign_model(**settings: object) -> bytes:
    """A sentencepiece model with that package's own defaults."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=model,
        **{"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 4}
        | settings,
    )
    return model.getvalue()


@given(TEXT)
@example("")
@example(" \t\n\r\n   ")
@example("a\0b\0")
@example("\u2581x \u2581\u2581 y\u2581")
@example("\N{PILE OF POO} </s><unk><0x41>\u2585\u2047\ufeff\ufffd")
@settings(max_examples=300)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert all(0 < token < tokenizer.vocab_size and token != tokenizer.eod for token in tokens)


@given(st.lists(TEXT, max_size=5))
@settings(max_examples=50)
def test_texts_are_encoded_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode(texts) == [tokenizer.encode([text])[0] for text in texts]


def test_indentation_and_newlines_are_cheap(tokenizer: Tokenizer) -> None:
    for text in (" " * 8, "\n", ":\n"):
        (tokens,) = tokenizer.encode([text])
        assert len(tokens) == 1


def test_long_texts_are_encoded_in_parts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(DOCUMENTS) + " \u2581 end"
    monkeypatch.setattr(module, "ENCODE_PART_CHARACTERS", 100)
    seen = []
    processor = tokenizer._processor

    class Recorder:
        def encode(self, texts: list[str], **settings: object) -> list[list[int]]:
            seen.extend(texts)
            return processor.encode(texts, **settings)

    monkeypatch.setattr(tokenizer, "_processor", Recorder())
    (tokens,) = tokenizer.encode([text])
    assert max(map(len, seen)) <= 100
    assert processor.decode(tokens) == text


def test_cut() -> None:
    assert list(module.cut("", 3)) == [""]
    assert list(module.cut("abc", 3)) == ["abc"]
    assert list(module.cut("a\nbcdefg", 3)) == ["a\n", "bcd", "efg"]


def test_training_is_deterministic(tmp_path: Path) -> None:
    first = train_tokenizer(DOCUMENTS, 330).save(tmp_path / "first.model")
    second = train_tokenizer(iter(DOCUMENTS), 330).save(tmp_path / "second.model")
    assert (tmp_path / "first.model").read_bytes() == (tmp_path / "second.model").read_bytes()
    assert first.fingerprint == second.fingerprint
    other = train_tokenizer(DOCUMENTS[:20], 330).save(tmp_path / "other.model")
    assert other.fingerprint != first.fingerprint


def test_file_is_the_model_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.model"
    trained = train_tokenizer(DOCUMENTS, 330).save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.eod) == (trained.fingerprint, 330, 1)
    assert loaded.encode(DOCUMENTS) == trained.encode(DOCUMENTS)
    assert list(path.parent.iterdir()) == [path]


def test_no_damage_to_a_kept_tokenizer_goes_unseen(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def missed() -> Tokenizer:
        raise LookupError

    module.kept_tokenizer(tmp_path, "key", lambda: tokenizer)
    module.kept_tokenizer(tmp_path, "other", lambda: train_tokenizer(DOCUMENTS, 340))
    found = module.kept_tokenizer(tmp_path, "key", missed)
    assert found.fingerprint == tokenizer.fingerprint
    (path,) = tmp_path.glob("key-*")
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        place = generator.randrange(8 * len(whole))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(LookupError):
            module.kept_tokenizer(tmp_path, "key", missed)
    assert caplog.text.count(f"{path} is damaged: training it again") == 200
    path.write_bytes(whole[:-1])
    with pytest.raises(LookupError):
        module.kept_tokenizer(tmp_path, "key", missed)
    path.write_bytes(whole)
    assert module.kept_tokenizer(tmp_path, "key", missed).vocab_size == tokenizer.vocab_size


def test_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(DOCUMENTS, 330).encode(DOCUMENTS)
    assert capfd.readouterr() == ("", "")


def test_sample_is_bounded_and_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_PART_CHARACTERS", 10)
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 200)
    texts = [f"{number:05}" for number in range(10)]
    assert module.sample(texts) == texts
    kept = [int(part) for part in module.sample(f"{number:05}" for number in range(1000))]
    gap = kept[1] - kept[0]
    assert kept == list(range(0, 1000, gap))
    assert 100 <= 5 * len(kept) <= 200
    assert 100 <= sum(map(len, module.sample(["x" * 10_000]))) <= 200


def test_special_characters_do_not_keep_text_from_training() -> None:
    text = "\u2585\u2047\u2581\0\t" + DOCUMENTS[0]
    assert train_tokenizer([text] * 3, 300).vocab_size == 300


# ---------------------------------------------------------------- refusals


def refusal(documents: list[str], vocab_size: int) -> str:
    with pytest.raises(UserError) as caught:
        train_tokenizer(documents, vocab_size)
    return str(caught.value)


def test_vocabulary_larger_than_the_text() -> None:
    message = refusal(DOCUMENTS, 5000)
    start = (
        "data.tokenizer_vocab_size=5000 is more than the text of data.source can fill: set it to "
    )
    assert message.startswith(start)
    largest = int(message.removeprefix(start).split()[0])
    assert train_tokenizer(DOCUMENTS, largest).vocab_size == largest


def test_text_too_short_for_any_vocabulary() -> None:
    message = refusal(["hi there"], 4096)
    assert message.startswith("data.source holds too little text to train a tokenizer (data.token")


def test_vocabulary_smaller_than_the_alphabet() -> None:
    documents = [" ".join(map(chr, range(0x4E00, 0x4E00 + 400)))]
    message = refusal(documents, 300)
    start = (
        "data.tokenizer_vocab_size=300 is too small for the distinct characters of data.source: "
    )
    assert message.startswith(start + "set it to ")
    smallest = int(message.split("set it to ")[1].split()[0])
    assert train_tokenizer(documents, smallest).vocab_size == smallest


def test_model_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.model"
    with pytest.raises(UserError, match=r"data.tokenizer=.*missing.model cannot be read \(No such"):
        Tokenizer.load(missing)
    broken = tmp_path / "broken.model"
    for content in (b"", b"not a model", foreign_model()[:2000]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"broken.model is not a sentencepiece model: give"):
            Tokenizer.load(broken)
    broken.write_bytes(foreign_model(eos_id=-1))
    with pytest.raises(UserError, match=r"broken.model has no end-of-sequence id, which ends"):
        Tokenizer.load(broken)
    assert capfd.readouterr() == ("", "")


def test_foreign_model_keeps_its_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefixed space and a first token come once per text, not once per part of it."""
    path = tmp_path / "foreign.model"
    path.write_bytes(foreign_model())
    monkeypatch.setattr(module, "ENCODE_PART_CHARACTERS", 10)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eod == 2
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode(DOCUMENTS[:3]) == library.encode(DOCUMENTS[:3], add_bos=True)
