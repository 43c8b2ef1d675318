import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_train.data import split_documents, split_stream
from mst_train.data.order import pseudo_random_order
from mst_train.data.splitting import merged
from mst_train.errors import UserError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)
FRACTIONS = st.floats(0.001, 0.9)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def covered(spans: np.ndarray) -> list[int]:
    return [token for start, end in spans for token in range(start, end)]


@given(LENGTHS, FRACTIONS, st.integers(2, 40))
def test_split_documents(lengths: list[int], fraction: float, minimum: int) -> None:
    sizes = np.array(lengths)
    training, validation = split_documents(sizes, fraction, minimum)
    assert sorted([*training, *validation]) == list(range(len(lengths)))
    assert list(training) == sorted(training) and list(validation) == sorted(validation)
    if len(validation):
        target = max(int(fraction * sizes.sum()), minimum)
        held_out = sizes[validation].sum()
        assert minimum <= held_out < 2 * target
        assert sizes[training].sum() >= minimum
        assert held_out <= target or held_out - sizes[validation].max() < minimum


def test_split_is_close_to_the_fraction_and_spread_out() -> None:
    sizes = np.full(1000, 10)
    training, validation = split_documents(sizes, 0.1, 33)
    assert (len(training), len(validation)) == (900, 100)
    assert 400 < validation.mean() < 600
    assert np.diff(validation).max() > 1
    again = split_documents(sizes, 0.1, 33)[1]
    assert np.array_equal(validation, again)


@given(LENGTHS, st.one_of(st.just(0.0), FRACTIONS), st.integers(1, 40))
def test_split_stream_gives_every_token_to_one_stream(
    lengths: list[int], fraction: float, sequence_length: int
) -> None:
    total, minimum = sum(lengths), sequence_length + 1
    if total < (2 * minimum if fraction else minimum):
        with pytest.raises(UserError):
            split_stream(offsets_of(lengths), fraction, sequence_length)
        return
    training, validation = split_stream(offsets_of(lengths), fraction, sequence_length)
    held_out = [] if validation is None else covered(validation)
    assert (validation is None) == (fraction == 0)
    assert sorted(covered(training) + held_out) == list(range(total))
    assert len(covered(training)) >= minimum
    assert not fraction or len(held_out) >= minimum


def test_one_huge_document_holds_out_its_end() -> None:
    training, validation = split_stream(np.array([0, 10_000]), 0.05, 100)
    assert training.tolist() == [[0, 9500]]
    assert validation is not None and validation.tolist() == [[9500, 10_000]]


def test_at_least_a_sequence_is_held_out() -> None:
    _, validation = split_stream(np.array([0, 10_000]), 0.001, 100)
    assert validation is not None and validation.tolist() == [[9899, 10_000]]
    _, validation = split_stream(np.arange(0, 10_001, 10), 0.001, 100)
    assert validation is not None and len(covered(validation)) == 110
    # Documents longer than the fraction, but not than a sequence, are held out whole.
    _, validation = split_stream(np.arange(0, 10_001, 50), 0.001, 100)
    assert validation is not None and len(covered(validation)) == 150


def test_training_keeps_at_least_a_sequence() -> None:
    training, validation = split_stream(np.array([0, 210]), 0.9, 100)
    assert validation is not None
    assert (len(covered(training)), len(covered(validation))) == (101, 109)


def test_merged() -> None:
    spans = np.array([[0, 3], [3, 5], [7, 8], [8, 9], [12, 13]])
    assert merged(spans).tolist() == [[0, 5], [7, 9], [12, 13]]
    assert merged(spans[:1]).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("total", "fraction", "sequence_length", "expected"),
    [
        (
            150,
            0.01,
            100,
            "data.source holds 150 tokens, but data.sequence_length=100 needs 202: a sequence of "
            "101 (one token more, to predict) for training and one for validation: set "
            "data.sequence_length to 74 or less, or set data.validation_fraction=0, or give more "
            "text",
        ),
        (
            50,
            0.0,
            100,
            "data.source holds 50 tokens, but data.sequence_length=100 needs 101 (one token more, "
            "to predict): set data.sequence_length to 49 or less, or give more text",
        ),
    ],
)
def test_short_corpus_is_refused(
    total: int, fraction: float, sequence_length: int, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        split_stream(np.array([0, total]), fraction, sequence_length)
    assert str(caught.value) == expected
    largest = int(expected.split("data.sequence_length to ")[1].split()[0])
    split_stream(np.array([0, total]), fraction, largest)
    with pytest.raises(UserError):
        split_stream(np.array([0, total]), fraction, largest + 1)


@given(st.integers(0, 300), st.integers(), st.integers())
def test_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(pseudo_random_order(count, seed, epoch)) == list(range(count))


def test_order_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (0,), ()]
    orders = {tuple(pseudo_random_order(50, *key)) for key in keys}
    assert len(orders) == len(keys)
    # A change here would make every run that is resumed see other data.
    assert pseudo_random_order(10, 7, 3).tolist() == [6, 1, 8, 4, 2, 9, 3, 7, 5, 0]
