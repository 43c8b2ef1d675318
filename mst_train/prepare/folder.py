"""A source to a prepared folder, as ``prepare.*`` says, and what packing does to its documents."""

import logging
import shutil
import tempfile
import time
from pathlib import Path

from mst_train.data import load_tokenizer
from mst_train.data.build import Plan, build, take
from mst_train.data.corpus import open_corpus, prepared_folder, verify
from mst_train.data.documents import SAMPLED_BYTES, Source, find_documents
from mst_train.data.load import PACKING, pack
from mst_train.data.manifest import MANIFEST, TOKENIZER, WORK, write_json
from mst_train.data.pieces import cores, ignore, refuse
from mst_train.data.splitting import split_corpus
from mst_train.data.statistics import draw_lengths, packing_statistics
from mst_train.data.tokenizer import (
    Tokenizer,
    Vocabulary,
    kept_tokenizer,
    train_tokenizer,
)
from mst_train.errors import UserError
from mst_train.files import UNFINISHED, expanded, writing_to
from mst_train.prepare.config import PrepareConfig

TRAINED = "trained"
"""The trained tokenizer's name until the manifest has its checksum."""

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> None:
    """Do what ``prepare.*`` asks for, and print what was done.

    Raises:
        UserError: the source, the tokenizer or the folder cannot be used, or is damaged.
        TrainingError: a worker was killed, or the disk is full.
    """
    if config.prepare.output is None:
        raise UserError("prepare.output is not set: name the folder to write to")
    folder = expanded(config.prepare.output)
    if config.prepare.verify:
        if problems := list(verify(folder)):
            raise UserError(problems)
        print(f"{folder}: every file is as it was written")
    else:
        _prepare(config, folder)


def _prepare(config: PrepareConfig, folder: Path) -> None:
    if config.data.mixture:
        raise UserError("data.mixture is for training: prepare each of its sources by itself")
    if prepared_folder(config.data.source) is not None:
        raise UserError(
            f"data.source={config.data.source} is prepared already: training reads it as it is"
        )
    root = expanded(config.data.source)
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"prepare.output={folder} is in data.source={config.data.source}, so that what is "
            f"written would be read: name a folder beside it"
        )
    start = time.monotonic()
    source = find_documents(config.data)
    plan = _plan(config)
    packing = ""
    advice = "make room or give permission there; then the same command continues"
    with writing_to(f"prepare.output={folder}", advice):
        manifest = take(folder, source, plan)
        made = manifest is None
        if manifest is None:
            manifest = build(source, _vocabulary(config, source, folder), folder, plan)
        seconds = time.monotonic() - start
        if manifest is not None and (made or plan.jobs == 1):
            packing = _packing(config, folder)
    if manifest is None:
        print(f"{folder}: job {config.prepare.shard} is done; the last of the jobs joins them")
        return
    print(
        f"{folder}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens of {manifest.text_bytes / 1e6:,.1f} MB of text, "
        f"in {seconds:.1f} s"
    )
    if packing:
        print(packing)
    if manifest.malformed:
        log.warning(
            "%d lines, rows or files were left out: %s lists them",
            manifest.malformed,
            folder / "malformed.jsonl",
        )


def _packing(config: PrepareConfig, folder: Path) -> str:
    """Pack the documents as training will, and write what that does to them; a line about it."""
    data = config.data
    corpus = open_corpus(folder)
    length = data.sequence_length
    try:
        streams = split_corpus(corpus.documents, data.validation_fraction, length)
    except UserError as error:
        return f"not packed into sequences: {error}"
    for left_over in (*folder.glob(f"{UNFINISHED}*"), *(folder / PACKING).glob(".*")):
        shutil.rmtree(left_over, ignore_errors=True)  # of a command that was killed
    sequences = pack(corpus, streams, data, [folder / PACKING])
    statistics = packing_statistics(corpus, data.packing, length, streams, sequences)
    picture = ", lengths.png"
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        write_json(folder / "packing.json", statistics, Path(temporary))
        try:
            draw_lengths(statistics, Path(temporary, "lengths.png"))
            Path(temporary, "lengths.png").replace(folder / "lengths.png")
        except ImportError:
            picture = " (no lengths.png: pip install matplotlib draws it)"
    about = statistics["training"]
    return (
        f"data.packing={data.packing}, data.sequence_length={length}: {about['sequences']:,} "
        f"sequences, {about['documents_cut']:,} of {about['documents']:,} documents cut, "
        f"{about['padding_share']:.2%} padding: packing.json{picture}"
    )


def _plan(config: PrepareConfig) -> Plan:
    data, prepare = config.data, config.prepare
    if data.tokenizer is not None:
        tokenizer = f"{load_tokenizer(data.tokenizer).fingerprint} (its fingerprint)"
    elif prepare.vocab_size is not None:
        tokenizer = f"none, {prepare.vocab_size} ids, {prepare.end_of_document} ends a document"
    else:
        tokenizer = f"trained, {data.tokenizer_vocab_size} ids"
    job, _, jobs = prepare.shard.partition("/")
    return Plan(
        workers=prepare.workers or cores(),
        job=int(job) - 1,
        jobs=int(jobs),
        shard_bytes=prepare.shard_mib << 20,
        skip_malformed=prepare.malformed == "skip",
        settings={
            "data.source": data.source,
            "data.split": data.split,
            "data.streaming": str(data.streaming).lower(),
            "data.text_field": data.text_field,
            "data.text_suffixes": f"[{','.join(data.text_suffixes)}]",
            "data.documents": data.documents,
            "data.tokenizer": tokenizer,
            "prepare.shard_mib": prepare.shard_mib,
        },
    )


def _vocabulary(config: PrepareConfig, source: Source, folder: Path) -> Vocabulary:
    """The tokenizer: the one given, the one that the folder has from before, or a new one."""
    data, prepare = config.data, config.prepare
    if data.tokenizer is not None:
        tokenizer: Vocabulary = load_tokenizer(data.tokenizer)
    elif prepare.vocab_size is not None and prepare.end_of_document is not None:
        return Vocabulary(prepare.vocab_size, prepare.end_of_document)
    else:

        def train() -> Tokenizer:
            if (folder / MANIFEST).exists() and (folder / TOKENIZER).exists():
                return Tokenizer.load(folder / TOKENIZER)  # compared with the manifest before
            log.info("training a tokenizer of %d ids on %s", data.tokenizer_vocab_size, source.name)
            report = ignore if prepare.malformed == "skip" else refuse
            sample = source.documents(report, SAMPLED_BYTES)
            return train_tokenizer(sample, data.tokenizer_vocab_size)

        tokenizer = kept_tokenizer(folder / WORK, TRAINED, train)
    tokenizer.threads = 1  # the processes are prepare.workers
    return tokenizer
