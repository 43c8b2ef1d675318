"""The command: the same folder whatever the processes were, or clear refusals."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mst_train.config import DataConfig
from mst_train.data import Loader, load_corpus, load_data, shards
from mst_train.data.documents import find_documents
from mst_train.data.tokenizer import train_tokenizer
from mst_train.prepare.__main__ import main

Prepare = Callable[..., int]


@pytest.fixture(scope="module")
def texts(prose: Callable[[int, int], str]) -> list[str]:
    return [prose(number, 20 + 7 * (number % 9)) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(texts, 300).save(path)
    return path


@pytest.fixture
def source(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of every kind; divided into pieces of 2000 bytes."""
    monkeypatch.setattr("mst_train.data.documents.SMALLEST_PIECE", 2000)
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for number in range(12):
        (folder / "sub" / f"{number:02}.txt").write_text(texts[number])
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[12:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:40]).encode(), mtime=0))
    zstd = pyarrow.Codec("zstd")
    (folder / "c.jsonl.zst").write_bytes(
        b"".join(
            zstd.compress("".join(part).encode(), asbytes=True)
            for part in (lines[40:45], lines[45:50])
        )
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts[50:]}), folder / "d.parquet", row_group_size=4
    )
    return folder


@pytest.fixture
def prepare(source: Path, tokenizer: Path, tmp_path: Path) -> Prepare:
    def run(output: str = "out", *arguments: str) -> int:
        return main(
            [
                f"data.source={source}",
                f"data.tokenizer={tokenizer}",
                "data.sequence_length=64",
                f"prepare.output={tmp_path / output}",
                "prepare.workers=1",
                *arguments,
            ]
        )

    return run


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def load(folder: Path, **settings: object) -> DataConfig:
    return DataConfig(source=str(folder), sequence_length=64, **settings)


# ---------------------------------------------------------------- what is written


def test_documents_come_back(
    prepare: Prepare, source: Path, texts: list[str], tmp_path: Path
) -> None:
    assert prepare() == 0
    corpus = load_corpus(load(tmp_path / "out"))
    order = [*range(12, 60), *range(12)]  # the order of relative paths
    borders = corpus.documents.borders(0, len(corpus.documents))
    found = [
        corpus.tokenizer.decode(corpus.tokens[start : stop - 1].tolist())
        for start, stop in pairwise(borders)
    ]
    assert found == [texts[index] for index in order]
    assert list(find_documents(DataConfig(source=str(source))).documents()) == found
    assert len(corpus.tokens.starts) > 8


def test_raw_files_can_be_read_without_the_framework(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare() == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    shard = tmp_path / "out" / manifest["shards"][1]["name"]
    tokens = np.memmap(f"{shard}.tokens", dtype=manifest["dtype"], mode="r")
    offsets = np.memmap(f"{shard}.offsets", dtype="<i8", mode="r")
    assert offsets[0] == 0 and offsets[-1] == len(tokens)
    assert (tokens[offsets[1:] - 1] == manifest["eod"]).all()


def test_workers_change_nothing(prepare: Prepare, tmp_path: Path) -> None:
    arguments = ("data.packing=best_fit",)
    for workers in (1, 2, 3):
        assert prepare(f"out{workers}", f"prepare.workers={workers}", *arguments) == 0
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2") == tree(tmp_path / "out3")


def test_jobs_are_joined_by_the_last(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("whole") == 0
    for job in (2, 3):
        assert prepare("out", f"prepare.shard={job}/3") == 0
        assert f"job {job}/3 is done; the last of the jobs joins" in capsys.readouterr().out
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([f"prepare.output={tmp_path / 'out'}", "prepare.verify=true"]) == 2
    assert "not prepared to their end: run the command that" in capsys.readouterr().err
    assert prepare("out", "prepare.shard=1/3") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert prepare("out", "prepare.shard=2/3") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_second_run_makes_nothing(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare() == 0
    before = tree(tmp_path / "out")
    monkeypatch.setattr("mst_train.data.build._build", None)
    assert prepare() == 0
    assert tree(tmp_path / "out") == before


def test_trained_tokenizer_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        f"data.source={source}",
        "data.tokenizer_vocab_size=300",
        f"prepare.output={tmp_path / 'out'}",
        "prepare.workers=1",
    ]
    assert main(arguments) == 0
    trained = load_corpus(load(tmp_path / "out")).tokenizer
    assert trained.vocab_size == 300
    (tmp_path / "out" / "shards" / "000002.tokens").unlink()
    monkeypatch.setattr("mst_train.prepare.folder.train_tokenizer", None)
    assert main(arguments) == 0
    assert load_corpus(load(tmp_path / "out")).tokenizer.fingerprint == trained.fingerprint


def test_a_tokenizer_that_was_damaged_between_two_attempts_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        f"data.source={source}",
        "data.tokenizer_vocab_size=300",
        f"prepare.output={tmp_path / 'out'}",
        "prepare.workers=1",
    ]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("mst_train.data.build._join", lambda *_: 1 // 0)
        main(arguments)
    for path in (tmp_path / "out").rglob("*.model"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # one that sentencepiece does not see
        path.write_bytes(content)
    assert main(arguments) == 0
    untouched = [*arguments[:2], f"prepare.output={tmp_path / 'other'}", arguments[3]]
    assert main(untouched) == 0
    found, expected = (load_corpus(load(tmp_path / name)) for name in ("out", "other"))
    assert found.fingerprint == expected.fingerprint


# ---------------------------------------------------------------- interruptions


def children(pid: int) -> list[int]:
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


@pytest.mark.slow
def test_a_killed_command_continues(
    tokenizer: Path, prose: Callable[[int, int], str], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    text = prose(0, 40_000)
    for number in range(8):  # 8 pieces of a MiB
        lines = [
            json.dumps({"text": f"{number} {text[k : k + 4000]}"}) for k in range(0, 290_000, 800)
        ]
        (source / f"{number}.jsonl").write_text("\n".join(lines)[: 1 << 20])

    def command(output: str, workers: int) -> list[str]:
        arguments = [
            f"data.source={source}",
            f"data.tokenizer={tokenizer}",
            f"prepare.output={tmp_path / output}",
            f"prepare.workers={workers}",
            "prepare.malformed=skip",
        ]
        return [sys.executable, "-m", "mst_train.prepare", *arguments]

    def records() -> int:
        return len(list((tmp_path / "killed" / "shards").glob("*.json")))

    for wanted, workers in ((1, 2), (4, 1)):
        process = subprocess.Popen(command("killed", workers), stderr=subprocess.DEVNULL)
        while records() < wanted:
            assert process.poll() is None
            time.sleep(0.005)
        others = children(process.pid)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed" / "manifest.json").exists()
        deadline = time.monotonic() + 300
        while any(alive(pid) for pid in others):
            assert time.monotonic() < deadline, "workers outlive the command"
            time.sleep(0.02)
    assert 4 <= records() < 8
    kept = {path: path.stat().st_ino for path in (tmp_path / "killed" / "shards").glob("*.json")}
    for output in ("killed", "whole"):
        assert subprocess.run(command(output, 2), capture_output=True).returncode == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert all(path.stat().st_ino == inode for path, inode in kept.items())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_reported(
    prepare: Prepare,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = "mst_train.data.rate.Rate.add"
    monkeypatch.setattr(add, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in workers()])

    def workers() -> list[int]:
        import multiprocessing

        return [process.pid for process in multiprocessing.active_children()]

    assert prepare("out", "prepare.workers=2") == 1
    message = capsys.readouterr().err
    assert "a worker was ended from outside (signal 9" in message and "Traceback" not in message
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damaged_shards_alone_are_made_again(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare() == 0
    before = tree(tmp_path / "out")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out/shards").glob("*.tokens")}
    (tmp_path / "out" / "shards" / "000003.tokens").unlink()
    assert prepare() == 0
    assert tree(tmp_path / "out") == before
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out/shards").glob("*.tokens")}
    assert {name for name in after if after[name] != inodes[name]} == {"000003.tokens"}


# ---------------------------------------------------------------- malformed input


def spoil(source: Path) -> list[str]:
    """Bad lines in a plain and a compressed file, and a text that is not UTF-8; their places."""
    lines = (source / "a.jsonl").read_text().splitlines()
    lines[13] = '{"text": '
    lines.insert(2, "\n[1]")
    (source / "a.jsonl").write_text("\n".join(lines) + "\n")
    lines = gzip.decompress((source / "b.jsonl.gz").read_bytes()).decode().splitlines()
    lines[8] = '{"text": 5}'
    (source / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (source / "sub" / "05.txt").write_bytes(b"caf\xe9")
    return [
        f"{source}/a.jsonl:4 is a JSON list",
        f"{source}/a.jsonl:16 is not JSON",
        f"{source}/b.jsonl.gz:9: data.text_field=text is of type int",
        f"{source}/sub/05.txt is not UTF-8",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_input_is_skipped_and_listed(
    workers: int,
    prepare: Prepare,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = spoil(source)
    assert prepare("out", "prepare.malformed=skip", f"prepare.workers={workers}") == 0
    listed = (tmp_path / "out" / "malformed.jsonl").read_text().splitlines()
    problems = [json.loads(line)["problem"] for line in listed]
    assert len(problems) == 4
    assert all(problem.startswith(place) for problem, place in zip(problems, places, strict=True))
    assert "4 lines, rows or files were left out" in caplog.text
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["malformed"] == 4
    assert len(load_corpus(load(tmp_path / "out")).documents) == 57


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_input_stops_the_command(
    workers: int,
    prepare: Prepare,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = spoil(source)
    assert prepare("out", f"prepare.workers={workers}") == 2
    message = capsys.readouterr().err
    assert any(message.startswith(f"error: {place}") for place in places)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The same folder goes on with what was left out, and then not without it.
    assert prepare("out", "prepare.malformed=skip") == 0
    (tmp_path / "out" / "shards" / "000000.tokens").unlink()
    assert prepare("out", f"prepare.workers={workers}") == 2


def test_a_tokenizer_is_trained_on_what_is_left(source: Path, tmp_path: Path) -> None:
    spoil(source)
    arguments = [f"data.source={source}", f"prepare.output={tmp_path / 'out'}"]
    arguments += ["data.tokenizer_vocab_size=300", "prepare.workers=1"]
    assert main(arguments) == 2
    assert main([*arguments, "prepare.malformed=skip"]) == 0


def test_a_corrected_line_costs_its_file_alone(
    prepare: Prepare, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (source / "sub" / "11.txt").read_bytes()
    (source / "sub" / "11.txt").write_bytes(b"\xff" * len(good))
    assert prepare() == 2
    (source / "sub" / "11.txt").write_bytes(good)
    made = []

    def make(*arguments: Any) -> None:
        made.append(arguments[-2])
        shards.make_shard(*arguments)

    monkeypatch.setattr("mst_train.data.build.make_shard", make)
    assert prepare() == 0
    assert len(made) == 1 and "sub/11.txt" in made[0].piece.files


def test_a_cut_off_archive(
    prepare: Prepare, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        raw = (source / name).read_bytes()
        (source / name).write_bytes(raw[:-20])
        assert prepare("out", "prepare.malformed=skip") == 2
        assert f"error: {source / name} cannot be read (Truncated" in capsys.readouterr().err
        (source / name).write_bytes(raw)


# ---------------------------------------------------------------- refusals


def test_refusals(
    prepare: Prepare, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert prepare(*arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        return message

    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "file is a file where a folder is needed" in refused("file")
    assert "full holds other files (thesis.tex): name a folder that is new" in refused("full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert "prepare.shard=3/2 must be i/N" in refused("out", "prepare.shard=3/2")
    assert "prepare.shard=0/2 must be i/N" in refused("out", "prepare.shard=0/2")
    assert "prepare.output is not set" in refused("out", "prepare.output=null")
    assert "matches no file or folder" in refused("out", "data.source=./nowhere")
    mixture = "data.mixture=[{source:a,weight:1}]"
    assert "prepare each of its sources by itself" in refused("out", mixture)
    assert "cannot be written (Not a directory): make room" in refused("file/below")
    assert "so that what is written would be read" in refused("source/out")
    assert not (tmp_path / "out").exists()

    assert prepare() == 0
    capsys.readouterr()
    before = tree(tmp_path / "out")
    message = refused("out", "prepare.shard_mib=1")
    assert (
        "belongs to a preparation with other settings: now prepare.shard_mib=1 (it was" in message
    )
    assert "is prepared already" in refused("again", f"data.source={tmp_path / 'out'}")
    (source / "a.jsonl").write_text('{"text": "other"}')
    assert "was prepared from" in refused()
    assert tree(tmp_path / "out") == before


def shorten(file: Path) -> None:
    file.write_text('{"text": "shorter"}')


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (shorten, "a.jsonl changed while data.source was read: start again"),
        (Path.unlink, "a.jsonl cannot be read (No such file or directory)"),
    ],
)
def test_a_source_that_changes_or_vanishes_meanwhile(
    happens: Callable[[Path], None],
    message: str,
    prepare: Prepare,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare("whole") == 0
    file = source / "a.jsonl"
    content, status = file.read_bytes(), file.stat()
    divide = "mst_train.data.documents._divide"
    from mst_train.data.documents import _divide

    def change(*arguments: object) -> object:
        pieces = _divide(*arguments)
        happens(file)
        return pieces

    with monkeypatch.context() as patched:
        patched.setattr(divide, change)
        assert prepare() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare() == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "room",  # for no shard, for some, for all but the end
    [pytest.param(100, marks=pytest.mark.slow), 1000, pytest.param(5000, marks=pytest.mark.slow)],
)
def test_full_disk(
    room: int, prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file can be written beyond this size, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        assert prepare() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert "out cannot be written (File too large): make room" in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare() == 0
    assert prepare("whole") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# ---------------------------------------------------------------- damage


def flip(path: Path, place: int = 100) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_verify(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare() == 0
    assert main([f"prepare.output={out}", "prepare.verify=true"]) == 0
    flip(out / "shards" / "000001.tokens")
    flip(out / "shards" / "000003.offsets", 9)
    (out / "shards" / "000004.tokens.crc").unlink()
    before = tree(out)
    capsys.readouterr()
    assert main([f"prepare.output={out}", "prepare.verify=true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1].removeprefix(f"{out}/shards/") for line in lines] == [
        "000001.tokens",
        "000003.offsets",
        "000004.tokens.crc",
    ]
    assert all("delete it and prepare the data again" in line for line in lines)
    assert tree(out) == before


def test_training_stops_before_damaged_tokens(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mst_train.__main__ import main as train

    out = tmp_path / "out"
    assert prepare() == 0
    for number in range(8):
        flip(out / "shards" / f"{number:06}.tokens")
    data = load_data(load(out))
    with pytest.raises(Exception, match=r"shards/00000\d.tokens is damaged: bytes 0 to") as caught:
        for _ in range(50):
            next(Loader(data.training, 4, seed=0))
    assert f"delete it and run the command that prepared {out} again" in str(caught.value)
    model = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "vocab_size": 300}
    status = train(
        [
            *(f"model.{key}={value}" for key, value in model.items()),
            f"data.source={out}",
            "data.sequence_length=64",
            "memory.policy=vanilla",
            "train.steps=2",
            "logging.wandb.mode=disabled",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    assert status == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and ".tokens is damaged: bytes 0 to" in message


def test_another_tokenizer_is_refused(prepare: Prepare, texts: list[str], tmp_path: Path) -> None:
    assert prepare() == 0
    train_tokenizer(texts, 320).save(tmp_path / "other.model")
    with pytest.raises(Exception, match="was prepared with another tokenizer than"):
        load_corpus(load(tmp_path / "out", tokenizer=str(tmp_path / "other.model")))
    shutil.copy(tmp_path / "other.model", tmp_path / "out" / "tokenizer.model")
    with pytest.raises(Exception, match="holds another tokenizer than the one it was prepared"):
        load_corpus(load(tmp_path / "out"))
