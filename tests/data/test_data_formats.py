"""Each kind of file, read in pieces of any size: the same documents, the same places."""

import gzip
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.config import DataConfig
from mst_train.data import documents as documents_module
from mst_train.data import load_corpus, readers
from mst_train.data.documents import Source, find_documents
from mst_train.data.pieces import Document, ranges, refuse
from mst_train.data.readers import JsonLines, Parquet
from mst_train.errors import UserError
from mst_train.prepare.__main__ import main


def all_of(source: Source, limit: int) -> list[Document]:
    pieces = source.divide(limit)
    return [document for piece in pieces for document in source.reader.read(piece, refuse)]


# ---------------------------------------------------------------- lines of JSON


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        half = len(content) // 2  # two members, one after the other
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        half = len(content) // 2
        compress = pyarrow.Codec("zstd").compress
        return b"".join(compress(part, asbytes=True) for part in (content[:half], content[half:]))
    return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@given(
    lines=st.lists(st.one_of(st.text(max_size=20), st.none(), st.just(3)), max_size=12),
    parts=st.integers(1, 9),
    end=st.sampled_from(["", "\n", "\n\n"]),
)
@settings(max_examples=25)
def test_pieces_of_lines(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    lines: list[str | int | None],
    parts: int,
    end: str,
) -> None:
    """However a file is divided: each line once, and problems with the number of their line."""
    path = tmp_path_factory.mktemp("lines") / f"a.jsonl{suffix}"
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    rows = [row.encode(errors="surrogatepass") for row in rows]
    raw = b"\xef\xbb\xbf" + b"\n".join(rows) + end.encode()
    path.write_bytes(compressed(raw, suffix))
    reader = JsonLines("text")
    assert reader.measure(path) == len(raw)
    found, problems, sizes = [], [], 0
    for start, stop in ranges(len(raw), parts):
        documents = list(reader.read(path, start, stop, problems.append))
        found += [document.content for document in documents]
        sizes += sum(document.size for document in documents)
    bad = [n for n, line in enumerate(lines, 1) if isinstance(line, int) or surrogate(line)]
    assert found == [line for line in lines if isinstance(line, str) and not surrogate(line)]
    assert [str(problem).split(f"{path}:")[1].split(" ")[0].strip(":") for problem in problems] == [
        str(number) for number in bad
    ]
    assert sizes <= len(raw)


def surrogate(line: object) -> bool:
    return isinstance(line, str) and any("\ud800" <= character <= "\udfff" for character in line)


def test_compressed_files_have_few_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 10_000))
    reader = JsonLines("text")
    assert len(list(reader.divide(tmp_path / "a.jsonl.gz", 140_000, 1000))) == 16
    assert len(list(reader.divide(tmp_path / "a.jsonl", 140_000, 1000))) == 140


# ---------------------------------------------------------------- long text files


@given(st.text(st.sampled_from("ab\u00e9\U0001f4a9\n \ufeff"), max_size=60), st.integers(1, 20))
@settings(max_examples=60)
def test_long_files_are_read_in_parts(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "TEXT_PART_BYTES", limit)
        parts = list(readers.read_text(path, refuse))
        path.write_bytes(text.encode() + b"\xff")
        problems: list[UserError] = []
        assert list(readers.read_text(path, problems.append)) == []
    assert "a.txt is not UTF-8" in str(problems[0]) and len(problems) == 1
    assert "".join(part.content for part in parts) == text.removeprefix("\ufeff")
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert sum(part.size for part in parts) == len(text.encode())


def test_a_long_file_is_one_document(
    tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TEXT_PART_BYTES", 500)
    texts = [prose(0, 900), prose(1, 20), prose(2, 500).replace(" ", "\n")]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    config = DataConfig(
        source=str(tmp_path), tokenizer_vocab_size=300, cache_dir=str(tmp_path / "cache")
    )
    corpus = load_corpus(config)
    borders = corpus.documents.borders(0, 3)
    for (start, stop), text in zip(itertools.pairwise(borders), texts, strict=True):
        assert corpus.tokens[stop - 1 : stop].tolist() == [corpus.eod]
        assert corpus.tokenizer.decode(corpus.tokens[start : stop - 1].tolist()) == text


# ---------------------------------------------------------------- parquet


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 400))
@settings(max_examples=25)
def test_pieces_of_row_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], target: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    numbers = itertools.count()
    schema = pyarrow.schema([("n", pyarrow.int64()), ("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows in groups:
            texts = [f"text {next(numbers)}" for _ in range(rows)]
            writer.write_table(pyarrow.table({"n": list(range(rows)), "text": texts}, schema))
    reader = Parquet("text")
    size = reader.measure(path)
    pieces = list(reader.divide(path, size, target))
    assert sum(part for _, _, part in pieces) == size
    assert [start for start, _, _ in pieces[1:]] == [stop for _, stop, _ in pieces[:-1]]
    found = [d for start, stop, _ in pieces for d in reader.read(path, start, stop, refuse)]
    assert [document.content for document in found] == [f"text {k}" for k in range(sum(groups))]


# ---------------------------------------------------------------- Megatron's files

CODES = {"u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str = "<u2") -> None:
    """Documents of sequences of ids, as Megatron's builder lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    places = np.concatenate([[0], np.cumsum(lengths)])[:-1] * np.dtype(dtype).itemsize
    borders = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    )
    header = struct.pack(
        "<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(sequences), len(documents) + 1
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(
        header
        + lengths.tobytes()
        + places.astype("<i8").tobytes()
        + borders.astype("<i8").tobytes()
    )


@pytest.mark.parametrize("dtype", CODES)
def test_megatron_files_round_trip(tmp_path: Path, dtype: str) -> None:
    """To shards and back: the ids, the documents, and one end-of-document id for each."""
    random = np.random.default_rng(0)
    texts = [random.integers(1, 100, size).tolist() for size in (5, 1, 300, 40)]
    documents = [
        [texts[0] + [0]],
        [texts[1]],
        [texts[2][:100], texts[2][100:]],
        [[0]],
        [],
        [texts[3]],
    ]
    write_megatron(tmp_path / "tokens", documents, dtype)
    status = main(
        [
            f"data.source={tmp_path / 'tokens'}",
            f"prepare.output={tmp_path / 'out'}",
            "prepare.workers=1",
            "prepare.vocab_size=100",
            "prepare.end_of_document=0",
        ]
    )
    assert status == 0
    corpus = load_corpus(DataConfig(source=str(tmp_path / "out")))
    assert (corpus.vocab_size, corpus.eod) == (100, 0)
    borders = corpus.documents.borders(0, len(corpus.documents))
    found = [corpus.tokens[a:b].tolist() for a, b in itertools.pairwise(borders)]
    assert found == [[*text, 0] for text in texts]
    with pytest.raises(UserError, match="prepared without a tokenizer"):
        corpus.tokenizer.decode([1])
    # And back.
    write_megatron(tmp_path / "again", [[document] for document in found], dtype)
    again = find_documents(DataConfig(source=str(tmp_path / "again.idx")))
    assert [document.content.tolist() for document in all_of(again, 100)] == found


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=10), st.integers(1, 60))
@settings(max_examples=25)
def test_pieces_of_token_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], target: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    numbers = itertools.count()
    documents = [
        [[next(numbers) for _ in range(length)] for length in document] for document in lengths
    ]
    write_megatron(folder / "t", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "SMALLEST_PIECE", 1)
        patch.setattr(documents_module, "PIECES", 1)
        for name in ("t.idx", "t.bin", "t"):
            source = find_documents(DataConfig(source=str(folder / name)))
            found = [document.content.tolist() for document in all_of(source, target)]
            assert found == [list(itertools.chain(*document)) for document in documents]


def test_token_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*settings: str) -> str:
        arguments = [f"data.source={tmp_path / 't.idx'}", f"prepare.output={tmp_path / 'out'}"]
        assert main([*arguments, "prepare.workers=1", *settings]) == 2
        return capsys.readouterr().err

    ids = ("prepare.vocab_size=100", "prepare.end_of_document=0")
    write_megatron(tmp_path / "t", [[[1, 2, 100]]])
    assert "holds the token ids 1 to 100, and the vocabulary has 100: give the" in refused(*ids)
    (tmp_path / "out").rename(tmp_path / "first")
    assert "holds tokens and no text to train a tokenizer on: give the one that" in refused()
    (tmp_path / "out").rename(tmp_path / "second")
    assert "give both or neither" in refused(ids[0])
    good = (tmp_path / "t.idx").read_bytes()
    for raw, reason in (
        (b"TNTIDX" + good[6:], "does not begin as"),
        (good[:20], "does not begin as"),
        (good[:-8], "too short for"),
        (good[:17] + b"\x07" + good[18:], "type 7"),
        (good[:34] + b"\xff\xff\xff\xff" + good[38:], "is negative"),
        (good[:34] + b"\x40\0\0\0" + good[38:], "t.bin has 6 bytes, which it does not fit"),
        (good[:-8] + b"\x09" + good[-7:], "do not follow"),
    ):
        (tmp_path / "t.idx").write_bytes(raw)
        assert reason in refused(*ids)
    (tmp_path / "t.idx").write_bytes(good)
    (tmp_path / "t.bin").unlink()
    assert "t.idx is the index of that file, put it beside" in refused(*ids)


# ---------------------------------------------------------------- code


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    for name, content in {
        "one/b.py": "import a",
        "one/a/x.py": "x = 1\n",
        "one/notes.tex": "no",
        "two/Makefile": "all:\n",
        "two/empty.py": "\n",
        "top.py": "top",
    }.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "code"


def code(folder: Path, **settings: object) -> list[str]:
    suffixes = [".py", "Makefile"]
    config = DataConfig(source=str(folder), text_suffixes=suffixes, **settings)
    return list(find_documents(config).documents())


def test_repositories(repositories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code(repositories) == ["x = 1\n", "import a", "top", "all:\n"]
    one = "=== one/a/x.py ===\nx = 1\n=== one/b.py ===\nimport a\n"
    two = "=== two/Makefile ===\nall:\n"
    top = "=== top.py ===\ntop\n"
    assert code(repositories, documents="repository") == [one, top, two]
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 1)
    monkeypatch.setattr(documents_module, "PIECES", 1000)
    assert code(repositories, documents="repository") == [one, top, two]
    monkeypatch.setattr(documents_module, "REPOSITORY_CHARACTERS", 8)
    assert code(repositories, documents="repository")[:2] == [
        "=== one/a/x.py ===\nx = 1\n",
        "=== one/b.py ===\nimport a\n",
    ]
    monkeypatch.undo()
    (repositories / os.fsdecode(b"two/\xff.py")).write_text("strange")
    assert code(repositories, documents="repository")[2] == two + "=== two/?.py ===\nstrange\n"
    (repositories / os.fsdecode(b"two/\xff.py")).unlink()
    (repositories / ".git").mkdir()
    assert code(repositories, documents="repository") == [one + top + two]


# ---------------------------------------------------------------- data sets


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {k}" for k in range(50)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    source = find_documents(DataConfig(source="owner/name"))
    assert len(source.divide(1 << 20)) == 1
    assert len(source.divide(60)) > 5
    assert [document.content for document in all_of(source, 60)] == rows["text"][:]


@pytest.mark.slow
def test_streamed_data_set(
    tmp_path: Path, prose: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece for each of its files, read where they are, by other processes as well."""
    for number in range(3):
        lines = [json.dumps({"body": prose(5 * number + row, 50)}) + "\n" for row in range(5)]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    load, builder = datasets.load_dataset, datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *rest, **more: load(str(tmp_path), *rest, **more)
    )
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, *rest: builder(str(tmp_path), *rest)
    )
    config = DataConfig(source="owner/name", streaming=True, text_field="body")
    source = find_documents(config)
    assert len(source.divide(1)) == 3
    expected = [prose(number, 50) for number in range(15)]
    assert list(source.documents()) == list(source.documents(limit=2**30)) == expected
    assert find_documents(config).fingerprint == source.fingerprint
    status = main(
        [
            "data.source=owner/name",
            "data.streaming=true",
            "data.text_field=body",
            "data.tokenizer_vocab_size=300",
            f"prepare.output={tmp_path / 'out'}",
            "prepare.workers=2",
        ]
    )
    assert status == 0
    assert len(load_corpus(DataConfig(source=str(tmp_path / "out"))).documents) == 15
