from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mst_train.config import DataConfig
from mst_train.data import Loader, load_corpus, load_data
from mst_train.data.packing import PackedSequences
from mst_train.errors import UserError

Configure = Callable[..., DataConfig]


def text(data: object, sequences: PackedSequences) -> str:
    tokens = [token for i in range(len(sequences)) for token in sequences[i][0].tolist()]
    return data.tokenizer.decode(tokens)  # type: ignore[attr-defined]


def test_load_data(configure: Configure, folder: Path) -> None:
    data = load_data(configure())
    corpus = load_corpus(configure())
    assert data.corpus_fingerprint == corpus.fingerprint
    assert data.tokenizer.vocab_size == 300
    assert data.validation is not None
    streams = data.training.stream_tokens + data.validation.stream_tokens
    assert streams == len(corpus.tokens)
    assert data.validation.stream_tokens <= 0.1 * len(corpus.tokens)
    # Whole documents are held out: a line of the folder is in one stream or the other.
    training, validation = text(data, data.training), text(data, data.validation)
    lines = {file.read_text() for file in folder.iterdir()}
    held_out = {line for line in lines if line in validation}
    assert held_out and not any(line in training for line in held_out)
    assert len(held_out) + sum(line in training for line in lines) >= len(lines) - 2
    batch = next(Loader(data.training, 4, seed=0))
    assert batch.tokens.shape == (4, 32) and int(batch.tokens.max()) < 300


def test_without_validation(configure: Configure) -> None:
    data = load_data(configure(validation_fraction=0.0))
    assert data.validation is None
    assert data.training.stream_tokens == len(load_corpus(configure()).tokens)


def test_two_loads_agree(configure: Configure) -> None:
    first, second = load_data(configure()), load_data(configure())
    assert first.corpus_fingerprint == second.corpus_fingerprint
    for index in range(len(first.training)):
        assert np.array_equal(first.training[index][0], second.training[index][0])


def test_short_corpus_is_refused_with_a_length_that_works(configure: Configure) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length=100000 needs 200002") as caught:
        load_data(configure(sequence_length=100_000))
    largest = int(str(caught.value).split("data.sequence_length to ")[1].split()[0])
    data = load_data(configure(sequence_length=largest))
    assert data.validation is not None
    assert (len(data.training), len(data.validation)) == (1, 1)


def test_single_document(configure: Configure, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(file.read_text() for file in folder.iterdir()))
    data = load_data(configure(source=str(tmp_path / "one.txt")))
    assert data.validation is not None and len(data.validation) >= 1
