"""Everything a run reads, from what its configuration names."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mst_train.config import DataConfig
from mst_train.data import best_fit
from mst_train.data.best_fit import BestFitSequences
from mst_train.data.corpus import (
    TOKENIZERS,
    Corpus,
    cache_folder,
    load_corpus,
    prepared_folder,
    writing_cache,
)
from mst_train.data.documents import check_source, digest
from mst_train.data.mixture import MixedSequences
from mst_train.data.packing import PackedSequences, Sequences
from mst_train.data.splitting import long_documents, split_corpus
from mst_train.data.tokenizer import Vocabulary
from mst_train.data.tokenizer_file import load_tokenizer, tokenizer_file
from mst_train.errors import UserError
from mst_train.files import name_of

Ints = NDArray[np.int64]

PACKING = "packing"
"""The folder of packing indices, beside a prepared folder's shards and in the cache."""


@dataclass(frozen=True, eq=False)
class Data:
    tokenizer: Vocabulary
    training: Sequences
    validation: Sequences | None
    """None where ``data.validation_fraction`` is 0."""
    corpus_fingerprint: str
    """Stands for the tokens of the corpus, their tokenizer and how they become sequences."""
    validation_sets: Mapping[str, Sequences] = field(default_factory=dict)
    """By names: what is held out of each source of a mixture, and ``data.validation_sets``."""


def check_sources(data: DataConfig, vocab_size: int) -> None:
    """What ``load_data`` would refuse, as far as it shows before anything is read.

    Raises UserError for a path that leads to nothing, and for a tokenizer that is to be trained to
    more ids than ``vocab_size``, the model's.
    """
    names = [part.source for part in data.mixture] or [data.source]
    names += [part.source for part in data.validation_sets]
    raw = [name for name in dict.fromkeys(names) if prepared_folder(name) is None]
    for name in raw:
        check_source(replace(data, source=name))
    if raw and data.tokenizer is None and data.tokenizer_vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} is more than model.vocab_size="
            f"{vocab_size}: lower it, or raise model.vocab_size to that at least"
        )


def load_data(data: DataConfig) -> Data:
    """Everything a run reads, from ``data.source`` or from the cache of an earlier run.

    Raises:
        UserError: what the configuration names cannot be used, or is too short for
            ``data.sequence_length``.
    """
    loaded = _load_mixture(data) if data.mixture else load_source(data)
    sets = dict(loaded.validation_sets)
    for settings in data.validation_sets:
        if settings.name in sets:
            raise UserError(
                f"data.validation_sets: {settings.name} is the name of a source of data.mixture: "
                f"give the set another"
            )
        whole = replace(data, source=settings.source, mixture=[], validation_fraction=0.0)
        part = load_source(whole)
        _require_same_tokenizer(part, loaded, data, f"data.validation_sets: {settings.source} has")
        sets[settings.name] = part.training
    return replace(loaded, validation_sets=sets)


def _load_mixture(data: DataConfig) -> Data:
    parts = [
        load_source(replace(data, source=part.source, mixture=[]), part.min_document_tokens)
        for part in data.mixture
    ]
    for part, settings in zip(parts, data.mixture, strict=True):
        _require_same_tokenizer(part, parts[0], data, f"data.mixture: {settings.source} has")
    weights = [part.weight for part in data.mixture]
    validations = [part.validation for part in parts if part.validation is not None]
    names = _names([part.source for part in data.mixture])
    return Data(
        tokenizer=parts[0].tokenizer,
        training=MixedSequences([part.training for part in parts], weights),
        validation=MixedSequences(validations, weights) if validations else None,
        corpus_fingerprint=digest("mixture", [part.corpus_fingerprint for part in parts], weights),
        validation_sets=dict(zip(names, validations, strict=True)) if len(validations) > 1 else {},
    )


def _names(sources: Iterable[str]) -> list[str]:
    """What the sources of a mixture are called: by their last parts, and numbers where these are
    the same."""
    names = list[str]()
    for source in sources:
        name = name_of(source)
        if name in ("", "by_position"):  # the latter is another record's
            name = "source"
        same = sum(other.rpartition("_")[0] == name or other == name for other in names)
        names.append(f"{name}_{same + 1}" if same else name)
    return names


def _require_same_tokenizer(part: Data, first: Data, data: DataConfig, which: str) -> None:
    if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
        file = vocabulary_file(data, first.tokenizer.fingerprint)
        raise UserError(
            f"{which} another tokenizer than what is before it: set data.tokenizer"
            f"{'' if file is None else f'={file}'}, or prepare them with the same one"
        )


def vocabulary_file(data: DataConfig, fingerprint: str) -> Path | None:
    """The file of the tokenizer with this fingerprint that ``load_data`` has used; None where it is
    no longer there, or was none."""
    sources = [part.source for part in data.mixture] or [data.source]
    folders = [folder for source in sources if (folder := prepared_folder(source)) is not None]
    kept = (cache_folder(data) / TOKENIZERS).glob(f"*-{fingerprint}.model")
    given = [] if data.tokenizer is None else [Path(data.tokenizer)]
    for file in (*given, *filter(None, map(tokenizer_file, folders)), *kept):
        with contextlib.suppress(UserError):
            if load_tokenizer(file).fingerprint == fingerprint:
                return file
    return None


def load_vocabulary(data: DataConfig) -> Vocabulary:
    """The tokenizer alone of what ``load_data`` gives.

    Raises:
        UserError: what the configuration names cannot be used.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if data.mixture:
        data = replace(data, source=data.mixture[0].source, mixture=[])
    return load_corpus(data).tokenizer


def load_source(data: DataConfig, min_document_tokens: int = 0) -> Data:
    """One source; ``min_document_tokens``: shorter documents are left out of training."""
    corpus = load_corpus(data)
    streams = split_corpus(corpus.documents, data.validation_fraction, data.sequence_length)
    fingerprint = corpus.fingerprint
    if min_document_tokens:
        training = long_documents(corpus.documents, streams["training"], min_document_tokens)
        streams["training"] = training
        fingerprint = digest(fingerprint, min_document_tokens)
        if not len(training):
            raise UserError(
                f"data.mixture: {data.source} has no documents of min_document_tokens="
                f"{min_document_tokens} or more for training: lower it or leave the source out"
            )
    places = [corpus.folder / PACKING, cache_folder(data) / PACKING]
    with writing_cache(places[-1].parent):
        sequences = pack(corpus, streams, data, places, min_document_tokens)
    if data.packing != "stream":
        fingerprint = digest(fingerprint, data.packing)
    return Data(
        tokenizer=corpus.tokenizer,
        training=sequences["training"],
        validation=sequences.get("validation"),
        corpus_fingerprint=fingerprint,
    )


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
