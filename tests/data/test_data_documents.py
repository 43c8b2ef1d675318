import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mst_train.config import DataConfig, ValidationSetConfig
from mst_train.data import check_sources, load_tokenizer
from mst_train.data.documents import find_documents
from mst_train.errors import UserError


def documents(source: object, **settings: str) -> list[str]:
    return list(find_documents(DataConfig(source=str(source), **settings)).documents())


def fingerprint(source: object, **settings: str) -> str:
    return find_documents(DataConfig(source=str(source), **settings)).fingerprint


def refusal(source: object, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        documents(source, **settings)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# ---------------------------------------------------------------- the standard library


def test_stdlib_is_every_python_file_but_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b.py", "b")
    write(tmp_path / "a" / "z.py", "z\r\n\0")
    write(tmp_path / "a" / "broken.py", b"\xffbroken")
    write(tmp_path / "a" / "empty.py", "")
    write(tmp_path / "notes.txt", "no")
    for excluded in ("site-packages", "dist-packages", "a/__pycache__"):
        write(tmp_path / excluded / "x.py", "no")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert documents("stdlib") == ["\ufffdbroken", "z\r\n\0", "b"]


def test_stdlib_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert "data.source=stdlib: this Python keeps no source files in" in refusal("stdlib")


@pytest.mark.slow
def test_stdlib_of_this_python() -> None:
    source = find_documents(DataConfig())
    assert any("def namedtuple(" in text for text in source.documents())


# ---------------------------------------------------------------- files


def test_folder_is_read_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    write(tmp_path / "c.TXT", "third")
    write(tmp_path / "a" / "b" / "x.txt", "first")
    write(tmp_path / "b.jsonl", '{"text": "second"}\n\n{"text": null}\n{"text": "second, too"}')
    write(tmp_path / "ignored.csv", "no")
    write_parquet(tmp_path / "d.parquet", text=["fourth", None, "fourth, too"], other=[1, 2, 3])
    write(tmp_path / "blank.txt", " \n\t")
    assert documents(tmp_path) == [
        "first",
        "second",
        "second, too",
        "third",
        "fourth",
        "fourth, too",
    ]


def test_glob_and_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/c.jsonl"):
        write(tmp_path / name, '{"text": "json"}' if name.endswith("jsonl") else name)
    assert documents(tmp_path / "**" / "*.txt") == ["a.txt", "sub/b.txt"]
    assert documents(tmp_path / "sub" / "c.jsonl") == ["json"]
    monkeypatch.chdir(tmp_path)
    assert documents("a.txt") == ["a.txt"]
    assert documents("sub") == ["sub/b.txt", "json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/sub/*.txt") == ["sub/b.txt"]


def test_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "[1]" / "a.txt", "a")
    assert documents(tmp_path / "[1]") == ["a"]


def test_characters_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "a\0b\r\nc\rd\u2028e\tf \u2581 \N{PILE OF POO}\n"
    write(tmp_path / "a.txt", "\ufeff" + text)
    write(tmp_path / "b.jsonl", "\ufeff" + json.dumps({"text": text}) + "\r\n")
    write_parquet(tmp_path / "c.parquet", text=[text])
    assert documents(tmp_path) == [text, text, text]


def test_text_field_is_the_configured_one(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    write_parquet(tmp_path / "b.parquet", text=["no"], body=["yes"])
    assert documents(tmp_path, text_field="body") == ["yes", "yes"]


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "abc")
    os.utime(file, ns=(10, 10))
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    assert fingerprint(tmp_path, text_field="body") != first
    os.utime(file, ns=(11, 11))
    assert fingerprint(tmp_path) != first
    write(file, "abcd")
    os.utime(file, ns=(10, 10))
    assert fingerprint(tmp_path) != first
    write(file, "abc")
    os.utime(file, ns=(10, 10))
    assert fingerprint(tmp_path) == first
    file.rename(tmp_path / "b.txt")
    assert fingerprint(tmp_path) != first


# ---------------------------------------------------------------- refusals of files


@pytest.mark.parametrize("name", ["/nowhere/x", "./x", "~/nowhere", "x*", "x?", "[x]", "x.jsonl"])
def test_path_that_matches_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert message.startswith(f"data.source={name} matches no file or folder: correct the path")
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("file", "loaded"), [("dataset_info.json", ""), ("dataset_dict.json", '["train"]')]
)
def test_a_data_set_that_was_saved_to_disk(file: str, loaded: str, tmp_path: Path) -> None:
    write(tmp_path / file, "{}")
    write(tmp_path / "data-00000-of-00001.arrow", "x")
    message = refusal(tmp_path)
    assert "save_to_disk" in message
    assert f'load_from_disk("{tmp_path}"){loaded}.to_parquet("texts.parquet")' in message


def test_no_usable_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a")
    for source in (tmp_path, tmp_path / "*", file):
        assert refusal(source) == (
            f"data.source={source} has no file that can be read: "
            f"it must hold or be .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .idx files "
            f"(data.text_suffixes adds others that are text)"
        )


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device be read without end."""
    write(tmp_path / "texts" / "a.txt", "text")
    special = tmp_path / "texts" / "b.txt"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(special)
        for source in (tmp_path / "texts", special, tmp_path / "texts" / "*.txt"):
            assert refusal(source).startswith(f"{special} is a pipe, a device or a socket, which")
        with pytest.raises(UserError, match="is a pipe or a device: give a file"):
            load_tokenizer(special)
        special.unlink()
    os.mkfifo(tmp_path / "texts" / "manifest.json")
    assert documents(tmp_path / "texts") == ["text"]


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "gone")
    assert refusal(tmp_path).startswith(f"{link} cannot be read (No such file or directory): make")
    link.unlink()
    file = write(link, "a")

    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert refusal(tmp_path).startswith(f"{file} cannot be read (Permission denied): make it")


def test_path_that_cannot_be_looked_up() -> None:
    assert "there is no such home folder" in refusal("~no-such-user-here/x")
    assert "cannot be looked up" in refusal("x" * 300)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_is_not_utf8(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, b"caf\xe9\n")
    where = f"{file}:1" if name == "a.jsonl" else str(file)
    message = refusal(file)
    assert message.startswith(f"{where} is not UTF-8 (") and "convert it to UTF-8" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": ', ":3 is not JSON ("),
        ("[1]", ":3 is a JSON list, not an object with a field data.text_field=text: correct"),
        ('{"body": "x", "n": 1}', ":3 has no field data.text_field=text: set data.text_field to"),
        ('{"text": 7}', ":3: data.text_field=text is of type int, not text: name"),
        ('{"text": "\\ud800"}', ":3: data.text_field=text holds half a surrogate pair"),
    ],
)
def test_line_that_cannot_be_used(line: str, expected: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    message = refusal(file)
    assert message.startswith(f"{file}{expected}")
    if "has no field" in expected:
        assert message.endswith("one of body, n")


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    assert refusal(file) == (
        f"{file} has no field data.text_field=text: set data.text_field to one of body, n"
    )
    assert refusal(file, text_field="n").startswith(
        f"{file}, row 1: data.text_field=n is of type int, not text"
    )
    write(file, "not parquet")
    assert refusal(file).startswith(f"{file} cannot be read as .parquet (")


def test_rows_are_counted_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mst_train.data.readers.PARQUET_ROWS", 2)
    column = pyarrow.array([b"ok"] * 4 + [b"\xff"]).cast(pyarrow.binary())
    file = tmp_path / "a.parquet"
    write_parquet(file, text=[str(number) for number in range(5)])
    assert documents(file) == ["0", "1", "2", "3", "4"]
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    assert "row 1: data.text_field=text is of type bytes, not text" in refusal(file)


def test_empty_corpus(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", " \n")
    write(tmp_path / "b.jsonl", '{"text": ""}\n')
    assert refusal(tmp_path) == (
        f"data.source={tmp_path} holds no text (every document is blank): "
        f"name a source with text, or another data.text_field"
    )


# ---------------------------------------------------------------- data sets


def test_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mst_train.data.huggingface.ROWS", 2)
    rows = datasets.Dataset.from_dict({"n": [1, 2, 3, 4], "body": ["a", None, " ", "b\0"]})
    asked = []

    def load_dataset(*args: object, **settings: object) -> datasets.Dataset:
        asked.append((args, settings))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find_documents(
        DataConfig(source="owner/name:english", split="test", text_field="body")
    )
    assert asked == [(("owner/name", "english"), {"split": "test"})]
    assert list(source.documents()) == ["a", "b\0"]
    assert list(source.documents()) == ["a", "b\0"]
    assert fingerprint("owner/name", text_field="body") == source.fingerprint
    assert asked[1] == (("owner/name", None), {"split": "train"})

    assert refusal("owner/name") == (
        "the data set owner/name has no field data.text_field=text: "
        "set data.text_field to one of n, body"
    )
    message = refusal("owner/name", text_field="n")
    assert message.startswith("owner/name, row 1: data.text_field=n is of type int, not text")
    rows = rows.select([0])
    assert fingerprint("owner/name", text_field="body") != source.fingerprint


def test_data_set_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a streamed one does where the connection breaks."""

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": str(number)} for number in range(5))
        raise ConnectionError("the server has gone\nmore lines")

    monkeypatch.setattr("mst_train.data.huggingface.ROWS", 2)
    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=""))
    found = find_documents(DataConfig(source="owner/name", streaming=True)).documents()
    with pytest.raises(UserError) as caught:
        for number in range(6):
            assert next(found) == str(number)
    assert str(caught.value) == (
        "owner/name, file 1 cannot be read further than row 4 (the server has gone): start again "
        "when it can be"
    )


def test_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **settings: object) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach 'corpsu' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("corpsu", split="test") == (
        "data.source=corpsu is neither a file or folder here nor a data set that `datasets` could "
        "load (data.split=test): Couldn't reach 'corpsu' on the Hub. Correct the name, or start a "
        "path with ./ or /"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "matches no file or folder"),
        ("missing/*.txt", "matches no file or folder"),
        ("images", "has no file that can be read"),
    ],
)
def test_a_path_to_nothing_is_told_before_anything_is_read(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(UserError, match=message):
        check_sources(DataConfig(source=f"{tmp_path}/{name}"), 4096)
    sets = [ValidationSetConfig("other", f"{tmp_path}/{name}")]
    with pytest.raises(UserError, match=message):
        check_sources(DataConfig(validation_sets=sets), 4096)


def test_of_a_source_that_is_there_no_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").touch()
    monkeypatch.setattr(Path, "open", None)
    check_sources(DataConfig(source=str(tmp_path)), 4096)
    check_sources(DataConfig(), 4096)


def test_a_tokenizer_that_the_model_has_too_few_ids_for_is_not_trained() -> None:
    check_sources(DataConfig(tokenizer_vocab_size=512), 512)
    with pytest.raises(UserError, match="tokenizer_vocab_size=512 is more than model"):
        check_sources(DataConfig(tokenizer_vocab_size=512), 511)
    check_sources(DataConfig(tokenizer_vocab_size=512, tokenizer="a.model"), 511)


@pytest.mark.parametrize("answer", ["none", "no name", "silence", "yes"])
def test_a_data_set_that_the_hub_does_not_have(
    answer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    errors = huggingface_hub.errors
    asked = []

    def dataset_info(name: str, timeout: float) -> None:
        asked.append(name)
        if answer == "none":
            raise errors.RepositoryNotFoundError("404", response=Mock())
        if answer == "no name":
            raise errors.HFValidationError("it is none")
        if answer == "silence":
            raise ConnectionError("nobody is there")

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    caplog.set_level("INFO", "mst_train")
    data = DataConfig(source="wikitxt:small")
    if answer.startswith("no"):
        with pytest.raises(UserError, match="wikitxt:small is neither a file or folder"):
            check_sources(data, 4096)
    else:
        check_sources(data, 4096)
    assert asked == ["wikitxt"]
    assert ("looking for a data set" in caplog.text) == (answer == "silence")
