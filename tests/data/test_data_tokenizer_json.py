import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.config import DataConfig
from mst_train.data import load_data, load_tokenizer
from mst_train.data.tokenizer_file import open_tokenizer
from mst_train.errors import UserError
from mst_train.prepare.__main__ import main as prepare

TEXTS = [
    f"text {n}: the quick brown fox, and {n * 7} lazy dogs.\n\tdef f(x): return x\n"
    for n in range(200)
]
BOS, EOS, OTHER = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def library(*, bos: bool, truncation: bool = False) -> tokenizers.Tokenizer:
    """Byte-level pairs as in Llama 3 (with ``bos``) and Qwen (without)."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, OTHER],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    if truncation:
        made.enable_truncation(4)
        made.enable_padding(length=8)
    return made


def write(folder: Path, made: tokenizers.Tokenizer, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in ({"tokenizer_config": {"eos_token": EOS}} | files).items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("bos", [True, False])
def test_the_ids_are_the_librarys_with_what_comes_before_a_document(bos, tmp_path):
    made = library(bos=bos)
    tokenizer = load_tokenizer(write(tmp_path, made))
    assert tokenizer.eod == 1
    assert tokenizer.vocab_size == made.get_vocab_size() == 400
    for threads in (1, 2):
        tokenizer.threads = threads
        assert tokenizer.encode(TEXTS) == [made.encode(text).ids for text in TEXTS]
    assert all((ids[0] == 0) == bos for ids in tokenizer.encode(TEXTS))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS
    assert tokenizer.encode([]) == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@settings(max_examples=50)
def test_no_text_has_special_tokens_in_it(tmp_path_factory, texts):
    path = Path(tmp_path_factory.getbasetemp(), "special", "tokenizer.json")
    if not path.exists():
        write(path.parent, library(bos=True))
    tokenizer = load_tokenizer(path)
    texts = [text + end for text, end in zip(texts, cycle((BOS, EOS, OTHER)), strict=False)]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids[0] == 0
        assert min(ids[1:]) > 2
        assert tokenizer.decode(ids) == text


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path):
    plain = load_tokenizer(write(tmp_path / "a", library(bos=True)))
    cut = load_tokenizer(write(tmp_path / "b", library(bos=True, truncation=True)))
    assert cut.encode(TEXTS) == plain.encode(TEXTS)


@pytest.mark.parametrize(
    ("files", "eod"),
    [
        ({"tokenizer_config": {"eos_token": {"content": OTHER}}}, 2),
        ({"tokenizer_config": {}, "config": {"eos_token_id": 1}}, 1),
        (
            {
                "tokenizer_config": None,
                "generation_config": {"eos_token_id": [2, 1]},
                "config": {"eos_token_id": 1},
            },
            2,
        ),
    ],
)
def test_what_ends_a_document_is_in_the_files_beside_it(files, eod, tmp_path):
    assert load_tokenizer(write(tmp_path, library(bos=True), **files)).eod == eod


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": None}, "does not say which token ends a document"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "has no token '</s>'"),
        ({"tokenizer_config": {}, "config": {"eos_token_id": 400}}, "has no token 400"),
        ({"tokenizer_config": ["eos_token"]}, "cannot be read"),
    ],
)
def test_what_cannot_be_used(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, library(bos=True), **files))


def test_files_that_are_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="holds neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    for content in ("[" * 10**5, '{"eos_token": "\\ud800"}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer(_config)?\.json"):
            load_tokenizer(write(tmp_path, library(bos=True), tokenizer_config=None))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_another_end_of_document_is_another_tokenizer(tmp_path):
    path = write(tmp_path, library(bos=True))
    model = path.read_bytes()
    one, other = (open_tokenizer(model, 400, eod, "a test") for eod in (1, 2))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == load_tokenizer(path).fingerprint


def test_prepared_and_read_back(tmp_path):
    path = write(tmp_path / "model", library(bos=True))
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = [f"data.source={source}", f"data.tokenizer={path.parent}"]
    folders = []
    for workers in (1, 2):
        folders.append(tmp_path / str(workers))
        command = [*arguments, f"prepare.output={folders[-1]}", f"prepare.workers={workers}"]
        assert prepare(command) == 0
    contents = [
        {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        for folder in folders
    ]
    assert contents[0] == contents[1]
    assert contents[0][Path("tokenizer.json")] == path.read_bytes()
    data = load_data(
        DataConfig(source=str(folders[0]), sequence_length=16, validation_fraction=0.0)
    )
    tokens = np.concatenate([data.training[n].tokens for n in range(len(data.training))])
    expected = np.concatenate([[*ids, 1] for ids in load_tokenizer(path).encode(TEXTS)])
    assert np.array_equal(tokens[:160], expected[:160])
