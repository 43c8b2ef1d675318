"""Text to batches of token ids.

1. ``documents``: ``data.source`` -> a ``Source``: a fingerprint, and pieces that any process can
   read, each to the same documents (``pieces``), from text, ``.jsonl`` and ``.parquet`` files
   (``readers``), Megatron's token files (``megatron``) or a Hugging Face data set
   (``huggingface``).
2. ``tokenizer``: documents -> a sentencepiece model, trained once on a sample and cached, or the
   user's (``tokenizer_file``, ``tokenizer_json``); text -> token ids and back, without loss.
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

``load`` runs stages 1 to 6; ``mst_train.prepare`` stages 1 to 3, and ``statistics`` about 6.
``order`` holds the pseudo-random orders of stages 5 to 7. Of these, ``loader`` alone imports torch,
when it makes its first batch.
"""

from mst_train.data.corpus import load_corpus
from mst_train.data.load import (
    Data,
    check_sources,
    load_data,
    load_vocabulary,
    vocabulary_file,
)
from mst_train.data.loader import Batch, Loader, fixed_batches
from mst_train.data.packing import IGNORED, Sequences
from mst_train.data.tokenizer import Vocabulary
from mst_train.data.tokenizer_file import load_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "Data",
    "Loader",
    "Sequences",
    "Vocabulary",
    "check_sources",
    "fixed_batches",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "load_vocabulary",
    "vocabulary_file",
]
