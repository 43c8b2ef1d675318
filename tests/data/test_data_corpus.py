import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mst_train.config import DataConfig
from mst_train.data import build, load_corpus, shards
from mst_train.data import corpus as module
from mst_train.data.corpus import Corpus
from mst_train.data.documents import find_documents
from mst_train.data.pieces import Document
from mst_train.data.tokenizer import Tokenizer, train_tokenizer
from mst_train.errors import TrainingError, UserError

Configure = Callable[..., DataConfig]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenised from here on."""
    texts: list[str] = []
    encode = Tokenizer.encode_arrays

    def record(self: Tokenizer, batch: list[str], *rest: set[int]) -> Iterator[np.ndarray]:
        texts.extend(batch)
        return encode(self, batch, *rest)

    monkeypatch.setattr(Tokenizer, "encode_arrays", record)
    return texts


def corpus_folder(data: DataConfig) -> Path:
    """The one corpus in the cache."""
    (folder,) = Path(str(data.cache_dir), "corpora").iterdir()
    return folder


def borders(corpus: Corpus) -> np.ndarray:
    return corpus.documents.borders(0, len(corpus.documents))


def test_documents_are_stored_with_their_ends(configure: Configure) -> None:
    corpus = load_corpus(configure())
    texts = list(find_documents(configure()).documents())
    assert corpus.tokens.dtype == corpus.tokens[:5].dtype == np.uint16
    assert (corpus.vocab_size, corpus.eod) == (300, 1)
    assert len(corpus.documents) == len(texts)
    offsets = borders(corpus)
    for index, text in enumerate(texts):
        document = corpus.tokens[offsets[index] : offsets[index + 1]].tolist()
        assert document.count(corpus.eod) == 1 and document[-1] == corpus.eod
        assert corpus.tokenizer.decode(document) == text


def test_batches_change_nothing(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_corpus(configure())
    tokens, offsets = np.array(whole.tokens[:]), borders(whole)
    shutil.rmtree(str(configure().cache_dir))
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 500)
    batched = load_corpus(configure())
    assert np.array_equal(batched.tokens[:], tokens)
    assert np.array_equal(borders(batched), offsets)
    assert batched.fingerprint == whole.fingerprint


def test_shards_are_one_stream(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_corpus(configure())
    tokens, offsets = np.array(whole.tokens[:]), borders(whole)
    shutil.rmtree(str(configure().cache_dir))
    monkeypatch.setattr("mst_train.data.documents.SMALLEST_PIECE", 700)
    sharded = load_corpus(configure())
    assert len(sharded.tokens.starts) > 8
    assert np.array_equal(sharded.tokens[:], tokens)
    assert np.array_equal(borders(sharded), offsets)
    for start, stop in ((0, 1), (100, 900), (len(tokens) - 3, len(tokens)), (50, 50)):
        assert np.array_equal(sharded.tokens[start:stop], tokens[start:stop])
    for first, last in ((0, 0), (3, 9), (39, 40), (40, 40)):
        assert np.array_equal(sharded.documents.borders(first, last), offsets[first : last + 1])
    for token in (0, 1, int(offsets[7]), int(offsets[7]) - 1, len(tokens) - 1):
        assert sharded.documents.at(token) == np.searchsorted(offsets, token, side="right") - 1


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 10)
    texts = ["abcd"] * 3 + [" ", "abcd", "x" * 20, "y", "\n"]
    batches = shards._batches(Document(text, len(text)) for text in texts)
    assert [[document.content for document in batch] for batch in batches] == [
        ["abcd"] * 3,
        ["abcd", "x" * 20],
        ["y"],
    ]


def test_second_load_tokenises_nothing(
    configure: Configure, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = load_corpus(configure())
    assert len(encoded) == 40
    assert "trained a tokenizer of 300 tokens on" in caplog.text
    assert f": 40 documents, {sum(map(len, encoded))} bytes, {len(first.tokens)} tokens in" in (
        caplog.text
    )
    caplog.clear()
    second = load_corpus(configure())
    assert len(encoded) == 40 and not caplog.records
    assert np.array_equal(second.tokens[:], first.tokens[:])
    assert second.fingerprint == first.fingerprint


def test_manifest(configure: Configure, encoded: list[str]) -> None:
    corpus = load_corpus(configure())
    manifest = json.loads((corpus_folder(configure()) / "manifest.json").read_text())
    (shard,) = manifest.pop("shards")
    assert manifest == {
        "kind": "mst_train tokens",
        "format": 4,
        "settings": {},
        "source": configure().source,
        "source_fingerprint": find_documents(configure()).fingerprint,
        "tokenizer": "tokenizer.model",
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
        "vocab_size": 300,
        "eod": 1,
        "dtype": "<u2",
        "malformed": 0,
        "documents": 40,
        "tokens": len(corpus.tokens),
        "text_bytes": sum(len(text.encode()) for text in encoded),
        "fingerprint": corpus.fingerprint,
    }
    raw = (corpus_folder(configure()) / "shards" / "000000.tokens").read_bytes()
    assert shard["name"] == "shards/000000"
    assert shard["files"][".tokens"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert (shard["documents"], 2 * shard["tokens"]) == (40, len(raw))


def test_changed_source_is_tokenised_again(configure: Configure, folder: Path) -> None:
    first = load_corpus(configure())
    (folder / "00.txt").write_text("ka lo mi")
    second = load_corpus(configure())
    assert len(second.tokens) < len(first.tokens)
    assert second.fingerprint != first.fingerprint


def test_fingerprint_stands_for_the_tokens(configure: Configure, folder: Path) -> None:
    """Files that were copied or touched give another cache entry, not another fingerprint."""
    first = load_corpus(configure())
    for file in folder.iterdir():
        os.utime(file, ns=(0, 0))
    assert load_corpus(configure()).fingerprint == first.fingerprint
    assert load_corpus(configure(tokenizer_vocab_size=310)).fingerprint != first.fingerprint


def test_given_tokenizer_is_used(configure: Configure, tmp_path: Path) -> None:
    texts = list(find_documents(configure()).documents())
    given = train_tokenizer(texts, 320).save(tmp_path / "given.model")
    corpus = load_corpus(configure(tokenizer=str(tmp_path / "given.model")))
    assert corpus.tokenizer.fingerprint == given.fingerprint
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_other_text_with_the_same_tokenizer_is_another_corpus(
    configure: Configure, folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(find_documents(configure()).documents(), 320).save(tmp_path / "given.model")
    data = configure(tokenizer=str(tmp_path / "given.model"))
    first = load_corpus(data)
    (folder / "00.txt").write_text((folder / "01.txt").read_text())
    second = load_corpus(data)
    assert len(second.tokens) != len(first.tokens)
    assert second.fingerprint != first.fingerprint


def test_large_vocabulary_takes_four_bytes() -> None:
    assert (shards.dtype_of(1 << 16), shards.dtype_of((1 << 16) + 1)) == ("<u2", "<u4")


# ---------------------------------------------------------------- damage, interruption, races


def truncate(folder: Path) -> None:
    with (folder / "shards" / "000000.tokens").open("r+b") as file:
        file.truncate(100)


def cut_offsets(folder: Path) -> None:
    path = folder / "shards" / "000000.offsets"
    path.write_bytes(path.read_bytes()[:-8])


def cut_checksums(folder: Path) -> None:
    (folder / "shards" / "000000.tokens.crc").write_bytes(b"")


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def remove_tokens(folder: Path) -> None:
    (folder / "shards" / "000000.tokens").unlink()


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (truncate, 80),
        (cut_offsets, 80),
        (cut_checksums, 80),
        (empty_manifest, 40),
        (remove_tokens, 80),
        (other_tokenizer, 40),
    ],
)
def test_damaged_cache_is_repaired(
    damage: Callable[[Path], None], texts: int, configure: Configure, encoded: list[str]
) -> None:
    """What is whole of it is kept."""
    first = load_corpus(configure())
    tokens = np.array(first.tokens[:])
    damage(corpus_folder(configure()))
    again = load_corpus(configure())
    assert len(encoded) == texts
    assert np.array_equal(again.tokens[:], tokens) and again.fingerprint == first.fingerprint
    load_corpus(configure())
    assert len(encoded) == texts
    names = {path.name for path in corpus_folder(configure()).iterdir()}
    assert names == {"manifest.json", "shards", "tokenizer.model"}


def test_damaged_tokenizer_is_trained_again(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_corpus(configure())
    (path,) = (tmp_path / "cache" / "tokenizers").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert load_corpus(configure()).fingerprint == first.fingerprint
    assert "is damaged: training it again" in caplog.text


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), UserError("a bad line")])
def test_interrupted_build_is_continued(
    problem: BaseException,
    configure: Configure,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mst_train.data.documents.SMALLEST_PIECE", 700)
    make_shard = shards.make_shard
    calls = []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise problem
        make_shard(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build, "make_shard", stop)
        with pytest.raises(type(problem)):
            load_corpus(configure())
    assert 0 < len(encoded) < 40
    assert len(load_corpus(configure()).documents) == 40
    assert len(encoded) == 40


def test_another_process_finishes_first(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard = shards.make_shard
    others = []

    def make_late(*arguments: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(build, "make_shard", make_shard)
            others.append(load_corpus(configure()))
        make_shard(*arguments)

    monkeypatch.setattr(build, "make_shard", make_late)
    corpus = load_corpus(configure())
    assert len(others) == 1 and corpus.fingerprint == others[0].fingerprint
    assert np.array_equal(corpus.tokens[:], others[0].tokens[:])
    assert not (corpus_folder(configure()) / "work").exists()


# ---------------------------------------------------------------- the cache folder


def test_cache_that_cannot_be_written(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = configure(cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        load_corpus(data)
    assert str(caught.value).startswith(
        f"data.cache_dir={data.cache_dir} cannot be written (Not a directory): make room"
    )


def test_full_disk(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_json", fail)
    with pytest.raises(
        TrainingError, match=r"data.cache_dir=.* \(No space left on device\): make room"
    ):
        load_corpus(configure())


def test_whole_cache_is_only_read(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    load_corpus(configure())

    def fail(*args: Any, **settings: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr("tempfile.mkdtemp", fail)
    monkeypatch.setattr(Path, "replace", fail)
    load_corpus(configure())


def test_default_cache_folder(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_corpus(configure(cache_dir=None))
    assert (tmp_path / "xdg" / "mst_train" / "corpora").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder(DataConfig()) == tmp_path / ".cache" / "mst_train"
    assert module.cache_folder(DataConfig(cache_dir="~/x")) == tmp_path / "x"


def test_empty_corpus_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        load_corpus(configure(source=str(tmp_path / "blank.txt")))
