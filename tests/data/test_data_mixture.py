"""Several sources drawn from by weight: exact shares, epochs of their own, exact resuming."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.cli.compose import compose
from mst_train.config import DataConfig, MixtureConfig, ValidationSetConfig
from mst_train.data import Loader, load_data
from mst_train.data.mixture import MixedSequences
from mst_train.data.packing import PackedSequences, Sequences
from mst_train.errors import UserError

Configure = Callable[..., DataConfig]

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def make(*counts: int) -> list[PackedSequences]:
    """Sources of so many sequences of one token, all different."""
    borders = np.cumsum([0, *counts])
    tokens = [np.arange(a, b + 1, dtype=np.uint32) for a, b in itertools.pairwise(borders)]
    return [PackedSequences(part, np.array([[0, len(part)]]), 1) for part in tokens]


@given(WEIGHTS, st.integers(1, 500))
def test_shares_at_every_moment(weights: list[float], count: int) -> None:
    mixed = MixedSequences(make(*[5] * len(weights)), weights)
    drawn = [0] * len(weights)
    for position in range(count):
        number, before = mixed.part_at(position)
        assert before == drawn[number]
        drawn[number] += 1
        for share, weight in zip(drawn, weights, strict=True):
            assert abs(share - (position + 1) * weight / sum(weights)) < 2


@given(WEIGHTS, st.integers(0, 10**15))
def test_shares_far_into_a_run(weights: list[float], position: int) -> None:
    """The place is computed, not counted, and exact: no draw is missing between neighbours."""
    mixed = MixedSequences(make(*[5] * len(weights)), weights)
    latest: dict[int, int] = {}
    for number, before in map(mixed.part_at, range(position, position + 30)):
        assert latest.setdefault(number, before) == before
        latest[number] = before + 1


def test_each_source_has_its_own_epochs() -> None:
    mixed = MixedSequences(make(4, 10, 3), [2, 1, 1])
    stream = [mixed.drawn(position, 7) for position in range(160)]
    parts = [0] * 4 + [1] * 10 + [2] * 3
    assert Counter(parts[index] for index in stream) == {0: 80, 1: 40, 2: 40}
    for part, size in ((0, 4), (1, 10), (2, 3)):
        own = [index for index in stream if parts[index] == part]
        epochs = [tuple(own[k : k + size]) for k in range(0, len(own), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert len(set(epochs)) > 1
    assert [int(mixed[index].tokens[0]) for index in range(17)] == list(range(17))
    with pytest.raises(IndexError, match="sequence 17 of 17"):
        mixed[17]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=30)
def test_the_loader_goes_on_exactly(sizes: list[int], seed: int) -> None:
    mixed = MixedSequences(make(4, 10, 3), [0.5, 0.3, 0.2])
    whole = Loader(mixed, 1, seed)
    expected = [int(next(whole).tokens[0]) for _ in range(sum(sizes))]
    found, position = [], 0
    for size in sizes:
        loader = Loader(mixed, size, seed, position)
        found += [int(row[0]) for row in next(loader).tokens]
        position = loader.state()
    assert found == expected


def test_validation_sequences_are_spread_by_weight() -> None:
    mixed = MixedSequences(make(40, 100, 3), [2, 1, 1])
    spread = mixed.spread(8)
    assert spread == [0, 10, 20, 30, 40, 90, 140, 141]
    assert len(mixed.spread(1000)) == 40 + 36 + 3


# ---------------------------------------------------------------- from a configuration


@pytest.fixture
def two(configure: Configure, prose: Callable[[int, int], str], tmp_path: Path) -> DataConfig:
    (tmp_path / "other").mkdir()
    for number in range(20):
        words = 400 if number % 5 == 0 else 30
        (tmp_path / "other" / f"{number:02}.txt").write_text(prose(100 + number, words))
    from mst_train.data.documents import find_documents
    from mst_train.data.tokenizer import train_tokenizer

    train_tokenizer(find_documents(configure()).documents(), 300).save(tmp_path / "t.model")
    mixture = [MixtureConfig(configure().source, 3.0), MixtureConfig(str(tmp_path / "other"), 1.0)]
    return configure(mixture=mixture, tokenizer=str(tmp_path / "t.model"))


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_mixture_of_sources(two: DataConfig, packing: str) -> None:
    data = load_data(replace(two, packing=packing))
    alone = load_data(replace(two, packing=packing, mixture=[]))
    own = {tuple(alone.training[i].tokens.tolist()) for i in range(len(alone.training))}
    loader = Loader(data.training, 10, seed=0)
    drawn = [tuple(row.tolist()) for _ in range(20) for row in next(loader).tokens]
    assert sum(row in own for row in drawn) == 150
    assert data.validation is not None and alone.validation is not None
    assert len(data.validation) > len(alone.validation)
    other = load_data(replace(two, packing=packing, mixture=two.mixture[::-1]))
    assert len({data.corpus_fingerprint, alone.corpus_fingerprint, other.corpus_fingerprint}) == 3


def test_long_documents_alone(two: DataConfig) -> None:
    mixture = [two.mixture[0], replace(two.mixture[1], min_document_tokens=300)]
    data = load_data(replace(two, mixture=mixture))
    whole = load_data(two)
    assert len(data.training) < len(whole.training)
    assert data.corpus_fingerprint != whole.corpus_fingerprint
    with pytest.raises(UserError, match=r"no documents of min_document_tokens=99999 or more"):
        load_data(replace(two, mixture=[replace(mixture[1], min_document_tokens=99_999)]))


def rows(sequences: Sequences) -> list[list[int]]:
    return [sequences[number].tokens.tolist() for number in range(len(sequences))]


def test_sources_and_other_texts_have_validation_sets(two: DataConfig, tmp_path: Path) -> None:
    first, second = (replace(two, mixture=[], source=part.source) for part in two.mixture)
    sets = [ValidationSetConfig("whole", second.source)]
    found = load_data(replace(two, validation_sets=sets)).validation_sets
    assert list(found) == [Path(first.source).name, "other", "whole"]
    alone = [load_data(data).validation for data in (first, second)]
    assert alone[0] is not None and alone[1] is not None
    assert [rows(some) for some in found.values()] == [
        rows(alone[0]),
        rows(alone[1]),
        rows(load_data(replace(second, validation_fraction=0.0)).training),
    ]
    assert not load_data(first).validation_sets
    assert not load_data(replace(two, mixture=two.mixture[:1])).validation_sets
    twice = replace(two, mixture=[two.mixture[1]] * 2)
    assert list(load_data(twice).validation_sets) == ["other", "other_2"]
    alike = replace(two, validation_sets=[ValidationSetConfig("other", second.source)])
    with pytest.raises(UserError, match=r"other is the name of a source of data\.mixture"):
        load_data(alike)
    data = load_data(first)
    assert load_data(replace(first, validation_sets=sets)).corpus_fingerprint == (
        data.corpus_fingerprint
    )


def test_tokenizers_must_agree(two: DataConfig, tmp_path: Path) -> None:
    alone = replace(two, mixture=[], tokenizer=None)
    sets = [ValidationSetConfig("b", str(tmp_path / "other"))]
    with pytest.raises(UserError, match=r"data.validation_sets: .*other has another tokenizer"):
        load_data(replace(alone, validation_sets=sets))
    file = r"set data\.tokenizer=\S+/tokenizers/\S+\.model, or"
    with pytest.raises(UserError, match=rf"data.mixture: .*other has another tokenizer.*{file}"):
        load_data(replace(two, tokenizer=None))


def test_mixture_on_the_command_line() -> None:
    data = compose(["data.mixture=[{source:a/b,weight:2},{source:c,min_document_tokens:9}]"]).data
    assert data.mixture == [MixtureConfig("a/b", 2.0), MixtureConfig("c", 1.0, 9)]
    for argument, message in (
        ("data.mixture=[{source:a,weight:0}]", "data.mixture[0].weight=0.0 must be greater"),
        ("data.mixture=[{weight:1}]", "data.mixture[0].source is empty"),
        ("data.mixture=[{source:a,min_document_tokens:-1}]", "tokens=-1 must be at least 0"),
        ("data.mixture=[{sauce:a}]", "data.mixture[0].sauce is not a setting: "),
        ("data.validation_sets=[{name: a/b, source: c}]", "[0].name=a/b cannot be a name"),
        ("data.validation_sets=[{name: by_position, source: c}]", "cannot be a name"),
        ("data.validation_sets=[{name: a, source: c},{name: a, source: d}]", "[1].name=a is there"),
        ("data.mixture=3", "data.mixture=3 is not a list: put it in brackets, such as [a,b]"),
    ):
        with pytest.raises(UserError) as caught:
            compose([argument])
        assert message in str(caught.value)
