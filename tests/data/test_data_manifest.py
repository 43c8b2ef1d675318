"""Prepared folders that are large, damaged, or not to be trusted."""

import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mst_train.config import DataConfig
from mst_train.data import load_corpus, load_data
from mst_train.data.checked import BLOCK_BYTES, CheckedWriter, Written
from mst_train.data.corpus import prepared_folder
from mst_train.data.manifest import (
    OFFSETS,
    TOKENS,
    Manifest,
    ShardEntry,
    is_prepared,
    write_manifest,
)
from mst_train.errors import UserError


def write_folder(folder: Path, documents: list[list[int]]) -> Path:
    """A prepared folder of two shards without a tokenizer: ids below 100, 0 ends a document."""
    (folder / "shards").mkdir(parents=True)
    (folder / "work").mkdir()
    entries = []
    half = len(documents) // 2
    for number, part in enumerate((documents[:half], documents[half:])):
        name = f"shards/{number:06}"
        files = {}
        tokens = np.array([token for document in part for token in [*document, 0]], "<u2")
        offsets = np.cumsum([0, *(len(document) + 1 for document in part)]).astype("<i8")
        for suffix, array in ((TOKENS, tokens), (OFFSETS, offsets)):
            with CheckedWriter(folder / (name + suffix)) as writer:
                writer.write(array)
                files[suffix] = writer.close()
        entries.append(ShardEntry(name, "0" * 32, len(part), len(tokens), 0, 0, files))
    write_manifest(folder, manifest_of(entries))
    return folder


def manifest_of(entries: list[ShardEntry]) -> Manifest:
    from mst_train.data.tokenizer import Vocabulary

    fingerprint = Vocabulary(100, 0).fingerprint
    return Manifest({}, "ids", "0" * 32, None, fingerprint, 100, 0, "<u2", 0, tuple(entries))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(source=str(folder)))
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", [[1, 2, 3], [4], [5, 6], [7]])


def test_prepared_folder(folder: Path) -> None:
    assert is_prepared(folder)
    corpus = load_corpus(DataConfig(source=str(folder)))
    assert corpus.tokens[:].tolist() == [1, 2, 3, 0, 4, 0, 5, 6, 0, 7, 0]
    assert corpus.documents.borders(0, 4).tolist() == [0, 4, 6, 9, 11]
    with pytest.raises(ValueError):
        corpus.tokens[:5][0] = 9


def test_other_folders_are_not_prepared(tmp_path: Path) -> None:
    assert not is_prepared(tmp_path)
    for content in ("[]", '{"kind": "extension"}', "not JSON", "\udcff"):
        (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
        assert not is_prepared(tmp_path)


def test_stdlib_is_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("stdlib"))
    monkeypatch.chdir(folder.parent)
    assert prepared_folder("stdlib") is None
    assert prepared_folder("./stdlib") == Path("stdlib")


# ---------------------------------------------------------------- names that lead elsewhere


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../data2/shards/000000", "shards/../../x", "a\0b"]
)
def test_names_that_lead_out_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest["shards"][1].update(name=name))
    message = refusal(folder)
    assert "which is not in its folder" in message and repr(name + TOKENS) in message


@pytest.mark.parametrize("name", ["/etc/hostname", "../tokenizer.model"])
def test_a_tokenizer_that_leads_out_is_refused(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest.update(tokenizer=name))
    assert "which is not in its folder" in refusal(folder)


def test_links_that_lead_out_are_refused(folder: Path, tmp_path: Path) -> None:
    tokens = folder / "shards" / "000001.tokens"
    (tmp_path / "elsewhere").write_bytes(tokens.read_bytes())
    tokens.unlink()
    tokens.symlink_to(tmp_path / "elsewhere")
    assert refusal(folder) == (
        f"{tokens} is a link that leads out of {folder}: put the file itself there"
    )
    tokens.unlink()
    tokens.symlink_to(folder / "shards" / "other")
    (folder / "shards" / "other").write_bytes((tmp_path / "elsewhere").read_bytes())
    load_corpus(DataConfig(source=str(folder)))


def test_a_folder_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert len(load_corpus(DataConfig(source=str(tmp_path / "link"))).documents) == 4


# ---------------------------------------------------------------- manifests that were edited


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dtype="|O"),
        lambda m: m.update(dtype="<u8"),
        lambda m: m.update(vocab_size="100"),
        lambda m: m.update(vocab_size=70_000),
        lambda m: m.update(eod=100),
        lambda m: m.update(eod=-1),
        lambda m: m.update(eod=True),
        lambda m: m.update(shards=[]),
        lambda m: m.update(shards={}),
        lambda m: m.update(settings=3),
        lambda m: m.update(source_fingerprint="../x"),
        lambda m: m.pop("tokenizer"),
        lambda m: m["shards"].pop(),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"][0].update(tokens=7),
        lambda m: m["shards"][0].update(documents=1 << 70),
        lambda m: m["shards"][0].update(files=[]),
        lambda m: m["shards"][0]["files"][TOKENS].update(sha256="x"),
        lambda m: m["shards"][0]["files"][TOKENS].update(bytes=14),
    ],
)
def test_edited_manifests_are_refused(folder: Path, change: Callable[[Any], None]) -> None:
    edit(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'manifest.json'} is damaged or was edited (")
    assert message.endswith("restore it from a copy, or prepare the data again")


def test_other_manifests(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(format=99))
    assert refusal(folder).endswith(
        "has format 99, and this version reads 4: name another folder, or delete this one, and "
        "prepare the data again"
    )
    (folder / "manifest.json").write_text('{"kind": "mst_train')
    assert "is damaged or was edited (it cannot be read" in refusal(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "is damaged or was edited (it cannot be read" in refusal(folder)
    (folder / "manifest.json").unlink()
    (folder / "work" / "settings.json").write_text("{}")
    assert "holds data that are not prepared to their end: run the command" in refusal(folder)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(source=str(write_folder(tmp_path / "d", [[1], [100]]))))
    assert corpus.tokens[0:2].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"000001.tokens holds 100, which must be below 100"):
        corpus.tokens[2:4]


def test_nothing_is_unpickled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    data = DataConfig(source=str(folder), sequence_length=4, cache_dir=str(tmp_path / "cache"))
    for packing in ("stream", "best_fit"):
        config = DataConfig(**{**asdict(data), "packing": packing, "validation_fraction": 0.0})
        assert len(load_data(config).training[0].tokens) == 4


# ---------------------------------------------------------------- 50 billion tokens


def sparse_folder(folder: Path, shards: int, tokens: int, documents: int) -> Path:
    """Shards of zeros that take no room on the disk, with offsets and checksums that are right."""
    (folder / "shards").mkdir(parents=True)
    (folder / "work").mkdir()
    offsets = (np.arange(documents + 1) * (tokens // documents)).astype("<i8")
    offsets[-1] = tokens
    size = 2 * tokens
    assert size % BLOCK_BYTES == 0
    crc = zlib.crc32(bytes(BLOCK_BYTES)).to_bytes(4, "little") * (size // BLOCK_BYTES)
    entries = []
    for number in range(shards):
        name = f"shards/{number:06}"
        with (folder / f"{name}.tokens").open("wb") as file:
            file.truncate(size)
        (folder / f"{name}.tokens.crc").write_bytes(crc)
        with CheckedWriter(folder / f"{name}.offsets") as writer:
            writer.write(offsets)
            written = writer.close()
        # The checksum of the whole, which only prepare.verify reads, is left at nothing.
        files = {TOKENS: Written(size, "0" * 64, hashlib.sha256(crc).hexdigest()), OFFSETS: written}
        entries.append(ShardEntry(name, "0" * 32, documents, tokens, 0, 0, files))
    write_manifest(folder, manifest_of(entries))
    return folder


OPEN = """
import sys
from pathlib import Path
import torch
from mst_train.config import DataConfig
from mst_train.data import Loader, load_data
from mst_train.memory.tracker import process_peak_bytes

def peak():
    return process_peak_bytes(torch.device("cpu"))

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

before, read_before = peak(), read()
data = load_data(DataConfig(source=sys.argv[1], sequence_length=8192))
loader = Loader(data.training, 2, seed=1, position=1_234_567)
next(loader)
first = read() - read_before
for _ in range(20):
    next(loader)
print(len(data.training), len(data.validation), first, before, peak())
"""


@pytest.mark.slow
def test_fifty_billion_tokens_open_at_once(tmp_path: Path) -> None:
    """The first batch reads little, into little memory: 400 shards, 3.2 million documents."""
    source = sparse_folder(tmp_path / "large", shards=400, tokens=125_042_688, documents=8000)
    command = [sys.executable, "-c", OPEN, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    training, validation, read, before, after = map(float, result.stdout.split())
    total = 400 * 125_042_688 / 8192
    assert total - 4 < training + validation <= total
    assert 0.009 < validation / total < 0.011
    assert read < 200 << 20  # of 186 GiB
    assert after < 500 << 20  # importing torch is half of it
    assert after - before < 100 << 20
