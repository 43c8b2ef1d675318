"""The tokenizer in a file: sentencepiece's ``.model`` or Hugging Face's ``tokenizer.json``."""

from pathlib import Path

from mst_train.data.tokenizer import Tokenizer, Vocabulary
from mst_train.data.tokenizer_json import JsonTokenizer
from mst_train.errors import UserError
from mst_train.files import expanded

FILE_NAMES = (JsonTokenizer.file_name, Tokenizer.file_name)
"""In a folder with both, the first: it says more about special tokens."""


def load_tokenizer(path: str | Path) -> Vocabulary:
    """The tokenizer that data.tokenizer names: a file, or a folder that holds one.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    path = expanded(path)
    if path.is_dir():
        found = tokenizer_file(path)
        if found is None:
            raise UserError(f"data.tokenizer={path} holds neither {' nor '.join(FILE_NAMES)}")
        path = found
    elif path.exists() and not path.is_file():
        raise UserError(f"data.tokenizer={path} is a pipe or a device: give a file")
    return JsonTokenizer.load(path) if path.suffix == ".json" else Tokenizer.load(path)


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, if there is one."""
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def open_tokenizer(model: bytes | None, vocab_size: int, eod: int, name: str) -> Vocabulary:
    """A tokenizer from its file's bytes (None: it had none), and what a manifest knows of it.

    Raises UserError where the bytes are none of a tokenizer.
    """
    if model is None:
        return Vocabulary(vocab_size, eod)
    if model.lstrip()[:1] == b"{":
        return JsonTokenizer(model, name, eod)
    return Tokenizer(model, name)
