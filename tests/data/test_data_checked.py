"""Files with checksums: what is written is read, and nothing else is."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.data import checked
from mst_train.data.checked import CheckedArray, CheckedWriter, Written
from mst_train.errors import UserError


def write(path: Path, *parts: np.ndarray) -> Written:
    with CheckedWriter(path) as writer:
        for part in parts:
            writer.write(part)
        return writer.close()


def opened(path: Path, written: Written, limit: int | None = None) -> CheckedArray:
    return CheckedArray(path, written, "<u2", limit, "make it again")


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Written]:
    """A file of three blocks of 16 bytes, the last one short."""
    monkeypatch.setattr(checked, "BLOCK_BYTES", 16)
    path = tmp_path / "numbers"
    return path, write(path, np.arange(20, dtype="<u2"))


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=60)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, stop: int
) -> None:
    path = tmp_path_factory.mktemp("checked") / "numbers"
    numbers = np.arange(sum(sizes), dtype="<u2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "BLOCK_BYTES", 16)
        written = write(path, *np.split(numbers, np.cumsum(sizes)))
        array = opened(path, written)
        assert len(array) == len(numbers)
        assert array[start:stop].tolist() == numbers[start:stop].tolist()
        assert array[0 : len(array)].tolist() == numbers.tolist()
        array.check_all()


def test_damage_is_met_before_the_block_is_used(blocks: tuple[Path, Written]) -> None:
    path, written = blocks
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    array = opened(path, written)
    array.check_size()
    assert array[0:8].tolist() == list(range(8))
    assert array[16:20].tolist() == list(range(16, 20))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            array[7:9]
        assert str(caught.value) == (
            f"{path} is damaged: bytes 16 to 32 are not what was written (their checksum differs): "
            f"make it again"
        )
    with pytest.raises(UserError, match=r"numbers is damaged \(its SHA-256 is not"):
        array.check_all()


def test_a_block_is_compared_once(
    blocks: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    crc32 = checked.zlib.crc32
    monkeypatch.setattr(checked.zlib, "crc32", lambda data: compared.append(1) or crc32(data))
    array = opened(*blocks)
    for _ in range(3):
        array[2:10]
    assert len(compared) == 2


def test_files_that_change_are_compared_again(blocks: tuple[Path, Written]) -> None:
    """The same numbers in a new file, other numbers, fewer numbers, none: after a first read."""
    path, written = blocks
    raw = path.read_bytes()
    array = opened(path, written)
    assert array[0:20].tolist() == list(range(20))
    path.rename(path.with_name("before"))
    path.write_bytes(raw)
    assert array[0:20].tolist() == list(range(20))
    path.write_bytes(bytes(40))
    with pytest.raises(UserError, match="numbers is damaged: bytes 0 to 16"):
        array[0:3]
    path.write_bytes(raw[:10])
    with pytest.raises(UserError, match="numbers has 10 bytes where 40 were written: make it"):
        array[0:3]
    path.unlink()
    with pytest.raises(UserError, match=r"numbers cannot be read \(No such file or directory\)"):
        array[0:3]
    path.write_bytes(raw)
    assert array[0:20].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("short", "message"),
    [
        (lambda *_: b"", "numbers became shorter while it was read: make it again"),
        (lambda *_: Path("/nowhere/at/all").stat(), r"numbers cannot be read \(No such file"),
    ],
)
def test_a_disk_that_fails_in_a_read(
    blocks: tuple[Path, Written],
    monkeypatch: pytest.MonkeyPatch,
    short: Callable[..., bytes],
    message: str,
) -> None:
    array = opened(*blocks)
    array[0:20]
    monkeypatch.setattr(checked.os, "pread", short)
    with pytest.raises(UserError, match=message):
        array[0:3]


def test_reads_in_parts(blocks: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than it is asked for."""
    pread = os.pread
    monkeypatch.setattr(checked.os, "pread", lambda file, size, at: pread(file, min(size, 5), at))
    assert opened(*blocks)[1:20].tolist() == list(range(1, 20))


def test_damaged_checksums(blocks: tuple[Path, Written]) -> None:
    path, written = blocks
    crc = path.with_name("numbers.crc")
    crc.write_bytes(crc.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"numbers.crc is damaged .*: make it again"):
        opened(path, written)[0:1]


def test_sizes(blocks: tuple[Path, Written]) -> None:
    path, written = blocks
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"has 38 bytes where 40 were written: make it again"):
        opened(path, written).check_size()
    with pytest.raises(UserError, match=r"has 38 bytes where 40 were written: make it again"):
        opened(path, written)[0:1]
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): make it"):
        opened(path, written).check_size()


def test_numbers_beyond_the_limit(blocks: tuple[Path, Written]) -> None:
    assert len(opened(*blocks, limit=20)[0:20]) == 20
    with pytest.raises(UserError, match=r"numbers holds 19, which must be below 19: make"):
        opened(*blocks, limit=19)[10:20]


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    array = opened(path, write(path))
    assert (len(array), array[0:5].tolist()) == (0, [])
