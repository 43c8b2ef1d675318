"""A source to a prepared folder: shards by one or many processes, then the manifest.

    DIR/tokenizer.model     as soon as work begins
    DIR/shards/             each shard as soon as it is made, its record last
    DIR/manifest.json       last of all: a folder with a manifest is whole
    DIR/work/               until then: the settings, the pieces, files that are being written

Whatever moment the processes are killed at, the same command makes what is missing and the same
bytes. Several jobs can do it at the same time; the one that finds all records there joins them.
"""

import functools
import json
import logging
import shutil
from dataclasses import astuple, dataclass, field
from pathlib import Path

from mst_train.data.documents import Source, digest, no_text_at_all
from mst_train.data.manifest import (
    KIND,
    MANIFEST,
    PROBLEMS,
    SETTINGS,
    SHARDS,
    TOKENIZER,
    WORK,
    Manifest,
    inside,
    is_prepared,
    read_manifest,
    write_json,
    write_manifest,
)
from mst_train.data.pieces import Piece
from mst_train.data.rate import Rate
from mst_train.data.shards import (
    ENDS,
    Task,
    dtype_of,
    is_whole,
    make_shard,
    read_record,
    tasks_of,
)
from mst_train.data.tokenizer import Vocabulary
from mst_train.data.tokenizer_file import FILE_NAMES, open_tokenizer
from mst_train.data.workers import make_shards
from mst_train.errors import UserError
from mst_train.files import reading, replace_file

PIECES = "pieces.json"
OURS = {WORK, SHARDS, TOKENIZER, MANIFEST, PROBLEMS, "packing", "packing.json", "lengths.png"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a folder is to be built."""

    workers: int = 1
    job: int = 0
    jobs: int = 1
    """This is the ``job``-th (from 0) of so many that build the folder."""
    shard_bytes: int = 1 << 28
    skip_malformed: bool = False
    settings: dict[str, str | int] = field(default_factory=dict)
    """What the tokens depend on, in the user's words; a folder belongs to one set of them."""


def take(folder: Path, source: Source, plan: Plan) -> Manifest | None:
    """Claim ``folder`` for this build; its manifest where everything is there already.

    Raises:
        UserError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file where a folder is needed: name another")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    others = sorted(name for name in names - OURS if not name.startswith("."))
    if others:
        raise UserError(
            f"{folder} holds other files ({', '.join(others[:3])}): name a folder that is new or "
            f"empty"
        )
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _require_same(folder, manifest.settings, plan.settings)
        if manifest.source_fingerprint != source.fingerprint:
            raise UserError(
                f"{folder} was prepared from {manifest.source} as it was then, and it has changed: "
                f"name another folder, or delete this one"
            )
        try:
            tokenizer_of(folder, manifest)
            if all(is_whole(folder, shard) for shard in manifest.shards):
                shutil.rmtree(folder / WORK, ignore_errors=True)
                return manifest
        except UserError:
            (folder / TOKENIZER).unlink(missing_ok=True)
        log.warning("%s lacks files that it had: making them again", folder)
    for part in (SHARDS, WORK):
        (folder / part).mkdir(parents=True, exist_ok=True)
    settings = folder / WORK / SETTINGS
    if any((folder / SHARDS).glob("*.json")):
        try:
            _require_same(folder, json.loads(settings.read_text())["settings"], plan.settings)
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is missing or damaged: shards are compared by themselves", settings)
    else:
        tokenizers = [*(folder / WORK).glob("*.model"), *(folder / name for name in FILE_NAMES)]
        for path in tokenizers:  # they may be of other settings
            path.unlink(missing_ok=True)
    write_json(settings, {"kind": KIND, "settings": plan.settings}, folder / WORK)
    return None


def build(source: Source, tokenizer: Vocabulary, folder: Path, plan: Plan) -> Manifest | None:
    """Make what is missing in a folder that was taken; None where other jobs have work to do.

    Raises:
        UserError: the source cannot be used.
        TrainingError: a worker was killed.
        OSError: the folder cannot be written.
    """
    try:
        return _build(source, tokenizer, folder, plan)
    except FileNotFoundError:
        # Another process that built the same has just finished, and removed its work.
        if (folder / WORK).exists() or not is_prepared(folder):
            raise
        return read_manifest(folder)


def tokenizer_of(folder: Path, manifest: Manifest) -> Vocabulary:
    """The tokenizer in a prepared folder; ``UserError`` where it is not the one it had."""
    model, path = None, folder
    if manifest.tokenizer is not None:
        path = inside(folder, manifest.tokenizer)
        with reading(path, "restore it from a copy, or prepare the data again"):
            model = path.read_bytes()
    tokenizer = open_tokenizer(model, manifest.vocab_size, manifest.eod, str(path))
    known = (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod)
    if known != (manifest.tokenizer_fingerprint, manifest.vocab_size, manifest.eod):
        raise UserError(
            f"{folder} holds another tokenizer than the one it was prepared with: restore "
            f"{manifest.tokenizer} from a copy, or prepare the data again"
        )
    return tokenizer


def _build(source: Source, tokenizer: Vocabulary, folder: Path, plan: Plan) -> Manifest | None:
    if tokenizer.model is not None:
        replace_file(folder / tokenizer.file_name, tokenizer.model, folder / WORK)
    tasks = tasks_of(source, tokenizer, _pieces(source, folder, plan.shard_bytes))
    own = tasks[plan.job :: plan.jobs]
    record_of = functools.partial(read_record, folder, skip_malformed=plan.skip_malformed)
    missing = [task for task in own if record_of(task) is None]
    if missing:
        (folder / MANIFEST).unlink(missing_ok=True)
        make = functools.partial(make_shard, folder, source.reader, tokenizer, plan.skip_malformed)
        size = sum(task.piece.size for task in own)
        left = sum(task.piece.size for task in missing)
        todo = (task for task in missing if record_of(task) is None)
        with Rate(source.name, size, size - left) as rate:
            make_shards(make, todo, min(plan.workers, len(missing)), rate.add)
    return _join(source, tokenizer, folder, plan, tasks)


def _pieces(source: Source, folder: Path, shard_bytes: int) -> list[Piece]:
    """The source's pieces, kept in WORK since compressed files are read to be divided."""
    path = folder / WORK / PIECES
    key = digest(source.fingerprint, shard_bytes)
    try:
        content = json.loads(path.read_text())
        if content["key"] == key:
            return [Piece(tuple(files), *rest) for files, *rest in content["pieces"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    pieces = source.divide(shard_bytes)
    write_json(path, {"key": key, "pieces": [astuple(piece) for piece in pieces]}, folder / WORK)
    return pieces


def _join(
    source: Source, tokenizer: Vocabulary, folder: Path, plan: Plan, tasks: list[Task]
) -> Manifest | None:
    """Write the manifest where all records are there, and remove everything that is not in it."""
    records = [read_record(folder, task, plan.skip_malformed) for task in tasks]
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        left = len(records) - len(whole)
        log.info("%s: %d of %d shards are left to other jobs", folder, left, len(records))
        return None
    shards = tuple(record.entry for record in whole if record.entry.documents)
    if not shards:
        raise no_text_at_all(source.name)
    manifest = Manifest(
        settings=plan.settings,
        source=source.name,
        source_fingerprint=source.fingerprint,
        tokenizer=None if tokenizer.model is None else tokenizer.file_name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=dtype_of(tokenizer.vocab_size),
        malformed=sum(record.entry.malformed for record in whole),
        shards=shards,
    )
    problems = [problem for record in whole for problem in record.problems]
    lines = "".join(json.dumps({"problem": problem}) + "\n" for problem in problems)
    if lines:
        replace_file(folder / PROBLEMS, lines.encode(), folder / WORK)
    else:
        (folder / PROBLEMS).unlink(missing_ok=True)
    if tokenizer.model is not None:  # a job that began later may have removed it
        replace_file(folder / tokenizer.file_name, tokenizer.model, folder / WORK)
    # What an earlier division of the source left among the shards.
    kept = {task.record(folder) for task in tasks}
    kept |= {folder / (shard.name + end) for shard in shards for end in ENDS}
    for path in (folder / SHARDS).iterdir():
        if path not in kept:
            path.unlink(missing_ok=True)
    write_manifest(folder, manifest)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest


def _require_same(folder: Path, before: dict[str, str | int], now: dict[str, str | int]) -> None:
    changed = [
        f"{key}={now.get(key)} (it was {before.get(key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} belongs to a preparation with other settings: now {', '.join(changed)}. Put "
            f"them back, name another folder, or delete this one"
        )
