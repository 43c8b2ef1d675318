import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_train.data.order import pseudo_random_order, shuffled
from mst_train.data.splitting import merged, split_corpus, split_documents
from mst_train.errors import UserError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)
FRACTIONS = st.floats(0.001, 0.9)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


class Borders:
    """``Documents`` of these offsets."""

    def __init__(self, offsets: np.ndarray) -> None:
        self.offsets, self.looked_up = offsets, 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def start(self, document: int) -> int:
        return int(self.offsets[document])

    def at(self, token: int) -> int:
        self.looked_up += 1
        return int(np.searchsorted(self.offsets, token, side="right")) - 1

    def borders(self, first: int, last: int) -> np.ndarray:
        return self.offsets[first : last + 1]


Split = tuple[np.ndarray, np.ndarray | None]


def streams_of(documents: Borders, fraction: float, length: int) -> Split:
    """The spans of training and of validation."""
    streams = split_corpus(documents, fraction, length)
    return streams.pop("training"), streams.pop("validation", None)


def split(offsets: np.ndarray, fraction: float, length: int) -> Split:
    return streams_of(Borders(offsets), fraction, length)


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
            split(offsets_of(lengths), fraction, sequence_length)
        return
    training, validation = split(offsets_of(lengths), fraction, sequence_length)
    held_out = [] if validation is None else covered(validation)
    assert (validation is None) == (fraction == 0)
    assert sorted(covered(training) + held_out) == list(range(total))
    assert len(covered(training)) >= minimum
    assert not fraction or len(held_out) >= minimum


def test_one_huge_document_holds_out_its_end() -> None:
    training, validation = split(np.array([0, 10_000]), 0.05, 100)
    assert training.tolist() == [[0, 9500]]
    assert validation is not None and validation.tolist() == [[9500, 10_000]]


def test_at_least_a_sequence_is_held_out() -> None:
    _, validation = split(np.array([0, 10_000]), 0.001, 100)
    assert validation is not None and validation.tolist() == [[9899, 10_000]]
    _, validation = split(np.arange(0, 10_001, 10), 0.001, 100)
    assert validation is not None and len(covered(validation)) == 110
    # Documents longer than the fraction, but not than a sequence, are held out whole.
    _, validation = split(np.arange(0, 10_001, 50), 0.001, 100)
    assert validation is not None and len(covered(validation)) == 150


def test_training_keeps_at_least_a_sequence() -> None:
    training, validation = split(np.array([0, 210]), 0.9, 100)
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
        split(np.array([0, total]), fraction, sequence_length)
    assert str(caught.value) == expected
    largest = int(expected.split("data.sequence_length to ")[1].split()[0])
    split(np.array([0, total]), fraction, largest)
    with pytest.raises(UserError):
        split(np.array([0, total]), fraction, largest + 1)


@given(st.integers(0, 300), st.integers(), st.integers())
def test_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(pseudo_random_order(count, seed, epoch)) == list(range(count))


def test_order_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (0,), ()]
    orders = {tuple(pseudo_random_order(50, *key)) for key in keys}
    assert len(orders) == len(keys)
    # A change here would make every run that is resumed see other data.
    assert pseudo_random_order(10, 7, 3).tolist() == [6, 1, 8, 4, 2, 9, 3, 7, 5, 0]


@given(st.integers(1, 300), st.integers(), st.integers())
def test_shuffling_without_the_whole_order(count: int, seed: int, epoch: int) -> None:
    order = [shuffled(place, count, seed, epoch) for place in range(count)]
    assert sorted(order) == list(range(count))


def test_shuffling_is_fixed_and_even() -> None:
    # A change here would make every run that is resumed see other data.
    assert [shuffled(place, 10, 7, 3) for place in range(10)] == [2, 9, 0, 8, 4, 5, 7, 6, 1, 3]
    assert shuffled(123_456_789, 6_000_000_000, 1, 2) == 3_323_661_399
    keys = ((0,), (1,), (0, 1))
    assert len({tuple(shuffled(place, 50, *key) for place in range(50)) for key in keys}) == 3
    # Over many keys each place holds each number about as often, and neighbours are torn apart.
    counts = np.zeros((5, 5))
    for key in range(2000):
        for place in range(5):
            counts[place, shuffled(place, 5, key)] += 1
    assert counts.min() > 320 and counts.max() < 480
    order = np.array([shuffled(place, 4096, 9) for place in range(4096)])
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.05
    assert np.abs(np.diff(order)).mean() == pytest.approx(4096 / 3, rel=0.05)


# ---------------------------------------------------------------- many documents


@given(st.lists(st.integers(1, 60), min_size=20, max_size=120), FRACTIONS, st.integers(1, 60))
def test_ranges_of_many_documents(lengths: list[int], fraction: float, length: int) -> None:
    documents = Borders(offsets_of(lengths))
    total, minimum = sum(lengths), length + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mst_train.data.splitting.MANY_DOCUMENTS", 10)
        patch.setattr("mst_train.data.splitting.RANGES", 4)
        if total < 2 * minimum:
            with pytest.raises(UserError):
                streams_of(documents, fraction, length)
            return
        training, validation = streams_of(documents, fraction, length)
    assert validation is not None
    assert sorted(covered(training) + covered(validation)) == list(range(total))
    assert min(len(covered(training)), len(covered(validation))) >= minimum
    if len(validation) > 1:
        assert set(validation.ravel().tolist()) <= set(documents.offsets.tolist())


def test_many_documents_are_split_by_few_of_them() -> None:
    documents = Borders(np.arange(0, 30_000_001, 30))
    training, validation = streams_of(documents, 0.01, 1000)
    assert validation is not None and len(validation) == 64
    assert len(covered(validation)) == pytest.approx(300_000, rel=0.01)
    assert documents.looked_up == 128
    assert np.diff(validation[:, 0]).max() < 2 * 30_000_000 / 64
    assert streams_of(documents, 0.0, 1000)[1] is None
    again = streams_of(documents, 0.01, 1000)[1]
    assert np.array_equal(validation, again)
    one_huge = Borders(np.concatenate([[0, 10**9], 10**9 + np.arange(1, 70_000)]))
    training, validation = streams_of(one_huge, 0.01, 1000)
    assert training[-1, 1] == validation[0, 0] and validation[-1, 1] == one_huge.offsets[-1]
