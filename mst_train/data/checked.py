"""Files whose every block is compared with its checksum before it is used.

Beside a file ``F`` lies ``F.crc``: the CRC-32 of each BLOCK_BYTES of ``F``, little-endian uint32.
Training jumps about in hundreds of gigabytes, so that checksums of whole files would come too late
or cost too much. A block is compared when it is first read, in a fraction of a millisecond. The
SHA-256 of both files stands in the manifest, for ``prepare.verify``.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mst_train.errors import UserError
from mst_train.files import reading

BLOCK_BYTES = 1 << 18
"""Part of the format."""
CRC = ".crc"


Hex = Annotated[str, "hexadecimal digits"]


@dataclass(frozen=True)
class Written:
    """What a manifest says of a file and of the checksums beside it."""

    bytes: int
    sha256: Hex
    crc_sha256: Hex


def crc_bytes(size: int) -> int:
    """The size of the checksums beside a file of ``size`` bytes."""
    return 4 * -(-size // BLOCK_BYTES)


class CheckedWriter:
    """A file that is written from start to end, with its checksums; both are new and on disk after
    ``close``. As a context it closes the files whatever happens."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._crc_file = path.with_name(path.name + CRC).open("wb")
        self._sha256, self._crc_sha256 = hashlib.sha256(), hashlib.sha256()
        self._bytes = self._crc = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._crc_file.close()

    def write(self, array: NDArray[Any]) -> None:
        data = memoryview(array.tobytes())
        self._file.write(data)
        self._sha256.update(data)
        while data:
            part = data[: BLOCK_BYTES - self._bytes % BLOCK_BYTES]
            self._crc = zlib.crc32(part, self._crc)
            self._bytes += len(part)
            if self._bytes % BLOCK_BYTES == 0:
                self._end_block()
            data = data[len(part) :]

    def close(self) -> Written:
        if self._bytes % BLOCK_BYTES:
            self._end_block()
        for file in (self._file, self._crc_file):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return Written(self._bytes, self._sha256.hexdigest(), self._crc_sha256.hexdigest())

    def _end_block(self) -> None:
        raw = self._crc.to_bytes(4, "little")
        self._crc_file.write(raw)
        self._crc_sha256.update(raw)
        self._crc = 0


class _Known(NamedTuple):
    """A file's state, and what is known of its blocks in that state."""

    state: tuple[int, int, int]
    crcs: NDArray[np.uint32]
    unchecked: NDArray[np.bool_]


class CheckedArray:
    """The numbers in a file; no block reaches the caller before it is compared.

    Creating it reads nothing. ``limit``: numbers are at least 0 and below it, or the file cannot
    be used. Every read raises ``UserError`` where the file is not what was written; ``advice`` says
    in that message what to do. A file that was replaced or written to since is compared anew.

    The file is opened for each read and not memory-mapped: a file that becomes shorter under a map,
    or a disk that fails, would kill the process.
    """

    def __init__(
        self, path: Path, written: Written, dtype: str, limit: int | None, advice: str
    ) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._written, self._limit, self._advice = written, limit, advice
        self._known: _Known | None = None

    def __len__(self) -> int:
        return self._written.bytes // self.dtype.itemsize

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """The numbers of a range (of step 1); they cannot be changed."""
        start, stop, _ = key.indices(len(self))
        first, last = start * self.dtype.itemsize, stop * self.dtype.itemsize
        with reading(self.path, self._advice), self.path.open("rb", buffering=0) as file:
            known = self._look_at(file)
            unchecked = known.unchecked[first // BLOCK_BYTES : -(-last // BLOCK_BYTES)]
            for block in first // BLOCK_BYTES + np.flatnonzero(unchecked):
                self._check(file, known, int(block))
            return np.frombuffer(self._read(file, first, last), self.dtype)

    def check_size(self) -> None:
        """Raises ``UserError`` where the files are not there or not of the size they had."""
        written = self._written.bytes
        for path, size in ((self.path, written), (self._crc_path, crc_bytes(written))):
            with reading(path, self._advice):
                found = path.stat().st_size
            if found != size:
                raise UserError(
                    f"{path} has {found} bytes where {size} were written: {self._advice}"
                )

    def check_all(self) -> None:
        """Read both files and compare them with the manifest's checksums (``UserError``)."""
        self.check_size()
        for path, sha256 in (
            (self.path, self._written.sha256),
            (self._crc_path, self._written.crc_sha256),
        ):
            with path.open("rb") as file:
                self._require_same(path, hashlib.file_digest(file, "sha256").hexdigest(), sha256)

    @property
    def _crc_path(self) -> Path:
        return self.path.with_name(self.path.name + CRC)

    def _require_same(self, path: Path, found: str, written: str) -> None:
        if found != written:
            raise UserError(
                f"{path} is damaged (its SHA-256 is not the manifest's): {self._advice}"
            )

    def _look_at(self, file: FileIO) -> _Known:
        """What is known of the blocks of the file as it is now."""
        now = os.fstat(file.fileno())
        state = (now.st_ino, now.st_size, now.st_mtime_ns)
        known = self._known
        if known is None or known.state != state:
            self.check_size()
            raw = self._crc_path.read_bytes()
            found = hashlib.sha256(raw).hexdigest()
            self._require_same(self._crc_path, found, self._written.crc_sha256)
            crcs = np.frombuffer(raw, "<u4")
            known = self._known = _Known(state, crcs, np.ones(len(crcs), bool))
        return known

    def _read(self, file: FileIO, first: int, last: int) -> bytes:
        """Bytes ``first`` to ``last``."""
        parts = []
        while first < last:
            parts.append(os.pread(file.fileno(), last - first, first))
            first += len(parts[-1])
            if not parts[-1]:
                self.check_size()
                raise UserError(f"{self.path} became shorter while it was read: {self._advice}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, file: FileIO, known: _Known, block: int) -> None:
        first = block * BLOCK_BYTES
        data = self._read(file, first, min(first + BLOCK_BYTES, self._written.bytes))
        if zlib.crc32(data) != known.crcs[block]:
            raise UserError(
                f"{self.path} is damaged: bytes {first} to {first + len(data)} are not what was "
                f"written (their checksum differs): {self._advice}"
            )
        part = np.frombuffer(data, self.dtype)
        if self._limit is not None and not 0 <= int(part.min()) <= int(part.max()) < self._limit:
            raise UserError(
                f"{self.path} holds {int(part.max())}, which must be below {self._limit}: "
                f"{self._advice}"
            )
        known.unchecked[block] = False
