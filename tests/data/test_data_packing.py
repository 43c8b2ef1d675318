from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.attention import select_attention
from mst_train.config import ModelConfig
from mst_train.data import IGNORED
from mst_train.data.corpus import Documents as Borders
from mst_train.data.loader import collate
from mst_train.data.packing import PackedSequences
from mst_train.data.splitting import split_corpus
from mst_train.errors import UserError
from mst_train.model import Policy, build_model
from mst_train.mst import Documents


class Recorder:
    """Tokens that remember which of them were read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.read = tokens, []

    def __getitem__(self, key: slice) -> np.ndarray:
        self.read.extend(range(key.start, key.stop))
        return self.tokens[key]


def test_item() -> None:
    tokens = np.arange(100, 120, dtype=np.uint16)
    sequences = PackedSequences(tokens, np.array([[0, 3], [5, 12]]), 4)
    assert (len(sequences), sequences.stream_tokens) == (2, 10)
    inputs, labels, positions, starts = sequences[1]
    assert starts is None
    assert sequences[0][0].tolist() == [100, 101, 102, 105]
    assert sequences[0][1].tolist() == [101, 102, 105, 106]
    assert inputs.tolist() == [106, 107, 108, 109]
    assert labels.tolist() == [107, 108, 109, 110]
    assert positions.tolist() == [0, 1, 2, 3]
    assert inputs.dtype == labels.dtype == positions.dtype == np.int64
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"sequence {index} of 2"):
            sequences[index]


@given(
    st.lists(st.integers(1, 30), min_size=3, max_size=40),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_token_is_a_label_once(
    lengths: list[int], sequence_length: int, fraction: float
) -> None:
    """Over both streams: no token twice, and no more missing than the first and a ragged end."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint32)  # each token is its own position
    try:
        documents = Borders([offsets], offsets[[0, -1]])
        streams = split_corpus(documents, fraction, sequence_length).values()
    except UserError:
        return
    seen: list[int] = []
    for spans in streams:
        stream = [token for start, end in spans for token in range(start, end)]
        sequences = PackedSequences(tokens, spans, sequence_length)
        inputs = [token for i in range(len(sequences)) for token in sequences[i][0].tolist()]
        labels = [token for i in range(len(sequences)) for token in sequences[i][1].tolist()]
        assert inputs == stream[: len(inputs)]
        assert labels == stream[1 : len(labels) + 1]
        assert 0 <= len(stream) - 1 - len(labels) < sequence_length
        seen += stream[: len(labels) + 1]
    assert len(seen) == len(set(seen))


def test_only_the_sequence_is_read() -> None:
    tokens = Recorder(np.arange(1000, dtype=np.uint16))
    spans = np.array([[0, 300], [310, 340], [400, 1000]])
    sequences = PackedSequences(tokens, spans, 50)  # type: ignore[arg-type]
    assert tokens.read == []
    sequences[6]
    assert tokens.read == [*range(310, 340), *range(400, 421)]


def test_short_stream_is_refused() -> None:
    tokens = np.zeros(10, np.uint16)
    assert len(PackedSequences(tokens, np.array([[0, 10]]), 9)) == 1
    with pytest.raises(UserError) as caught:
        PackedSequences(tokens, np.array([[0, 10]]), 10)
    assert str(caught.value) == (
        "a stream of 10 tokens is shorter than one sequence of data.sequence_length=10 and the "
        "token after it: set data.sequence_length to 9 or less, or give more text"
    )


def test_documents_confined_to_themselves() -> None:
    """Borders, positions that restart, and no label after the last token of a document."""
    eod = 1
    tokens = np.array([5, 6, eod, 7, eod, 8, 9, 10, 11, 12, eod, 13, 14], np.uint16)
    spans = np.array([[0, len(tokens)]])
    first, second = (PackedSequences(tokens, spans, 6, confine_to=eod)[i] for i in (0, 1))
    assert first.tokens.tolist() == [5, 6, eod, 7, eod, 8]
    assert first.labels.tolist() == [6, eod, IGNORED, eod, IGNORED, 9]
    assert first.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert first.starts.tolist() == [0, 3, 5]
    assert second.tokens.tolist() == [9, 10, 11, 12, eod, 13]
    assert second.labels.tolist() == [10, 11, 12, eod, IGNORED, 14]
    assert second.positions.tolist() == [0, 1, 2, 3, 4, 0]
    assert second.starts.tolist() == [0, 5]


def test_a_batch_holds_the_borders_of_all_its_rows() -> None:
    eod = 1
    tokens = np.array([5, 6, eod, 7, eod, 8, 9, 10, 11, 12, eod, 13, 14], np.uint16)
    sequences = PackedSequences(tokens, np.array([[0, len(tokens)]]), 6, confine_to=eod)
    batch = collate(sequences, [1, 0])
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 9, 11, 12]
    plain = PackedSequences(tokens, np.array([[0, len(tokens)]]), 6)
    assert collate(plain, [0]).cu_seqlens is None


# ---------------------------------------------------------------- documents by themselves

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=28,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)
MST = [
    Policy(True, True, mlp, head, keep, block)
    for mlp, head, block in ((5, 7, 11), (1000, 1000, 1000))
    for keep in ({"attention": "all"}, {})
]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.sampled_from(MST))
@settings(max_examples=10)
def test_a_batch_is_its_documents_alone(lengths: list[int], policy: Policy) -> None:
    """Loss and all gradients, in float64: packed with policy mst, and each document by itself."""
    eod, length = 1, 32
    random = np.random.default_rng(sum(lengths))
    documents = [
        [*random.integers(2, 40, size - 1).tolist(), eod] for size in [*lengths, 2 * length]
    ]
    stream = np.array([token for document in documents for token in document], np.uint16)
    sequences = PackedSequences(stream, np.array([[0, len(stream)]]), length, confine_to=eod)
    batch = collate(sequences, list(range(len(sequences))))
    attention = select_attention("auto", torch.device("cpu"), torch.float64)
    model = build_model(MODEL, policy=policy, attention=attention, dtype=torch.float64, seed=1)
    borders = Documents(batch.cu_seqlens)
    packed, valid = model(batch.tokens, batch.labels, batch.positions, borders)
    packed.backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    # What of each document lies in each sequence, straight from the stream.
    plain = build_model(MODEL, attention=attention, dtype=torch.float64, seed=1)
    total = torch.zeros((), dtype=torch.float64)
    ends = np.cumsum([len(document) for document in documents])
    places = np.union1d(ends, np.arange(len(sequences) + 1) * length)
    predicted = 0
    for start, stop in pairwise(places[places <= len(sequences) * length].tolist()):
        inside = 0 if stop in ends else 1  # the last token of a document predicts nothing
        piece = torch.from_numpy(stream[start : stop + inside].astype(np.int64))[None]
        if piece.shape[1] > 1:
            total = total + plain(piece[:, :-1], piece[:, 1:])[0]
            predicted += piece.shape[1] - 1
    total.backward()
    assert int(valid) == predicted
    torch.testing.assert_close(packed, total, rtol=1e-12, atol=1e-12)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-11, atol=1e-11, msg=name)
