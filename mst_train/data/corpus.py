"""Documents to tokens, once: a memory-mapped token file in ``data.cache_dir``.

The layout of the cache is described in ``data/README.md``. Whatever is written is written beside
its place and renamed into it, so that no run ever meets half of a corpus, and processes that build
the same one at once do not disturb each other.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mst_train.config import DataConfig
from mst_train.data.documents import Source, digest, find_documents
from mst_train.data.tokenizer import Tokenizer, train_tokenizer
from mst_train.errors import UserError

FORMAT = 1
"""Part of every key: raise it when the same source would give other tokens or other files."""
BATCH_CHARACTERS = 4_000_000
"""Documents are tokenised in batches of about this much text."""

TOKENS, OFFSETS, MANIFEST = "tokens.bin", "offsets.npy", "manifest.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    tokens: NDArray[Any]
    """[tokens], uint16 or uint32, memory-mapped: the documents one after the other, each with its
    end-of-document id."""
    offsets: NDArray[np.int64]
    """[documents + 1], memory-mapped: document i is tokens[offsets[i]:offsets[i + 1]]."""
    tokenizer: Tokenizer
    fingerprint: str
    """Stands for the tokens and their tokenizer, wherever and whenever they were made."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def eod(self) -> int:
        return self.tokenizer.eod


def load_corpus(data: DataConfig) -> Corpus:
    """The tokens of ``data.source``; from the cache where source and tokenizer are unchanged.

    Tokenising holds a batch of text, its tokens and 8 bytes per document in memory.

    Raises:
        UserError: the source, the tokenizer or the cache folder cannot be used.
    """
    source = find_documents(data)
    cache = _cache_folder(data)
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(Path(data.tokenizer).expanduser())
    else:
        tokenizer = _trained_tokenizer(source, data.tokenizer_vocab_size, cache)
    folder = cache / "corpora" / digest(FORMAT, source.fingerprint, tokenizer.fingerprint)
    corpus = _open(folder, tokenizer)
    if corpus is None:
        if folder.exists():
            log.warning("%s is not whole (cut short or edited): building it again", folder)
        with _writing_to(cache):
            _build(source, tokenizer, folder)
        corpus = _open(folder, tokenizer)
    if corpus is None:
        raise UserError(
            f"{folder} was damaged right after it was written: check the file system of "
            f"data.cache_dir, or choose another data.cache_dir"
        )
    return corpus


def _cache_folder(data: DataConfig) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mst_train")


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache} cannot be written ({error.strerror or error}): make room or "
            f"give permission there, or set data.cache_dir to another folder"
        ) from error


def _trained_tokenizer(source: Source, vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer of this source and size: the cached one, or else one trained now."""
    path = cache / "tokenizers" / f"{digest(FORMAT, source.fingerprint, vocab_size)}.model"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except UserError:
            log.warning("%s is damaged: training it again", path)
    start = time.monotonic()
    with _writing_to(cache):
        tokenizer = train_tokenizer(source.documents(), vocab_size, path)
    log.info(
        "trained a tokenizer of %d tokens on %s in %.1f s",
        tokenizer.vocab_size,
        source.name,
        time.monotonic() - start,
    )
    return tokenizer


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus | None:
    """The corpus in ``folder``; none where its files are missing or do not fit its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        tokens = np.memmap(folder / TOKENS, dtype=manifest["dtype"], mode="r")
        offsets = np.load(folder / OFFSETS, mmap_mode="r")
        whole = len(tokens) == offsets[-1] == manifest["tokens"]
        return Corpus(tokens, offsets, tokenizer, manifest["fingerprint"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise ``source`` into ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        built = Path(temporary, "built")
        built.mkdir()
        start = time.monotonic()
        manifest = _write(source, tokenizer, built)
        log.info(
            "tokenised %s: %d documents, %d bytes, %d tokens in %.1f s",
            source.name,
            manifest["documents"],
            manifest["text_bytes"],
            manifest["tokens"],
            time.monotonic() - start,
        )
        if folder.exists() and _open(folder, tokenizer) is None:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(Path(temporary, "damaged"))
        try:
            built.rename(folder)
        except OSError:
            # Another process may have put the same corpus there in the meantime.
            if _open(folder, tokenizer) is None:
                raise


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write the three files of a corpus; its manifest."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    offsets = array("q", [0])
    text_bytes = 0
    hashed = hashlib.sha256(tokenizer.fingerprint.encode())
    progress = tqdm(
        source.documents(), desc="tokenising", total=source.count, unit=" documents", disable=None
    )
    with (folder / TOKENS).open("wb") as file:
        for batch in _batches(progress):
            for tokens in tokenizer.encode(batch):
                tokens.append(tokenizer.eod)
                raw = np.array(tokens, dtype).tobytes()
                file.write(raw)
                hashed.update(raw)
                offsets.append(offsets[-1] + len(tokens))
            text_bytes += sum(len(text.encode()) for text in batch)
    np.save(folder / OFFSETS, np.array(offsets, np.int64))
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "dtype": dtype.str,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "text_bytes": text_bytes,
        "fingerprint": hashed.hexdigest()[:32],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
