"""What a prepared folder says of itself: ``manifest.json``, written last and trusted with nothing.

The layout is described in ``data/README.md``. Whoever wrote a manifest, the names in it lead to
files inside its folder or the manifest is refused.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mst_train.data.checked import Hex, Written
from mst_train.data.documents import digest
from mst_train.errors import UserError
from mst_train.files import replace_file

KIND = "mst_train tokens"
FORMAT = 4
"""Raise it when the same source would give other tokens or other files."""
MANIFEST, TOKENIZER, SHARDS, WORK = "manifest.json", "tokenizer.model", "shards", "work"
SETTINGS, PROBLEMS = "settings.json", "malformed.jsonl"
TOKENS, OFFSETS = ".tokens", ".offsets"
DTYPES = {"<u2": 1 << 16, "<u4": 1 << 31}
"""Types of token files, and how many ids each is used for."""

_HEX = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """One shard: the files ``<name>.tokens`` and ``<name>.offsets`` in the manifest's folder."""

    name: str
    piece: Hex
    """Stands for the part of the source that this was made of, and for how."""
    documents: int
    tokens: int
    text_bytes: int
    malformed: int
    files: dict[str, Written]
    """By suffix: TOKENS and OFFSETS."""


@dataclass(frozen=True)
class Manifest:
    settings: dict[str, str | int]
    """What the tokens depend on, in the user's words."""
    source: str
    source_fingerprint: Hex
    tokenizer: str | None
    """The tokenizer's file; None where the source had tokens only and no tokenizer was given."""
    tokenizer_fingerprint: Hex
    vocab_size: int
    eod: int
    dtype: str
    malformed: int
    """Lines, rows and files that were left out."""
    shards: tuple[ShardEntry, ...]
    """In the source's order; none is empty."""

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Stands for the tokens, their documents and their tokenizer, wherever they were made."""
        files = [[shard.files[s].sha256 for s in (TOKENS, OFFSETS)] for shard in self.shards]
        return digest(FORMAT, self.tokenizer_fingerprint, files)


Entry = TypeVar("Entry", Manifest, ShardEntry, Written)


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` is one that was prepared, whole or not."""
    if (folder / WORK / SETTINGS).is_file():
        return True
    if not (folder / MANIFEST).is_file():
        return False
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError):
        return False
    except (ValueError, RecursionError):
        return (folder / SHARDS).is_dir()
    return isinstance(content, dict) and content.get("kind") == KIND


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "kind": KIND,
        "format": FORMAT,
        **{key: value for key, value in asdict(manifest).items() if key != "shards"},
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_json(folder / MANIFEST, content, folder / WORK)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: there is none yet, or it is not one that ``write_manifest`` could have written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds data that are not prepared to their end: run the command that "
            f"prepares them again, it continues (all its jobs, where prepare.shard makes several)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it cannot be read: {error}") from error
    try:
        if content["kind"] != KIND:
            raise _damaged(path, f"its kind is {content['kind']!r}, not {KIND!r}")
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has format {content['format']!r}, and this version reads {FORMAT}: "
                f"name another folder, or delete this one, and prepare the data again"
            )
        manifest = parsed(Manifest, content)
        if manifest.eod >= manifest.vocab_size:
            raise ValueError(f"eod={manifest.eod} is not an id below {manifest.vocab_size}")
        if manifest.vocab_size > DTYPES[manifest.dtype] or not manifest.shards:
            raise ValueError(f"{len(manifest.shards)} shards of type {manifest.dtype}")
        width = int(manifest.dtype[2])
        for shard in manifest.shards:
            sizes = (shard.tokens * width, 8 * (shard.documents + 1))
            if sizes != (shard.files[TOKENS].bytes, shard.files[OFFSETS].bytes):
                raise ValueError(f"the counts and sizes of {shard.name} do not fit")
        if content["fingerprint"] != manifest.fingerprint:
            raise ValueError("its fingerprint is not that of its shards")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    for shard in manifest.shards:
        for suffix in (TOKENS, OFFSETS):
            inside(folder, shard.name + suffix)
    return manifest


def parsed(kind: type[Entry], content: dict[str, Any]) -> Entry:
    """What JSON made of an entry; ``KeyError``, ``TypeError``, ``ValueError`` where it is none."""
    return kind(**{field.name: READ[field.type](content[field.name]) for field in fields(kind)})


def inside(folder: Path, name: str) -> Path:
    """The path of the file ``name`` in ``folder``; ``UserError`` where it would lead out of it."""
    path = Path(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{folder / MANIFEST} names the file {name!r}, which is not in its folder: use data "
            f"from someone you trust, or prepare them again"
        )
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / path} is a link that leads out of {folder}: put the file itself there"
        )
    return folder / path


def write_json(path: Path, content: Any, work: Path) -> None:
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode(), work)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged or was edited ({reason}): restore it from a copy, or prepare the data "
        f"again"
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _hex(value: Any) -> str:
    if not _HEX.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not a checksum")
    return _text(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


READ: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _count,
    Hex: _hex,
    str | None: lambda value: None if value is None else _text(value),
    dict[str, str | int]: dict,
    dict[str, Written]: lambda files: {s: parsed(Written, files[s]) for s in (TOKENS, OFFSETS)},
    tuple[ShardEntry, ...]: lambda shards: tuple(parsed(ShardEntry, shard) for shard in shards),
}
"""How a field is read, by its type."""
