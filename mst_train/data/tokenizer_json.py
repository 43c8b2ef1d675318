"""Text to token ids and back by a Hugging Face ``tokenizer.json``, through its own library.

The file says how text becomes tokens and what comes before a document (a beginning-of-sequence
token for Llama and Gemma, nothing for Qwen), but not which token ends one: that is in the files
that lie beside it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mst_train.data.pieces import cores
from mst_train.data.tokenizer import ADVICE, Lead, TextTokenizer
from mst_train.errors import UserError
from mst_train.files import reading

NEIGHBOURS = ("tokenizer_config.json", "generation_config.json", "config.json")
"""Which files beside a tokenizer.json say what ends a document; the first that does counts."""


class JsonTokenizer(TextTokenizer):
    """A Hugging Face tokenizer.

    What its file puts before a text comes before each document. Special tokens that are spelt out
    in a text are text: a document cannot end itself.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, name: str, eod: int | str) -> None:
        """``name`` says in messages where ``model`` is from; ``eod`` is an id or a token.

        Raises:
            UserError: not a tokenizer.json, or one that does not know ``eod``.
        """
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(model.decode())
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True)
        vocab_size = 1 + max(ids.values(), default=-1)
        number = ids.get(eod) if isinstance(eod, str) else eod
        if number is None or not 0 <= number < vocab_size:
            raise UserError(
                f"{name} has no token {eod!r}, which is to end a document: correct eos_token in "
                f"the tokenizer_config.json beside it"
            )
        super().__init__(vocab_size, number)
        self.model = model
        self.fingerprint = hashlib.sha256(model + f" eod {number}".encode()).hexdigest()[:32]
        self.eod_token = self._library.id_to_token(number)
        self.threads = cores()
        around = self._library.encode("").ids
        self._before = around[: around.index(number)] if number in around else around
        self._library.encode_special_tokens = True
        self._lead = Lead(
            lambda text: self._library.encode(text, add_special_tokens=False).ids, ids.get("a")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is sent to another process."""
        return JsonTokenizer, (self.model, "data.tokenizer", self.eod), {"threads": self.threads}

    @classmethod
    def load(cls, path: Path) -> "JsonTokenizer":
        """The tokenizer in a tokenizer.json, with what the files beside it say.

        Raises UserError where it cannot be read, or nothing says which token ends a document.
        """
        name = f"data.tokenizer={path}"
        with reading(name, ADVICE):
            model = path.read_bytes()
        for neighbour in NEIGHBOURS:
            eod = _end_of_document(path.with_name(neighbour))
            if eod is not None:
                return cls(model, name, eod)
        raise UserError(
            f"{name} does not say which token ends a document: put a tokenizer_config.json with an "
            f"eos_token beside it"
        )

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; special ones have none."""
        text: str = self._library.decode(tokens, skip_special_tokens=True)
        return text

    def _encoded(self, parts: list[str]) -> Iterator[list[int]]:
        found: Iterable[Any]
        if self.threads > 1:
            found = self._library.encode_batch_fast(parts, add_special_tokens=False)
        else:
            found = (self._library.encode(text, add_special_tokens=False) for text in parts)
        for encoding in found:
            yield encoding.ids


def _end_of_document(path: Path) -> int | str | None:
    """What a file beside a tokenizer.json says: a token or its id; None where it says nothing."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        token = content.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        found = content.get("eos_token_id") if token is None else token
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, (int, str)) and not isinstance(first, bool) else None
