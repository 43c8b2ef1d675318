import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mst_train.config import DataConfig
from mst_train.data import Tokenizer, find_documents, load_corpus, train_tokenizer
from mst_train.data import corpus as module
from mst_train.errors import UserError

Configure = Callable[..., DataConfig]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenised from here on."""
    texts: list[str] = []
    encode = Tokenizer.encode

    def record(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        texts.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(Tokenizer, "encode", record)
    return texts


def corpus_folder(data: DataConfig, unfinished: int = 0) -> Path:
    """The one corpus in the cache, with so many unfinished ones beside it."""
    folders = sorted(Path(str(data.cache_dir), "corpora").iterdir())
    assert [folder.name[0] == "." for folder in folders] == [True] * unfinished + [False]
    return folders[-1]


def test_documents_are_stored_with_their_ends(configure: Configure) -> None:
    corpus = load_corpus(configure())
    texts = list(find_documents(configure()).documents())
    assert corpus.tokens.dtype == np.uint16 and isinstance(corpus.tokens, np.memmap)
    assert corpus.offsets.dtype == np.int64
    assert (corpus.vocab_size, corpus.eod) == (300, 1)
    assert len(corpus.offsets) == len(texts) + 1
    for index, text in enumerate(texts):
        document = corpus.tokens[corpus.offsets[index] : corpus.offsets[index + 1]].tolist()
        assert document.count(corpus.eod) == 1 and document[-1] == corpus.eod
        assert corpus.tokenizer.decode(document) == text


def test_batches_change_nothing(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_corpus(configure())
    shutil.rmtree(str(configure().cache_dir))
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    batched = load_corpus(configure())
    assert np.array_equal(batched.tokens, whole.tokens)
    assert np.array_equal(batched.offsets, whole.offsets)
    assert batched.fingerprint == whole.fingerprint


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    assert list(module._batches(["abcd"] * 4 + ["x" * 20, "y"])) == [
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
    assert np.array_equal(second.tokens, first.tokens)
    assert second.fingerprint == first.fingerprint


def test_manifest(configure: Configure, encoded: list[str]) -> None:
    corpus = load_corpus(configure())
    assert json.loads((corpus_folder(configure()) / "manifest.json").read_text()) == {
        "format": 1,
        "source": configure().source,
        "source_fingerprint": find_documents(configure()).fingerprint,
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
        "vocab_size": 300,
        "eod": 1,
        "dtype": "<u2",
        "documents": 40,
        "tokens": len(corpus.tokens),
        "text_bytes": sum(len(text.encode()) for text in encoded),
        "fingerprint": corpus.fingerprint,
    }


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
    given = train_tokenizer(texts, 320, tmp_path / "given.model")
    corpus = load_corpus(configure(tokenizer=str(tmp_path / "given.model")))
    assert corpus.tokenizer.fingerprint == given.fingerprint
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_other_text_with_the_same_tokenizer_is_another_corpus(
    configure: Configure, folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(find_documents(configure()).documents(), 320, tmp_path / "given.model")
    data = configure(tokenizer=str(tmp_path / "given.model"))
    first = load_corpus(data)
    (folder / "00.txt").write_text((folder / "01.txt").read_text())
    second = load_corpus(data)
    assert len(second.tokens) != len(first.tokens)
    assert second.fingerprint != first.fingerprint


def test_large_vocabulary_takes_four_bytes(configure: Configure, tmp_path: Path) -> None:
    tokenizer = load_corpus(configure()).tokenizer
    for vocab_size, dtype in ((65536, "<u2"), (65537, "<u4")):
        tokenizer.vocab_size = vocab_size
        manifest = module._write(find_documents(configure()), tokenizer, tmp_path)
        assert manifest["dtype"] == dtype
        tokens = np.fromfile(tmp_path / "tokens.bin", dtype)
        assert len(tokens) == manifest["tokens"] and tokens[-1] == tokenizer.eod


# ---------------------------------------------------------------- damage, interruption, races


def truncate(folder: Path) -> None:
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(100)


def cut_offsets(folder: Path) -> None:
    np.save(folder / "offsets.npy", np.load(folder / "offsets.npy")[:-1])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def remove_tokens(folder: Path) -> None:
    (folder / "tokens.bin").unlink()


@pytest.mark.parametrize("damage", [truncate, cut_offsets, empty_manifest, remove_tokens])
def test_damaged_cache_is_built_again(
    damage: Callable[[Path], None],
    configure: Configure,
    encoded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = load_corpus(configure())
    tokens = np.array(first.tokens)
    damage(corpus_folder(configure()))
    again = load_corpus(configure())
    assert "is not whole (cut short or edited): building it again" in caplog.text
    assert len(encoded) == 80
    assert np.array_equal(again.tokens, tokens) and again.fingerprint == first.fingerprint
    load_corpus(configure())
    assert len(encoded) == 80
    corpus_folder(configure())


def test_damaged_tokenizer_is_trained_again(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_corpus(configure())
    (path,) = (tmp_path / "cache" / "tokenizers").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert load_corpus(configure()).fingerprint == first.fingerprint
    assert "is damaged: training it again" in caplog.text


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), UserError("a bad line")])
def test_interrupted_build_leaves_nothing(
    problem: BaseException, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    encode = Tokenizer.encode
    calls = []

    def stop(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        calls.append(batch)
        if len(calls) == 3:
            raise problem
        return encode(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode", stop)
        with pytest.raises(type(problem)):
            load_corpus(configure())
    assert list(Path(str(configure().cache_dir), "corpora").iterdir()) == []
    assert len(load_corpus(configure()).offsets) == 41


def test_remains_of_a_killed_run_are_not_read(configure: Configure, encoded: list[str]) -> None:
    first = load_corpus(configure())
    folder = corpus_folder(configure())
    remains = folder.with_name(f".{folder.name}-killed") / "built"
    remains.parent.mkdir()
    folder.rename(remains)
    truncate(remains)
    assert load_corpus(configure()).fingerprint == first.fingerprint
    assert len(encoded) == 80


@pytest.mark.parametrize("damaged_before", [False, True])
def test_another_process_finishes_first(
    damaged_before: bool, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damaged_before:
        load_corpus(configure())
        truncate(corpus_folder(configure()))
    write = module._write
    others, kept = [], []

    def write_late(*args: Any) -> dict[str, Any]:
        manifest = write(*args)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_write", write)
            others.append(load_corpus(configure()))
        kept.append(corpus_folder(configure(), unfinished=1).stat().st_ino)
        return manifest

    monkeypatch.setattr(module, "_write", write_late)
    corpus = load_corpus(configure())
    assert corpus.tokens.filename == others[0].tokens.filename
    assert np.array_equal(corpus.tokens, others[0].tokens)
    assert [corpus_folder(configure()).stat().st_ino] == kept


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

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(
        UserError, match=r"data.cache_dir=.* \(No space left on device\): make room"
    ):
        load_corpus(configure())
    assert list(Path(str(configure().cache_dir), "corpora").iterdir()) == []


def test_whole_cache_is_only_read(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    load_corpus(configure())

    def fail(*args: Any, **settings: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr(module.tempfile, "mkdtemp", fail)
    load_corpus(configure())


def test_default_cache_folder(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_corpus(configure(cache_dir=None))
    assert (tmp_path / "xdg" / "mst_train" / "corpora").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module._cache_folder(DataConfig()) == tmp_path / ".cache" / "mst_train"
    assert module._cache_folder(DataConfig(cache_dir="~/x")) == tmp_path / "x"


def test_empty_corpus_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        load_corpus(configure(source=str(tmp_path / "blank.txt")))
