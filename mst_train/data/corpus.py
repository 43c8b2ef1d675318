"""The tokens that training reads: a prepared folder, opened or, in ``data.cache_dir``, made first.

The layout of both is described in ``data/README.md``.
"""

import logging
import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mst_train.bar import bar
from mst_train.config import DataConfig
from mst_train.data.build import Plan, build, take, tokenizer_of
from mst_train.data.checked import CheckedArray
from mst_train.data.documents import SAMPLED_BYTES, STDLIB, Source, digest, find_documents
from mst_train.data.manifest import (
    FORMAT,
    MANIFEST,
    OFFSETS,
    TOKENS,
    inside,
    is_prepared,
    read_manifest,
)
from mst_train.data.tokenizer import (
    Tokenizer,
    Vocabulary,
    kept_tokenizer,
    train_tokenizer,
)
from mst_train.data.tokenizer_file import load_tokenizer
from mst_train.errors import UserError
from mst_train.files import expanded, writing_to

TOKENIZERS = "tokenizers"
"""The folder, in the cache, of those that were trained for a source."""

log = logging.getLogger(__name__)


def across(starts: NDArray[np.int64], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Places ``first`` .. ``last`` - 1 by the segments they are in, where segment k has the places
    starts[k] .. starts[k + 1] - 1: (segment, the range's start and end within it)."""
    segment = int(np.searchsorted(starts, first, side="right")) - 1
    while first < last:
        base, end = int(starts[segment]), min(last, int(starts[segment + 1]))
        yield segment, first - base, end - base
        first, segment = end, segment + 1


class TokenFiles:
    """The tokens of all shards, one after the other; what is read is compared with checksums.

    ``UserError`` where a file is damaged.
    """

    def __init__(self, shards: list[CheckedArray]) -> None:
        self._shards = shards
        self.starts = _cumulated([len(shard) for shard in shards])
        """[shards + 1]: where each shard starts."""
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """The tokens of a range (of step 1); they cannot be changed where it is in one shard."""
        first, last, _ = key.indices(len(self))
        parts = [self._shards[shard][a:b] for shard, a, b in across(self.starts, first, last)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


class Documents:
    """Where the documents of all shards start and end, in tokens from the corpus's beginning."""

    def __init__(self, shards: list[CheckedArray], token_starts: NDArray[np.int64]) -> None:
        self._shards, self._token_starts = shards, token_starts
        self._starts = _cumulated([len(shard) - 1 for shard in shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def borders(self, first: int, last: int) -> NDArray[np.int64]:
        """[last - first + 1]: where documents ``first`` .. ``last`` - 1 start and the last ends."""
        parts = [np.array([self.start(first)])]
        for shard, a, b in across(self._starts, first, last):
            parts.append(self._shards[shard][a + 1 : b + 1] + self._token_starts[shard])
        return np.concatenate(parts)

    def start(self, document: int) -> int:
        """The first token of a document; of the one after the last, the corpus's end."""
        if document == len(self):
            return int(self._token_starts[-1])
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        place = document - int(self._starts[shard])
        return int(self._shards[shard][place : place + 1][0]) + int(self._token_starts[shard])

    def at(self, token: int) -> int:
        """The document that holds a token; reads a few places in one file."""
        shard = int(np.searchsorted(self._token_starts, token, side="right")) - 1
        if shard == len(self._shards):
            return len(self)
        offsets, token = self._shards[shard], token - int(self._token_starts[shard])
        places = range(len(offsets))
        after = bisect_right(places, token, key=lambda place: int(offsets[place : place + 1][0]))
        return after - 1 + int(self._starts[shard])


@dataclass(frozen=True, eq=False)
class Corpus:
    folder: Path
    tokens: TokenFiles
    """uint16 or uint32: the documents one after the other, each with its end-of-document id."""
    documents: Documents
    tokenizer: Vocabulary
    fingerprint: str
    """Stands for the tokens and their tokenizer, wherever and whenever they were made."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def eod(self) -> int:
        return self.tokenizer.eod


def load_corpus(data: DataConfig) -> Corpus:
    """The tokens of ``data.source``: a prepared folder, or the cache's, which is made if need be.

    Raises:
        UserError: the source, the tokenizer or the cache folder cannot be used.
    """
    prepared = prepared_folder(data.source)
    if prepared is not None:
        return _prepared(prepared, data)
    source = find_documents(data)
    cache = cache_folder(data)
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        tokenizer = _trained_tokenizer(source, data.tokenizer_vocab_size, cache)
    folder = cache / "corpora" / digest(FORMAT, source.fingerprint, tokenizer.fingerprint)
    corpus = _whole(folder)
    while corpus is None:
        with writing_cache(cache):
            built = _build(source, tokenizer, folder)
        corpus = _whole(folder)
        if built and corpus is None:
            raise UserError(
                f"{folder} was damaged right after it was written: check the file system of "
                f"data.cache_dir, or choose another data.cache_dir"
            )
    return corpus


def _prepared(folder: Path, data: DataConfig) -> Corpus:
    """A prepared folder, which must have been prepared with ``data.tokenizer`` if there is one."""
    corpus = open_corpus(folder)
    if data.tokenizer is not None:
        given = load_tokenizer(data.tokenizer)
        if given.fingerprint != corpus.tokenizer.fingerprint:
            raise UserError(
                f"data.source={data.source} was prepared with another tokenizer than "
                f"data.tokenizer={data.tokenizer}: set data.tokenizer=null, or prepare the source "
                f"with this one"
            )
    return corpus


def prepared_folder(source: str) -> Path | None:
    """The prepared folder that ``data.source`` names, if it does."""
    try:
        path = expanded(source)
        return path if source != STDLIB and is_prepared(path) else None
    except (OSError, UserError):
        return None


def open_corpus(folder: Path) -> Corpus:
    """A prepared folder; files' sizes are compared now, their content when it is first read.

    Raises:
        UserError: the folder is not whole, or its manifest is not to be trusted.
    """
    manifest = read_manifest(folder)
    advice = (
        "restore it from a copy, or delete it and run the command that prepared "
        f"{folder} again: it makes that file anew"
    )
    tokens: list[CheckedArray] = []
    offsets: list[CheckedArray] = []
    for shard in manifest.shards:
        for suffix, dtype, limit, arrays in (
            (TOKENS, manifest.dtype, manifest.vocab_size, tokens),
            (OFFSETS, "<i8", shard.tokens + 1, offsets),
        ):
            path = inside(folder, shard.name + suffix)
            array = CheckedArray(path, shard.files[suffix], dtype, limit, advice)
            array.check_size()
            arrays.append(array)
    token_files = TokenFiles(tokens)
    return Corpus(
        folder=folder,
        tokens=token_files,
        documents=Documents(offsets, token_files.starts),
        tokenizer=tokenizer_of(folder, manifest),
        fingerprint=manifest.fingerprint,
    )


def verify(folder: Path) -> Iterator[str]:
    """Read everything in a prepared folder; every problem found.

    Raises:
        UserError: the manifest itself cannot be used.
    """
    manifest = read_manifest(folder)
    tokenizer_of(folder, manifest)
    advice = "restore it from a copy, or delete it and prepare the data again, which makes it anew"
    for shard in bar(manifest.shards, desc="verifying", unit=" shards", disable=None):
        for suffix in (TOKENS, OFFSETS):
            path = inside(folder, shard.name + suffix)
            try:
                CheckedArray(path, shard.files[suffix], "<u2", None, advice).check_all()
            except UserError as error:
                yield str(error)


def cache_folder(data: DataConfig) -> Path:
    if data.cache_dir is not None:
        return expanded(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mst_train")


def writing_cache(cache: Path) -> AbstractContextManager[None]:
    """Have errors of the file system say that it is the cache they are about."""
    advice = "make room or give permission there, or set data.cache_dir to another folder"
    return writing_to(f"data.cache_dir={cache}", advice)


def _trained_tokenizer(source: Source, vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer of this source and size: the cached one, or else one trained now."""

    def train() -> Tokenizer:
        start = time.monotonic()
        log.info("training a tokenizer of %d tokens on %s", vocab_size, source.name)
        tokenizer = train_tokenizer(source.documents(limit=SAMPLED_BYTES), vocab_size)
        seconds = time.monotonic() - start
        log.info(
            "trained a tokenizer of %d tokens on %s in %.1f s", vocab_size, source.name, seconds
        )
        return tokenizer

    key = digest(FORMAT, source.fingerprint, vocab_size)
    with writing_cache(cache):
        return kept_tokenizer(cache / TOKENIZERS, key, train)


def _whole(folder: Path) -> Corpus | None:
    """The corpus in a folder of the cache, where it is there and all files have their sizes."""
    if not is_prepared(folder):
        return None
    try:
        return open_corpus(folder)
    except UserError:
        return None


def _build(source: Source, tokenizer: Vocabulary, folder: Path) -> bool:
    """Make a corpus of the cache, or what is missing of it; whether nothing is missing now."""
    plan = Plan()
    start = time.monotonic()
    try:
        manifest = take(folder, source, plan)
    except UserError:
        log.warning("%s is damaged: building it again", folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        manifest = take(folder, source, plan)
    if manifest is not None:
        return True
    manifest = build(source, tokenizer, folder, plan)
    if manifest is None:  # another process is at the rest of it
        time.sleep(0.1)
        return False
    log.info(
        "tokenised %s: %d documents, %d bytes, %d tokens in %.1f s",
        source.name,
        manifest.documents,
        manifest.text_bytes,
        manifest.tokens,
        time.monotonic() - start,
    )
    return True


def _cumulated(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
