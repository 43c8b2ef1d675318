"""Text to batches of token ids.

1. ``documents``: ``data.source`` -> a ``Source``: a fingerprint, and pieces that any process can
   read, each to the same documents (``pieces``), from text, ``.jsonl`` and ``.parquet`` files
   (``readers``), Megatron's token files (``megatron``) or a Hugging Face data set
   (``huggingface``).
2. ``tokenizer``: documents -> a sentencepiece model, trained once on a sample and cached, or the
   user's; text -> token ids and back, without loss.
3. ``build``: source and tokenizer -> a prepared folder: a shard of tokens from each piece
   (``shards``), made by one or many processes (``workers``, ``rate``), and a ``manifest``. Every
   block of its files has a checksum (``checked``).
4. ``corpus``: a prepared folder -> a ``Corpus``: the tokens and the documents' borders, read from
   disk as they are needed; in the cache where ``data.source`` is not such a folder.
5. ``splitting``: the documents' lengths -> which token ranges train and which validate.
6. ``packing``, ``best_fit``: token ranges -> ``Sequences``: inputs, labels and positions, [S] each;
   ``mixture``: several of those -> one.
7. ``loader``: sequences -> ``Batch`` after ``Batch``, [B, S]: an endless shuffled stream for
   training whose state is one integer (``Loader``), the same few sequences each time for
   validation (``fixed_batches``).

``load_data`` runs stages 1 to 6; ``mst_train.prepare`` stages 1 to 3, and ``statistics`` about 6.
``order`` holds the pseudo-random orders of stages 5 to 7. Of these, ``loader`` alone imports torch,
when it makes its first batch.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mst_train.config import DataConfig
from mst_train.data import best_fit
from mst_train.data.best_fit import BestFitSequences
from mst_train.data.corpus import Corpus, cache_folder, load_corpus, writing_to
from mst_train.data.documents import Source, digest, find_documents
from mst_train.data.loader import Batch, Loader, fixed_batches
from mst_train.data.mixture import MixedSequences
from mst_train.data.packing import IGNORED, PackedSequences, Sequences
from mst_train.data.splitting import long_documents, split_corpus, split_documents, split_stream
from mst_train.data.tokenizer import Tokenizer, Vocabulary, train_tokenizer
from mst_train.data.tokenizer_file import load_tokenizer
from mst_train.errors import UserError

Ints = NDArray[np.int64]

PACKING = "packing"
"""The folder of packing indices, beside a prepared folder's shards and in the cache."""

__all__ = [
    "IGNORED",
    "PACKING",
    "Batch",
    "Corpus",
    "Data",
    "Loader",
    "PackedSequences",
    "Sequences",
    "Source",
    "Tokenizer",
    "Vocabulary",
    "find_documents",
    "fixed_batches",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "pack",
    "split_corpus",
    "split_documents",
    "split_stream",
    "streams_of",
    "train_tokenizer",
]


@dataclass(frozen=True, eq=False)
class Data:
    tokenizer: Vocabulary
    training: Sequences
    validation: Sequences | None
    """None where ``data.validation_fraction`` is 0."""
    corpus_fingerprint: str
    """Stands for the tokens of the corpus, their tokenizer and how they become sequences."""


def load_data(data: DataConfig) -> Data:
    """Everything a run reads, from ``data.source`` or from the cache of an earlier run.

    Raises:
        UserError: what the configuration names cannot be used, or is too short for
            ``data.sequence_length``.
    """
    if not data.mixture:
        return load_source(data)
    parts = [
        load_source(replace(data, source=part.source, mixture=[]), part.min_document_tokens)
        for part in data.mixture
    ]
    for part, settings in zip(parts, data.mixture, strict=True):
        if part.tokenizer.fingerprint != parts[0].tokenizer.fingerprint:
            raise UserError(
                f"data.mixture has sources with different tokenizers ({data.mixture[0].source} and "
                f"{settings.source}): set data.tokenizer, or prepare them with the same one"
            )
    weights = [part.weight for part in data.mixture]
    validations = [part.validation for part in parts if part.validation is not None]
    return Data(
        tokenizer=parts[0].tokenizer,
        training=MixedSequences([part.training for part in parts], weights),
        validation=MixedSequences(validations, weights) if validations else None,
        corpus_fingerprint=digest("mixture", [part.corpus_fingerprint for part in parts], weights),
    )


def load_source(data: DataConfig, min_document_tokens: int = 0) -> Data:
    """One source; ``min_document_tokens``: shorter documents are left out of training."""
    corpus = load_corpus(data)
    training, validation = split_corpus(
        corpus.documents, data.validation_fraction, data.sequence_length
    )
    fingerprint = corpus.fingerprint
    if min_document_tokens:
        training = long_documents(corpus.documents, training, min_document_tokens)
        fingerprint = digest(fingerprint, min_document_tokens)
        if not len(training):
            raise UserError(
                f"data.mixture: {data.source} has no documents of min_document_tokens="
                f"{min_document_tokens} or more for training: lower it or leave the source out"
            )
    streams = streams_of(training, validation)
    places = [corpus.folder / PACKING, cache_folder(data) / PACKING]
    with writing_to(places[-1].parent):
        sequences = pack(corpus, streams, data, places, min_document_tokens)
    if data.packing != "stream":
        fingerprint = digest(fingerprint, data.packing)
    return Data(
        tokenizer=corpus.tokenizer,
        training=sequences["training"],
        validation=sequences.get("validation"),
        corpus_fingerprint=fingerprint,
    )


def streams_of(training: Ints, validation: Ints | None) -> dict[str, Ints]:
    return {"training": training} | ({} if validation is None else {"validation": validation})


def pack(
    corpus: Corpus, streams: dict[str, Ints], data: DataConfig, places: list[Path], minimum: int = 0
) -> dict[str, Sequences]:
    """The sequences of each stream, packed as ``data.packing`` says.

    ``places``: where packing indices are looked for; one that is missing is made in the last.
    """
    confined, length = data.attention == "documents", data.sequence_length
    if data.packing == "stream":
        confine_to = corpus.eod if confined else None
        return {
            name: PackedSequences(corpus.tokens, spans, length, confine_to)
            for name, spans in streams.items()
        }
    key = digest(best_fit.FORMAT, corpus.fingerprint, length, data.validation_fraction, minimum)
    indices = best_fit.load_index(corpus, key, streams, length, places)
    return {
        name: BestFitSequences(corpus.tokens, *indices[name], length, corpus.eod, confined)
        for name in streams
    }
