"""Best-fit packing: nothing lost, nothing cut needlessly, little padding."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.config import DataConfig
from mst_train.data import IGNORED, Data, Loader, best_fit, load_corpus, load_data
from mst_train.data.best_fit import BestFitSequences, packed
from mst_train.data.checked import CheckedArray, CheckedWriter
from mst_train.data.corpus import Documents
from mst_train.data.loader import collate
from mst_train.data.packing import PackedSequences
from mst_train.data.splitting import long_documents, split_corpus
from mst_train.data.statistics import packing_statistics
from mst_train.errors import UserError
from mst_train.prepare.__main__ import main

EOD = 0


# ---------------------------------------------------------------- the algorithm


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        room = [capacity - sum(lengths[i] for i in items) for items in bins]
        fitting = [number for number in range(len(bins)) if room[number] >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda number: (room[number], number))].append(item)
        else:
            bins.append([item])
    return bins


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying all assignments."""
    best = len(lengths)

    def place(item: int, room: list[int]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if item == len(lengths):
            best = len(room)
            return
        for number in range(len(room)):
            if room[number] >= lengths[item]:
                changed = [*room]
                changed[number] -= lengths[item]
                place(item + 1, changed)
        place(item + 1, [*room, capacity - lengths[item]])

    place(0, [])
    return best


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_it_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    assert best_fit.best_fit(lengths, capacity) == slow_best_fit(lengths, capacity)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(12, 20))
def test_it_is_close_to_the_fewest_bins(lengths: list[int], capacity: int) -> None:
    """The known bound: 11/9 of the fewest and 6/9 more; with so few items, one more at most."""
    bins, fewest = len(best_fit.best_fit(lengths, capacity)), fewest_bins(lengths, capacity)
    assert bins <= 11 / 9 * fewest + 6 / 9


# ---------------------------------------------------------------- sequences of documents


def make(lengths: list[int], folder: Path, shards: int = 2) -> tuple[np.ndarray, Documents]:
    """Documents 1, 2, 3, ... and EOD, of these lengths with it, in shards."""
    tokens, arrays, starts = [], [], [0]
    for number, part in enumerate(np.array_split(lengths, shards)):
        with CheckedWriter(folder / f"{number}.offsets") as writer:
            writer.write(np.cumsum([0, *part]).astype("<i8"))
            written = writer.close()
        arrays.append(CheckedArray(folder / f"{number}.offsets", written, "<i8", None, ""))
        tokens += [token for length in part for token in [*range(1, length), EOD]]
        starts.append(len(tokens))
    return np.array(tokens, np.uint16), Documents(arrays, np.array(starts))


def sequences_of(
    tokens: np.ndarray, documents: Documents, spans: np.ndarray, length: int, confined: bool
) -> BestFitSequences:
    packs = list(itertools.chain(*packed(documents, spans, length)))
    starts = np.cumsum([0, *map(len, packs)])
    pieces = np.array([number for pack in packs for piece in pack for number in piece])
    return BestFitSequences(tokens, starts, pieces, length, EOD, confined)


LENGTHS = st.lists(st.integers(2, 30), min_size=2, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@given(LENGTHS, st.integers(2, 12), st.booleans(), st.integers(1, 60))
@settings(max_examples=80)
def test_each_token_is_predicted_once_from_its_own_document(
    folder: Path, lengths: list[int], length: int, confined: bool, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "WINDOW_TOKENS", window)
        patch.setattr(best_fit, "WINDOW_SEQUENCES", 1)
        tokens, documents = make(lengths, folder)
        spans = np.array([[0, len(tokens)]])
        sequences = sequences_of(tokens, documents, spans, length, confined)
    predicted = 0
    for index in range(len(sequences)):
        inputs, labels, positions, starts = sequences[index]
        assert len(inputs) == len(labels) == len(positions) == length
        valid = labels != IGNORED
        predicted += valid.sum()
        # A document counts up from 1, so what follows a token is one more, or its end.
        assert ((labels == inputs + 1) | (labels == EOD))[valid].all()
        assert valid.any()
        assert (labels[inputs == EOD] == IGNORED).all()
        if confined:
            assert starts[0] == 0 and (np.diff(starts) > 0).all()
            for start, stop in itertools.pairwise([*starts, length]):
                assert positions[start:stop].tolist() == list(range(stop - start))
                assert EOD not in inputs[start : stop - 1] or (inputs[start:stop] == EOD).all()
        else:
            assert starts is None and positions.tolist() == list(range(length))
    assert predicted == sum(lengths) - len(lengths)
    assert sequences.used_tokens() <= len(tokens)


@given(LENGTHS, st.integers(2, 40))
@settings(max_examples=80)
def test_documents_that_fit_are_whole(folder: Path, lengths: list[int], length: int) -> None:
    """As few documents as possible are cut: those that are longer than a sequence."""
    tokens, documents = make(lengths, folder)
    spans = np.array([[0, len(tokens)]])
    packs = list(itertools.chain(*packed(documents, spans, length)))
    pieces = sorted(piece for pack in packs for piece in pack)
    borders = np.cumsum([0, *lengths])
    whole = {(int(a), int(b - a)) for a, b in itertools.pairwise(borders)}
    assert {piece for piece in whole if piece[1] <= length} <= set(pieces)
    assert all(sum(size for _, size in pack) <= length for pack in packs)
    # The rest of a long document is one piece, and full sequences hold nothing else.
    cut = [size for start, size in pieces if (start, size) not in whole]
    fewest = sum(-(-n // length) - (n % length == 1) for n in lengths if n > length)
    assert len(cut) == fewest


def test_documents_that_go_on_behind_the_span(folder: Path) -> None:
    """The last token of the span is a label, and the held-out tokens are in no sequence."""
    tokens, documents = make([5, 20], folder)
    sequences = sequences_of(tokens, documents, np.array([[0, 12]]), 8, True)
    found = [sequences[index] for index in range(len(sequences))]
    assert [s.tokens.tolist() for s in found] == [
        [1, 2, 3, 4, 5, 6, 0, 0],
        [1, 2, 3, 4, 0, 0, 0, 0],
    ]
    assert found[0].labels.tolist() == [2, 3, 4, 5, 6, 7, IGNORED, IGNORED]
    assert found[1].labels[:5].tolist() == [2, 3, 4, 0, IGNORED]
    held_out = sequences_of(tokens, documents, np.array([[12, 25]]), 8, True)
    assert held_out[0].tokens.tolist() == list(range(8, 16))


def test_padding_is_confined_to_itself(folder: Path) -> None:
    tokens, documents = make([4, 3], folder)
    sequences = sequences_of(tokens, documents, np.array([[0, 7]]), 10, True)
    sequence = sequences[0]
    assert sequence.tokens.tolist() == [1, 2, 3, 0, 1, 2, 0, 0, 0, 0]
    assert sequence.labels.tolist() == [2, 3, 0, IGNORED, 2, 0, IGNORED] + [IGNORED] * 3
    assert sequence.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert sequence.starts.tolist() == [0, 4, 7]
    assert collate(sequences, [0]).cu_seqlens.tolist() == [0, 4, 7, 10]
    for index in (-1, 1):
        with pytest.raises(IndexError):
            sequences[index]


# ---------------------------------------------------------------- prepared folders


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, prose) -> Path:
    source = tmp_path_factory.mktemp("source")
    for number in range(60):
        (source / f"{number:02}.txt").write_text(prose(number, 15 + 9 * (number % 11)))
    folder = tmp_path_factory.mktemp("prepared") / "out"
    status = main(
        [
            f"data.source={source}",
            "data.tokenizer_vocab_size=300",
            "data.sequence_length=256",
            "data.packing=best_fit",
            "data.validation_fraction=0.1",
            f"prepare.output={folder}",
            "prepare.workers=1",
        ]
    )
    assert status == 0
    return folder


def config(folder: Path, tmp_path: Path, **changes: object) -> DataConfig:
    settings = {"sequence_length": 256, "packing": "best_fit", "validation_fraction": 0.1}
    return DataConfig(source=str(folder), cache_dir=str(tmp_path / "cache"), **settings | changes)


def rows(data: Data) -> list[list[int]]:
    return [data.training[index].tokens.tolist() for index in range(len(data.training))]


def test_prepared_index_is_used(prepared: Path, tmp_path: Path) -> None:
    data = load_data(config(prepared, tmp_path))
    assert isinstance(data.training, BestFitSequences) and data.validation is not None
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"sequence_length=1000000 needs"):
        load_data(config(prepared, tmp_path, sequence_length=10**6))


def test_other_lengths_are_packed_into_the_cache(prepared: Path, tmp_path: Path) -> None:
    first = load_data(config(prepared, tmp_path, sequence_length=200))
    (index,) = (tmp_path / "cache" / "packing").iterdir()
    before = {path.name: path.stat().st_ino for path in index.iterdir()}
    second = load_data(config(prepared, tmp_path, sequence_length=200))
    assert rows(first) == rows(second)
    assert {path.name: path.stat().st_ino for path in index.iterdir()} == before
    assert first.corpus_fingerprint == second.corpus_fingerprint
    stream = load_data(config(prepared, tmp_path, sequence_length=200, packing="stream"))
    assert isinstance(stream.training, PackedSequences)
    assert stream.corpus_fingerprint != first.corpus_fingerprint


@pytest.mark.parametrize("name", ["training.pieces", "training.starts", "index.json"])
def test_damaged_index(prepared: Path, tmp_path: Path, name: str) -> None:
    data = config(prepared, tmp_path, sequence_length=200)
    load_data(data)
    (index,) = (tmp_path / "cache" / "packing").iterdir()
    raw = bytearray((index / name).read_bytes())
    raw[9] ^= 255
    (index / name).write_bytes(raw)
    with pytest.raises(UserError, match=rf"(is damaged|cannot be read).*: delete {index}, it is"):
        load_data(data).training[0]


def test_validation_is_the_same_documents_as_in_streams(prepared: Path, tmp_path: Path) -> None:
    streamed = load_data(config(prepared, tmp_path, packing="stream")).validation
    fitted = load_data(config(prepared, tmp_path)).validation
    assert streamed is not None and fitted is not None
    tokens = set(map(tuple, (streamed[0].tokens.reshape(-1, 8)).tolist()))
    flat = np.concatenate([fitted[index].tokens for index in range(len(fitted))])
    windows = set(map(tuple, np.lib.stride_tricks.sliding_window_view(flat, 8).tolist()))
    assert len(tokens & windows) > 0.8 * len(tokens)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_the_loader_goes_on_exactly(prepared: Path, tmp_path: Path, packing: str) -> None:
    """Stopped after any number of batches, read ahead or not, with the data opened anew."""

    def loader(position: int) -> Loader:
        data = load_data(config(prepared, tmp_path, packing=packing, attention="documents"))
        return Loader(data.training, 3, seed=5, position=position)

    whole = loader(0)
    batches = [next(whole) for _ in range(30)]
    assert whole.state() == 90 > 2 * len(load_data(config(prepared, tmp_path)).training)
    for stopped in (0, 1, 2, 7, 13, 29):
        first = loader(0)
        for _ in range(stopped):
            next(first)
        again = loader(first.state())
        for expected in batches[stopped : stopped + 3]:
            found = next(again)
            for name in ("tokens", "labels", "positions", "cu_seqlens"):
                assert getattr(found, name).equal(getattr(expected, name))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_statistics(prepared: Path, tmp_path: Path, packing: str) -> None:
    """Against a count over every sequence."""
    corpus = load_corpus(DataConfig(source=str(prepared)))
    streams = split_corpus(corpus.documents, 0.1, 128)
    data = load_data(config(prepared, tmp_path, packing=packing, sequence_length=128))
    sequences = {"training": data.training, "validation": data.validation}
    found = packing_statistics(corpus, packing, 128, streams, sequences)
    borders = corpus.documents.borders(0, len(corpus.documents))
    lengths = np.diff(borders)
    assert found["documents"] == 60 and found["longest_document_tokens"] == lengths.max()
    assert sum(bin["documents"] for bin in found["lengths"]) == 60
    assert sum(bin["tokens"] for bin in found["lengths"]) == borders[-1]
    for bin in found["lengths"]:
        inside = lengths[(lengths >= bin["from"]) & (lengths < bin["below"])]
        assert (bin["documents"], bin["tokens"]) == (len(inside), inside.sum())
    for name, spans in streams.items():
        about = found[name]
        inside = [
            (a, b) for a, b in itertools.pairwise(borders) if any(s <= a < e for s, e in spans)
        ]
        assert about["documents"] == len(inside)
        assert about["sequences"] == len(sequences[name])
        held = about["sequences"] * 128
        assert about["tokens"] == sum(b - a for a, b in inside)
        assert about["tokens"] - about["tokens_left_out"] + about["padding_tokens"] == held
        if packing == "best_fit":
            assert about["documents_cut"] == sum(b - a > 128 for a, b in inside)
        else:
            assert about["padding_tokens"] == 0
            places = np.cumsum([0, *(b - a for a, b in inside)])
            cut = [a // 128 != min(b - 1, held) // 128 for a, b in itertools.pairwise(places)]
            assert about["documents_cut"] == sum(cut)


def test_statistics_are_written(prepared: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (prepared / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert '"packing": "best_fit"' in (prepared / "packing.json").read_text()


def test_without_matplotlib(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mst_train.prepare.folder.draw_lengths", missing)
    (tmp_path / "a.txt").write_text("some words " * 2000)
    tokenizer = prepared / "tokenizer.model"
    out = tmp_path / "out"
    arguments = [f"data.source={tmp_path / 'a.txt'}", f"data.tokenizer={tokenizer}"]
    assert main([*arguments, f"prepare.output={out}", "prepare.workers=1"]) == 0
    assert "no lengths.png: pip install matplotlib draws it" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "packing.json", "shards", "tokenizer.model"}


def missing(*arguments: object) -> None:
    raise ImportError("matplotlib")


# ---------------------------------------------------------------- long documents


@given(LENGTHS, st.integers(1, 35), st.integers(1, 7))
@settings(max_examples=60)
def test_long_documents(folder: Path, lengths: list[int], minimum: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mst_train.data.splitting.CHUNK_DOCUMENTS", chunk)
        tokens, documents = make(lengths, folder)
        spans = long_documents(documents, np.array([[0, len(tokens)]]), minimum)
    borders = np.cumsum([0, *lengths])
    expected = [t for a, b in itertools.pairwise(borders) if b - a >= minimum for t in range(a, b)]
    assert [token for start, end in spans for token in range(start, end)] == expected


def test_a_sequence_longer_than_its_length_is_refused() -> None:
    tokens = np.arange(30, dtype=np.uint16)
    sequences = BestFitSequences(tokens, np.array([0, 2]), np.array([0, 5, 9, 9]), 8, 0, False)
    with pytest.raises(UserError, match="has a sequence with more"):
        sequences[0]
