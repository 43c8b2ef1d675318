"""Text to batches of token ids.

1. ``documents``: ``data.source`` -> a ``Source``: a fingerprint, and the documents as str in a
   fixed order, from Python's own source files, ``.txt``, ``.jsonl`` and ``.parquet`` files
   (``readers``) or a Hugging Face data set (``huggingface``).
2. ``tokenizer``: documents -> a sentencepiece model, trained once on a sample and cached, or the
   user's; text -> lists of ids and back, without loss.
3. ``corpus``: documents and tokenizer -> a ``Corpus``: one memory-mapped file of tokens, each
   document with its end-of-document id, and the documents' offsets; built once and cached.
4. ``splitting``: the documents' lengths -> which token ranges train and which validate.
5. ``packing``: token ranges -> ``PackedSequences``: inputs, labels and positions, [S] each.
6. ``loader``: sequences -> ``Batch`` after ``Batch``, [B, S]: an endless shuffled stream for
   training whose state is one integer (``Loader``), the same few sequences each time for
   validation (``fixed_batches``).

``load_data`` runs stages 1 to 5. ``order`` holds the pseudo-random orders of stages 4 and 6.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mst_train.config import DataConfig
from mst_train.data.corpus import Corpus, load_corpus
from mst_train.data.documents import Source, find_documents
from mst_train.data.loader import Batch, Loader, fixed_batches
from mst_train.data.packing import IGNORED, PackedSequences
from mst_train.data.splitting import split_documents, split_stream
from mst_train.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "Corpus",
    "Data",
    "Loader",
    "PackedSequences",
    "Source",
    "Tokenizer",
    "find_documents",
    "fixed_batches",
    "load_corpus",
    "load_data",
    "split_documents",
    "split_stream",
    "train_tokenizer",
]


@dataclass(frozen=True, eq=False)
class Data:
    tokenizer: Tokenizer
    training: PackedSequences
    validation: PackedSequences | None
    """None where ``data.validation_fraction`` is 0."""
    corpus_fingerprint: str
    """Stands for the tokens of the corpus and their tokenizer."""


def load_data(data: DataConfig) -> Data:
    """Everything a run reads, from ``data.source`` or from the cache of an earlier run.

    Raises:
        UserError: what the configuration names cannot be used, or is too short for
            ``data.sequence_length``.
    """
    corpus = load_corpus(data)
    training, validation = split_stream(
        corpus.offsets, data.validation_fraction, data.sequence_length
    )
    confine_to = corpus.eod if data.attention == "documents" else None

    def pack(spans: NDArray[np.int64]) -> PackedSequences:
        return PackedSequences(corpus.tokens, spans, data.sequence_length, confine_to)

    return Data(
        tokenizer=corpus.tokenizer,
        training=pack(training),
        validation=None if validation is None else pack(validation),
        corpus_fingerprint=corpus.fingerprint,
    )
